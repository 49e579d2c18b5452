"""The means of clusters that k-means finds (the first version of Zeng et al., arXiv 2502.01015)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor


@basis_method(
    "kmeans",
    summary="the means of M clusters of task vectors (k-means)",
    cost="O(T²·M) for each of the iterations of ten starts",
    convex=True,
)
def kmeans(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The means of the clusters that k-means finds.

    The columns of F stand in for the task vectors: they have the same distances, up to the scale.
    """
    from raytvb.maths.clustering import cluster_means, kmeans_labels, sklearn_seed

    labels_T = kmeans_labels(vectors.F_RT.T.numpy(), size, sklearn_seed(generator))
    return cluster_means(vectors, labels_T, size)
