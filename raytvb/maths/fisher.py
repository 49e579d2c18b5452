"""Sensitivity scores: the diagonal Fisher information of every parameter of an image classifier.

Source: Iurada et al., "Efficient Model Editing with Task-Localized Sparse Fine-tuning", ICLR 2025,
arXiv 2504.02620:

    F_j = mean over images x of E_{y ~ p(.|x)} [ (d log p(y|x) / d theta_j)^2 ],

with the labels y drawn from the model itself.

A batch takes one forward pass, and one backward pass for each label of an image. When the backward
pass reaches a layer, the gradients of each sample are formed from the layer's input and the
gradient of its output. They are squared, added to the scores, and dropped. This is right because no
sample of a batch influences another (batch norm uses running statistics).

`fisher_recorder` has these rules, one for each kind of layer. `fisher_rewrites` takes fused layers
apart into steps that have rules. Parameters that no rule covers are scored by the plain definition.

Shape suffixes: N images, L positions (tokens, pixels), I and O features in and out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from raytvb.maths.fisher_recorder import Recorder
from raytvb.maths.recomputation import without_recomputation

Model = Callable[[Tensor], Tensor]

Draw = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (N, C) to labels (N, R) and their weights (N, R)."""

Draws = int | Literal["exact"]

Precision = Literal["fp32", "bf16"]


def fisher_scores(
    classifier: nn.Module,
    images: Tensor,
    *,
    draws: Draws = 1,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    precision: Precision = "fp32",
) -> dict[str, Tensor]:
    """Diagonal Fisher information of every parameter that requires grad, averaged over the images.

    The parameters of linear, convolution, normalisation and attention layers, scales and additive
    embeddings are scored a batch at a time. Parameters that are used in another way are detected on
    the first image, by comparing with plain autograd. They are scored image by image, and a warning
    names them.

    Args:
        classifier: images (N, 3, H, W) to logits (N, C). Its mode is not changed: call `.eval()`
            first. Recomputation of activations is off while it is scored.
        images: (N, 3, H, W), without augmentation.
        draws: labels sampled from p(.|x) per image, or "exact" for the expectation over all C
            classes.
        batch_size: images in one forward pass.
        generator: a CPU generator that draws the labels; None stands for one seeded with 0.
        precision: precision of the forward and backward passes; "bf16" is autocast to bfloat16.
            Squares are summed in float32.

    Returns: name -> float32 tensor of the parameter's shape.

    Raises ValueError for other options than these, for images of another shape or dtype, for logits
    that are not finite, and if there is nothing to score. Raises RuntimeError if the model uses a
    parameter in another way for a later batch than for the first.
    """
    _check_options(draws, batch_size, precision)
    parameters = _parameters_to_score(classifier, images, draws)
    seeded = generator if generator is not None else torch.Generator().manual_seed(0)

    def model(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits: Tensor = classifier(batch)
        return logits

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        return _labels_and_weights(logits.detach(), draws, seeded)

    # In half precision a rule and plain autograd round differently. A wrong rule is off by more.
    whole = all(p.dtype in (torch.float32, torch.float64) for p in parameters.values())
    tolerance: float | None = 1e-4 if whole else 0.25
    slow = set[str]()
    if precision == "bf16" and len(images) > 1:
        # Rounding to bfloat16 may exceed any tolerance, so the rules are checked in float32.
        with without_recomputation(classifier):
            slow = _parameters_without_rule(classifier, parameters, images, tolerance)
        tolerance = None
    scoring = _Scoring(model, draw, parameters, slow, tolerance)
    with without_recomputation(classifier):
        for batch in images.split(batch_size):
            scoring.add(batch)
    return {name: score.div_(len(images)) for name, score in scoring.scores.items()}


def _check_options(draws: Draws, batch_size: int, precision: str) -> None:
    """Raise ValueError for options that `fisher_scores` does not document."""
    valid = (draws == "exact" or isinstance(draws, int)) and batch_size >= 1
    if not valid or precision not in ("fp32", "bf16"):
        raise ValueError(
            f'draws = {draws!r} (a number or "exact"), batch_size = {batch_size} (at least 1), '
            f'precision = {precision!r} ("fp32" or "bf16")'
        )


def _parameters_to_score(
    classifier: nn.Module, images: Tensor, draws: Draws
) -> dict[str, nn.Parameter]:
    """The parameters that require grad; ValueError where there is nothing to score."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are {tuple(images.shape)} {images.dtype}; they must be normalised images "
            f"(N, 3, H, W) in floating point"
        )
    parameters = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    if not parameters or len(images) == 0 or (draws != "exact" and draws < 1):
        raise ValueError(
            f"nothing to score: {len(parameters)} parameters require grad, {len(images)} images, "
            f"draws = {draws}"
        )
    return parameters


def _zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores before the first image."""
    return {n: torch.zeros(p.shape, device=p.device) for n, p in parameters.items()}


def _parameters_without_rule(
    classifier: Model, parameters: Mapping[str, Tensor], images: Tensor, tolerance: float | None
) -> set[str]:
    """Names of the parameters that the model uses in a way without a rule, on two images."""

    def draw_likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmax(dim=1, keepdim=True)
        return labels, torch.ones(labels.shape, device=labels.device)

    discarded = _zeros(parameters)
    return _add_batch(classifier, parameters, images[:2], draw_likeliest, discarded, tolerance)[2]


class _Scoring:
    """Sums of squared gradients over batches of images.

    The first batch shows which parameters are used in a way without a rule. These are slow: they
    are scored image by image.
    """

    def __init__(
        self,
        model: Model,
        draw: Draw,
        parameters: Mapping[str, Tensor],
        slow: set[str],
        tolerance: float | None,
    ) -> None:
        """slow: names that are known to have no rule.

        tolerance: how far a rule's squares may differ from those of plain autograd, as a fraction
            of the largest; None: they are not compared.
        """
        self.scores = _zeros(parameters)
        self._model, self._draw, self._parameters = model, draw, parameters
        self._slow, self._tolerance = set(slow), tolerance
        self._settled = False
        """Whether a batch has shown which parameters are slow."""

    def add(self, batch: Tensor) -> None:
        """Add the squares of a batch (N, 3, H, W).

        Raises RuntimeError where the model uses a parameter in another way than in the first batch.
        """
        # In a batch of one image, the batch dimension looks like any other dimension of size 1.
        if len(batch) == 1:
            with torch.no_grad():
                labels, weights = self._draw(self._model(batch))
            _add_each(self._model, self._parameters, batch, labels, weights, self.scores)
            return
        fast = {n: p for n, p in self._parameters.items() if n not in self._slow}
        tolerance = None if self._settled else self._tolerance
        labels, weights, wrong = _add_batch(
            self._model, fast, batch, self._draw, self.scores, tolerance
        )
        if not self._settled:
            self._settle(wrong)
        elif wrong:
            raise RuntimeError(
                f"the model uses {', '.join(sorted(wrong))} in another way for {len(batch)} images "
                f"than for the first batch; score it with batch_size=1"
            )
        slow = {n: self._parameters[n] for n in self._slow}
        _add_each(self._model, slow, batch, labels, weights, self.scores)

    def _settle(self, wrong: set[str]) -> None:
        """Score these parameters image by image from now on, and warn of all slow ones."""
        self._settled = True
        self._slow |= wrong
        for name in wrong:
            self.scores[name].zero_()
        if self._slow:
            names = sorted(self._slow)
            warnings.warn(
                f"{len(names)} of {len(self._parameters)} parameters are used in ways that have no "
                f"fast rule and are scored image by image: {', '.join(names[:5])}"
                f"{', …' if len(names) > 5 else ''}",
                stacklevel=4,
            )


def _labels_and_weights(
    logits: Tensor, draws: Draws, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Labels (N, R) to score and their weights (N, R), which sum to 1 for each image.

    The labels are `draws` samples, or every class for "exact". Raises ValueError for logits that
    are not finite.
    """
    bad = int((~logits.isfinite()).any(dim=1).sum())
    if bad:
        raise ValueError(
            f"the model's logits are NaN or infinite for {bad} of {len(logits)} images"
        )
    probabilities = logits.float().softmax(dim=1)
    if draws == "exact":
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return labels, probabilities
    # The draws are made on the CPU so that a seed means the same labels on every device.
    on_cpu = probabilities.cpu()
    labels = torch.multinomial(on_cpu, draws, replacement=True, generator=generator)
    labels = labels.to(logits.device)
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
    """Add the weighted squares of a batch to `scores`, for labels that `draw` gives.

    Returns the labels (N, R), their weights (N, R), and the names of parameters that are used in a
    way without a rule. With a tolerance, these include parameters whose rule is wrong for this
    model: the squares for the first image and label differ from those of plain autograd.
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
    """The gradient of log p(label | image) by name, for the parameters that it depends on."""
    log_p = classifier(image).float().log_softmax(dim=1)[0, label[0]]
    gradients = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}


@torch.enable_grad()
def _add_each(
    classifier: Model,
    parameters: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
    scores: Mapping[str, Tensor],
) -> None:
    """Add squares by the plain definition: one backward pass for each image and label.

    This is right for every model.
    """
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
