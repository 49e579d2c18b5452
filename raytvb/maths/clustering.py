"""Clusters of task vectors, and the basis of their means."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytvb.maths.gram_factor import GramFactor


def sklearn_seed(generator: torch.Generator) -> int:
    """The next draw of the generator, as scikit-learn's `random_state`."""
    return int(torch.randint(2**31 - 1, (1,), generator=generator))


def kmeans_labels(
    points: NDArray[np.float64], size: int, seed: int, weights: NDArray[np.float64] | None = None
) -> NDArray[np.int32]:
    """The cluster (T,), 0 to size − 1, of each of the points (T, K); some clusters may be empty.

    weights (T,): how much each point counts. None: all points count the same.
    """
    # scikit-learn takes more than a second to import, and only two basis methods need it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(size, n_init=10, random_state=seed)
    with warnings.catch_warnings():
        # KMeans warns if there are fewer distinct points than clusters. `cluster_means` fills the
        # empty clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels: NDArray[np.int32] = model.fit_predict(points, sample_weight=weights)
    return labels


def cluster_means(
    vectors: GramFactor, labels: NDArray[np.int32], size: int
) -> tuple[Tensor, Tensor]:
    """B (T, M) whose column m is uniform over the tasks labelled m, and its best W (M, T).

    An empty cluster takes a task from the largest one.
    """
    label_T = torch.from_numpy(labels.astype(np.int64))
    for empty in sorted(set(range(size)) - set(label_T.tolist())):
        largest = label_T.bincount(minlength=size).argmax()
        label_T[(label_T == largest).nonzero()[-1]] = empty
    B_TM = torch.nn.functional.one_hot(label_T, size).double()
    B_TM = B_TM / B_TM.sum(0)
    return B_TM, vectors.weights(B_TM)
