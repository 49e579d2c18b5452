"""The means of clusters that spectral clustering finds: like `kmeans`, but by angles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor


@basis_method(
    "spectral",
    summary="the means of M clusters of task vectors (spectral clustering of their angles)",
    cost="O(T³): eigenvectors of the affinity, then k-means in M dimensions",
    convex=True,
)
def spectral(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The means of the clusters that spectral clustering finds.

    The affinity is (1 + cosine) / 2, which is never negative. The affinity ignores the norms of the
    vectors, but the loss does not. So the k-means of the embedding weighs each vector by its
    squared norm.
    """
    import torch
    from sklearn.manifold import spectral_embedding

    from raytvb.maths.clustering import cluster_means, kmeans_labels, sklearn_seed

    norm_T = vectors.G_TT.diag().clamp(min=0).sqrt()
    cosine_TT = vectors.G_TT / torch.outer(norm_T, norm_T).clamp(min=1e-300)
    affinity_TT = ((1 + cosine_TT.clamp(-1, 1)) / 2).numpy()
    seed = sklearn_seed(generator)
    embedded_TM = spectral_embedding(
        affinity_TT, n_components=size, drop_first=False, random_state=seed
    )
    labels_T = kmeans_labels(embedded_TM, size, seed, norm_T.square().numpy())
    return cluster_means(vectors, labels_T, size)
