"""Which parameters to train: the masks of TaLoS.

They keep the parameters with the LOWEST sensitivity, whose scores come from `fisher`. A mask is
selected in rounds: `select_further` narrows it, and `damp` gives the weights that the next round
scores.

Source: Iurada et al., "Efficient Model Editing with Task-Localized Sparse Fine-tuning", ICLR 2025,
arXiv 2504.02620.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector (D,), tensors in the order of their sorted names."""
    return torch.cat([tensors[n].reshape(-1) for n in sorted(tensors)])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `flatten`: views of `vector` (D,) with the names and shapes of `like`."""
    parts = vector.split([like[n].numel() for n in sorted(like)])
    return {n: part.view(like[n].shape) for n, part in zip(sorted(like), parts, strict=True)}


def kept_count(total: int, density: float) -> int:
    """Number of parameters, at least one, that a mask of this density keeps out of `total`.

    Raises ValueError for a density outside (0, 1].
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], not {density}")
    return max(1, round(total * density))


def select_mask(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Keep exactly round(density * D) entries, the lowest scores of all tensors together.

    Ties at the threshold are broken by position (sorted names, then flat index). Memory is O(D): a
    k-th value is selected, nothing is sorted.

    Returns name -> bool tensor. Raises ValueError for a density outside (0, 1], for scores that are
    NaN, and if there are no scores.
    """
    if not scores:
        raise ValueError("there are no scores to select from")
    flat = flatten(scores).float()
    if torch.isnan(flat).any():
        bad = [n for n in sorted(scores) if torch.isnan(scores[n]).any()]
        raise ValueError(f"scores are NaN in {', '.join(bad)}")
    keep = kept_count(flat.numel(), density)
    threshold = flat.kthvalue(keep).values
    mask = flat < threshold
    ties = (flat == threshold).nonzero()[: keep - int(mask.sum()), 0]
    mask[ties] = True
    return unflatten(mask, scores)


def round_density(density: float, step: int, rounds: int) -> float:
    """Density after round `step` (from 1 on) of `rounds`: density^(step/rounds)."""
    return float(density ** (step / rounds))


def select_further(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None, density: float
) -> dict[str, Tensor]:
    """One round: like `select_mask`, but entries that an earlier round rejected stay rejected.

    kept: the mask of the round before; None in the first round. Raises as `select_mask`.
    """
    if kept is None:
        return select_mask(scores, density)
    # Scores that overflowed are made finite, so that they rank before the rejected entries.
    largest = torch.finfo(torch.float32).max
    remaining: dict[str, Tensor] = {}
    for name, score in scores.items():
        remaining[name] = score.float().clamp(max=largest).masked_fill(~kept[name], torch.inf)
    return select_mask(remaining, density)


def damp(
    parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor], damping: float
) -> dict[str, Tensor]:
    """The weights that the next round scores: rejected entries are multiplied by `damping`.

    The authors' code has a damping of 0.1; 1 leaves the weights as they are.
    """
    return {n: torch.where(kept[n], p, p * damping) for n, p in parameters.items()}


def jaccard(intersections: Tensor) -> Tensor:
    """|A and B| / |A or B| of each pair of masks, (T, T) float64; 1 for two empty masks.

    intersections: (T, T), the sizes of A and B; the diagonal has the sizes of the masks.
    """
    common = intersections.double()
    sizes = common.diagonal()
    either = sizes[:, None] + sizes[None, :] - common
    return torch.where(either > 0, common / either, 1.0)
