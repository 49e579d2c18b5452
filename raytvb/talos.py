"""Which parameters to train: sensitivity scores and masks of TaLoS.

Source: Iurada et al., "Efficient Model Editing with Task-Localized Sparse Fine-tuning", ICLR 2025, arXiv 2504.02620.
The sensitivity of parameter j is the diagonal of the Fisher information at the pretrained weights,

    F_j = mean over images x of E_{y ~ p(.|x)} [ (d log p(y|x) / d theta_j)^2 ],

with the labels y drawn from the model itself. The parameters with the LOWEST sensitivity are the ones to train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

# Per-sample gradients of a chunk of images are held at once: this bounds them, in bytes.
GRADIENT_MEMORY = 512 * 2**20


def _labels_and_weights(logits: Tensor, draws: int | Literal["exact"], generator: torch.Generator | None) -> tuple[
        Tensor, Tensor]:
    """Labels (N, R) to score and their weights (N, R), which sum to 1 over R: sampled ones or every class."""
    probabilities = logits.float().softmax(dim=1)
    if draws == "exact":
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return labels, probabilities
    # The draws are made on the CPU so that a seed means the same labels on every device.
    labels = torch.multinomial(probabilities.cpu(), draws, replacement=True, generator=generator).to(logits.device)
    return labels, torch.full(labels.shape, 1.0 / draws, device=logits.device)


def fisher_scores(classifier: nn.Module, images: Tensor, *, draws: int | Literal["exact"] = 1, batch_size: int = 32,
                  generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Diagonal Fisher information of every parameter that requires grad, averaged over the images.

    Args:
        classifier: images (N, 3, H, W) to logits (N, C); used in the mode it is in (call `.eval()` first).
        images: (N, 3, H, W), without augmentation.
        draws: labels sampled from p(.|x) per image, or "exact" for the expectation over all C classes.
        batch_size: the most images a forward pass takes; fewer where their gradients would not fit in 512 MiB.
        generator: seeds the sampled labels (a CPU generator); the default is seeded with 0.

    Returns: name -> float32 tensor of the parameter's shape. Raises ValueError where there is nothing to score.
    """
    parameters = {n: p.detach() for n, p in classifier.named_parameters() if p.requires_grad}
    if not parameters or len(images) == 0 or (draws != "exact" and draws < 1):
        raise ValueError(f"nothing to score: {len(parameters)} parameters require grad, {len(images)} images, "
                         f"draws = {draws}")
    frozen = {n: p.detach() for n, p in classifier.named_parameters() if not p.requires_grad}
    frozen |= dict(classifier.named_buffers())
    generator = generator if generator is not None else torch.Generator().manual_seed(0)

    def log_likelihood(trained: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(classifier, {**frozen, **trained}, (image[None],))
        return logits.float().log_softmax(dim=1).gather(1, label.view(1, 1)).squeeze()

    per_sample = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
    size = sum(p.numel() for p in parameters.values())
    chunk = max(1, min(batch_size, GRADIENT_MEMORY // (4 * size)))
    scores = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    for batch in images.split(chunk):
        with torch.no_grad():
            labels, weights = _labels_and_weights(classifier(batch), draws, generator)
        for r in range(labels.shape[1]):
            # Of the attention kernels only the plain one can be batched over samples without a loop.
            with sdpa_kernel(SDPBackend.MATH):
                gradients = per_sample(parameters, batch, labels[:, r])
            for name, gradient in gradients.items():
                scores[name] += torch.einsum("n...,n->...", gradient.float().square(), weights[:, r])
    return {n: s / len(images) for n, s in scores.items()}


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector (D,), tensors in the order of their sorted names."""
    return torch.cat([tensors[n].reshape(-1) for n in sorted(tensors)])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `flatten`: views of `vector` (D,) with the names and shapes of `like`."""
    parts = vector.split([like[n].numel() for n in sorted(like)])
    return {n: part.view(like[n].shape) for n, part in zip(sorted(like), parts, strict=True)}


def kept_count(total: int, density: float) -> int:
    """Number of parameters a mask of this density keeps out of `total`: at least one. ValueError outside (0, 1]."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], not {density}")
    return max(1, round(total * density))


def select_mask(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Keep the round(density * D) entries with the lowest scores over all tensors together, exactly that many.

    Ties at the threshold are broken by position (sorted names, then flat index). O(D) memory: a k-th value selection,
    no sort. Returns name -> bool tensor. Raises ValueError for a density outside (0, 1] or scores that are NaN.
    """
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
    """Density after round `step` (1-based) of `rounds`: density^(step/rounds), so the last one is `density`."""
    return float(density ** (step / rounds))


def select_further(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor] | None,
                   density: float) -> dict[str, Tensor]:
    """One staged round: like `select_mask`, but entries that an earlier round rejected stay rejected."""
    if kept is None:
        return select_mask(scores, density)
    # Scores that overflowed are made finite, so that they come before the rejected ones.
    largest = torch.finfo(torch.float32).max
    return select_mask({n: s.float().clamp(max=largest).masked_fill(~kept[n], torch.inf) for n, s in scores.items()},
                       density)


def damp(parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
    """Weights for scoring the next round: rejected entries multiplied by `damping` (0.1 in the authors' code)."""
    return {n: torch.where(kept[n], p, p * damping) for n, p in parameters.items()}


def jaccard(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """|A and B| / |A or B| of two masks with the same names."""
    both = sum(int((left[n] & right[n]).sum()) for n in left)
    either = sum(int((left[n] | right[n]).sum()) for n in left)
    return both / either if either else 1.0
