"""Sensitivity scores: the diagonal Fisher information of every parameter of an image classifier.

Source: Iurada et al., "Efficient Model Editing with Task-Localized Sparse Fine-tuning", ICLR 2025,
arXiv 2504.02620:

    F_j = mean over images x of E_{y ~ p(.|x)} [ (d log p(y|x) / d theta_j)^2 ],

with the labels y drawn from the model itself. One forward and one backward pass a batch: the
per-sample gradients of a layer are formed from its input and the gradient of its output when the
backward pass gets there, squared, and dropped. Each sample's gradient is its own because no sample
of a batch touches another (batch norm uses running statistics).

Shape suffixes: N images, L positions (tokens, pixels), I and O features in and out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from raytvb.maths.fisher_recorder import Recorder

Model = Callable[[Tensor], Tensor]


Draw = Callable[
    [Tensor], tuple[Tensor, Tensor]
]  # logits (N, C) to labels (N, R) and weights (N, R)


def fisher_scores(
    classifier: nn.Module,
    images: Tensor,
    *,
    draws: int | Literal["exact"] = 1,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Tensor]:
    """Diagonal Fisher information of every parameter that requires grad, averaged over the images.

    Linear, convolution, normalisation and attention layers, scales and additive embeddings take one
    pass a batch. What is used in another way is found out on the first image, by comparing with
    plain autograd, and scored image by image; a warning says so.

    Args:
        classifier: images (N, 3, H, W) to logits (N, C); used in the mode it is in (call `.eval()`
            first).
        images: (N, 3, H, W), without augmentation.
        draws: labels sampled from p(.|x) per image, or "exact" for the expectation over all C
            classes.
        batch_size: images a forward pass takes.
        generator: seeds the sampled labels (a CPU generator); the default is seeded with 0.
        precision: of the forward and backward pass; "bf16" is autocast to bfloat16. Squares are
            summed in float32.

    Returns: name -> float32 tensor of the parameter's shape. Raises ValueError where there is
    nothing to score, and for arguments that are none of these.
    """
    if (
        not (draws == "exact" or isinstance(draws, int))
        or batch_size < 1
        or precision not in ("fp32", "bf16")
    ):
        raise ValueError(
            f'draws = {draws!r} (a number or "exact"), batch_size = {batch_size} (at least 1), '
            f'precision = {precision!r} ("fp32" or "bf16")'
        )
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; needed are normalised ones (N, 3, H, W) in "
            f"floating point"
        )
    parameters = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    if not parameters or len(images) == 0 or (draws != "exact" and draws < 1):
        raise ValueError(
            f"nothing to score: {len(parameters)} parameters require grad, {len(images)} images, "
            f"draws = {draws}"
        )
    generator = generator if generator is not None else torch.Generator().manual_seed(0)

    def model(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return classifier(batch)

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        return _labels_and_weights(logits.detach(), draws, generator)

    def draw_first(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmax(dim=1, keepdim=True)
        return labels, torch.ones(labels.shape, device=labels.device)

    # Half precision rounds the two ways differently; a wrong rule is off by more than that.
    whole = all(p.dtype in (torch.float32, torch.float64) for p in parameters.values())
    tolerance: float | None = 1e-4 if whole else 0.25
    scores = {n: torch.zeros(p.shape, device=p.device) for n, p in parameters.items()}
    slow = set[str]()
    if (
        precision == "bf16" and len(images) > 1
    ):  # where rounding may be larger than any tolerance: checked in float32
        _, _, slow = _add_batch(classifier, parameters, images[:2], draw_first, scores, tolerance)
        tolerance = None
        for score in scores.values():
            score.zero_()
    unseen = True
    for batch in images.split(batch_size):
        if len(batch) == 1:  # it cannot be told from other sizes of 1
            with torch.no_grad():
                labels, weights = draw(model(batch))
            _add_each(model, parameters, batch, labels, weights, scores)
            continue
        fast = {n: p for n, p in parameters.items() if n not in slow}
        labels, weights, wrong = _add_batch(
            model, fast, batch, draw, scores, tolerance if unseen else None
        )
        if unseen:
            slow, unseen = slow | wrong, False
            _warn(slow, len(parameters))
            for name in wrong:
                scores[name].zero_()
        elif wrong:
            raise RuntimeError(
                f"the model uses {', '.join(sorted(wrong))} in another way for {len(batch)} images than "
                f"for the first batch; score it with batch_size=1"
            )
        _add_each(model, {n: parameters[n] for n in slow}, batch, labels, weights, scores)
    return {n: s.div_(len(images)) for n, s in scores.items()}


def _warn(slow: set[str], count: int) -> None:
    if slow:
        warnings.warn(
            f"{len(slow)} of {count} parameters are used in ways that have no fast rule and are scored image "
            f"by image: {', '.join(sorted(slow)[:5])}{', …' if len(slow) > 5 else ''}",
            stacklevel=3,
        )


def _labels_and_weights(
    logits: Tensor, draws: int | Literal["exact"], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Labels (N, R) to score and their weights (N, R), which sum to 1 over R: sampled ones or every
    class.
    """
    probabilities = logits.float().softmax(dim=1)
    if draws == "exact":
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return labels, probabilities
    # The draws are made on the CPU so that a seed means the same labels on every device.
    labels = torch.multinomial(
        probabilities.cpu(), draws, replacement=True, generator=generator
    ).to(logits.device)
    return labels, torch.full(labels.shape, 1.0 / draws, device=logits.device)


@torch.enable_grad()
def _add_batch(
    classifier: Model,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    draw: Draw,
    scores: Mapping[str, Tensor],
    tolerance: float | None,
) -> tuple[Tensor, Tensor, set[str]]:
    """Add the weighted squares of a batch to `scores`, for labels (N, R) and weights (N, R) drawn
    from the logits.

    Returns both, and the names of parameters that are used in a way without a rule. With a
    tolerance, also those whose squares for the first image and label are not those of plain
    autograd on that image: a rule that is wrong here.
    """
    recorder = Recorder(parameters, scores, len(images))
    with torch.set_grad_enabled(bool(parameters)), recorder:
        logits = classifier(images)
        labels, recorder.weights_NR = draw(logits)
        log_p = logits.float().log_softmax(dim=1).gather(1, labels)
    if tolerance is not None and parameters:
        recorder.expect(_gradients(classifier, parameters, images[:1], labels[0, :1]), tolerance)
    for r in range(labels.shape[1] if recorder.ends else 0):
        recorder.draw = r
        torch.autograd.grad(
            log_p[:, r].sum(),
            recorder.ends,
            allow_unused=True,
            retain_graph=r + 1 < labels.shape[1],
        )
    return labels, recorder.weights_NR, recorder.unknown | recorder.unmet()


def _gradients(
    classifier: Model, parameters: Mapping[str, Tensor], image: Tensor, label: Tensor
) -> dict[str, Tensor]:
    """d log p(label | image) by name, for those it depends on."""
    log_p = classifier(image).float().log_softmax(dim=1)[0, label[0]]
    found = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@torch.enable_grad()
def _add_each(
    classifier: Model,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
    scores: Mapping[str, Tensor],
) -> None:
    """The plain definition, one backward pass for each image and label: right for every model."""
    if not parameters:
        return
    for n in range(len(images)):
        log_p = classifier(images[n : n + 1]).float().log_softmax(dim=1)[0, labels[n]]
        for r, weight in enumerate(weights[n].tolist()):
            gradients = torch.autograd.grad(
                log_p[r],
                list(parameters.values()),
                allow_unused=True,
                retain_graph=r + 1 < len(log_p),
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    scores[name].addcmul_(gradient.float(), gradient.float(), value=weight)
