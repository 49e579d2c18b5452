"""Unseen tasks: coefficients of given vectors, learned from a handful of labelled images.

theta = theta_0 + S c with F vectors S = [v_1 ... v_F], which are those of a basis (Zeng et al.,
Task Vector Bases, arXiv 2502.01015, generalisation to unseen tasks) or all task vectors. Only c is
learned. Zhang et al., NeurIPS 2024, arXiv 2407.02880, learn a coefficient for each vector and block
of parameters. Here each vector has one coefficient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.maths.flat_parameters import FlatParameters
from raytvb.storage.vector_set import COMBINED_BYTES, Coordinates, block_columns


@dataclass(frozen=True)
class Learned:
    """What was learned. Add `direction` to the pretrained weights with coefficient 1."""

    coefficients: Tensor
    """(F,) float64, one for each of the given vectors."""
    direction: Tensor
    """(count,) float32, sum_f c_f v_f on the vectors' coordinates."""
    losses: list[float]
    """Cross entropy of each step's batch, before the step."""
    seconds: float


def few_shot_sample(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Positions (n,), rising, of `shots` random images of each class in `labels` (N,).

    If a class has fewer images, all of them are taken. With the same seed, the images for fewer
    shots are a part of the images for more shots. Raises ValueError for less than one shot.
    """
    if shots < 1:
        raise ValueError(f"shots must be at least 1, not {shots}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    positions = [order[:0]]
    for label in labels.unique():
        positions.append(order[labels[order] == label][:shots])
    return torch.cat(positions).sort().values


def learn_coefficients(
    classifier: nn.Module,
    vectors: Coordinates,
    images: Tensor,
    labels: Tensor,
    *,
    scales: Tensor,
    preprocess: Preprocess,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Learned:
    """Learn the coefficients of F vectors with Adam on the cross entropy of labelled images.

    Adam learns u, which is zero at first, and c = u * scales. So every u_f moves by up to `lr` in a
    step, however long v_f is. On a CPU the result is deterministic for a given seed. Memory: the
    vectors if they take at most 512 MB, else two blocks of them, and then all vectors are read
    twice in each step.

    Args:
        classifier: an `ImageClassifier` at theta_0. It is at theta_0 again when this function
            returns or raises, and is moved to `device`.
        vectors: F vectors with the parameters of the classifier.
        images: (N, 3, S, S) uint8.
        labels: (N,) int64.
        scales: (F,), such as typical length / length of v_f. A vector of scale 0 is not used.
        batch_size: number of images in a step. Every epoch is a fresh permutation, and its last
            batch may be smaller.

    Raises ValueError for inputs that do not fit each other, and for a loss or gradient that is not
    finite.
    """
    started = time.perf_counter()
    classifier.to(device).eval()
    scales = scales.detach().to("cpu", torch.float64)
    _check_images(classifier, images, labels, preprocess)
    span = _Span(vectors, scales, device)
    u = nn.Parameter(torch.zeros_like(scales))
    optimizer = torch.optim.Adam([u], lr=lr)
    losses: list[float] = []
    theta = _Theta(classifier, vectors, device)
    try:
        for step, chosen in enumerate(_batches(len(labels), batch_size, steps, seed)):
            theta.set(span.direction(u.detach() * scales))
            pixels = preprocess.normalise(images[chosen].to(device))
            loss, gradient = _loss_and_gradient(classifier, theta, pixels, labels[chosen])
            losses.append(loss)
            u.grad = scales * span.products(gradient)
            if not (math.isfinite(loss) and bool(u.grad.isfinite().all())):
                raise ValueError(
                    f"the loss ({loss}) or its gradient is not finite at step {step + 1} of "
                    f"{steps}: lr {lr} is too high"
                )
            optimizer.step()
    finally:
        theta.restore()
    coefficients = u.detach() * scales
    direction = span.direction(coefficients).cpu()
    return Learned(coefficients, direction, losses, time.perf_counter() - started)


@torch.enable_grad()
def _loss_and_gradient(
    classifier: nn.Module, theta: _Theta, pixels: Tensor, labels: Tensor
) -> tuple[float, Tensor]:
    """Cross entropy of a batch, and its gradient (count,) on the vectors' coordinates."""
    loss = nn.functional.cross_entropy(classifier(pixels), labels.to(pixels.device))
    return loss.item(), theta.gradient(loss)


def _check_images(
    classifier: nn.Module, images: Tensor, labels: Tensor, preprocess: Preprocess
) -> None:
    """Raise ValueError for images and labels that `learn_coefficients` does not take."""
    shape, classes = (3, preprocess.size, preprocess.size), len(classifier.get_buffer("head"))
    if not len(images):
        raise ValueError("there are no images to learn from")
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"images must be (N, {', '.join(map(str, shape))}) uint8, not {tuple(images.shape)} "
            f"{images.dtype}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be ({len(images)},) int64, one for each image, not "
            f"{tuple(labels.shape)} {labels.dtype}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels must be 0 to {classes - 1}, the classes of the head; there are labels from "
            f"{int(labels.min())} to {int(labels.max())}"
        )


def _batches(count: int, batch_size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Positions of the images of each step. If all fit in one batch, they keep their order."""
    generator, queue = torch.Generator().manual_seed(seed), list[Tensor]()
    for _ in range(steps):
        if not queue:
            whole = count <= batch_size
            order = torch.arange(count) if whole else torch.randperm(count, generator=generator)
            queue = list(order.split(batch_size))
        yield queue.pop(0)


class _Theta:
    """The classifier's parameters on the coordinates of vectors."""

    def __init__(self, classifier: nn.Module, vectors: Coordinates, device: torch.device) -> None:
        """Raises ValueError that lists the parameters in which classifier and vectors differ."""
        parameters = dict(classifier.named_parameters())
        _check_shapes(parameters, vectors.parameters)
        mask = None if vectors.mask is None else vectors.mask.load().tensors()
        self._flat = FlatParameters(parameters, mask)
        self._device = device
        self._base = self._flat.gather()
        self._flags = [(p, p.requires_grad) for p in parameters.values()]
        classifier.requires_grad_(False)
        for entries in self._flat.entries:
            entries.parameter.requires_grad_(True)

    def set(self, direction: Tensor) -> None:
        """Set the parameters to theta_0 + direction (count,).

        The values are computed from a copy of theta_0, so that they do not drift.
        """
        self._flat.scatter(self._base + direction)

    def gradient(self, loss: Tensor) -> Tensor:
        """Gradient (count,) of the loss."""
        parameters = [entries.parameter for entries in self._flat.entries]
        gradients = list(
            torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        )
        out = torch.empty(self._flat.count, device=self._device)
        for entries, part in zip(self._flat.entries, self._flat.split(out), strict=True):
            entries.gather(gradients.pop(0), part)  # pop: the gradient is freed
        return out

    def restore(self) -> None:
        """Set the parameters back to theta_0, and `requires_grad` to what it was before."""
        self._flat.scatter(self._base)
        for parameter, requires_grad in self._flags:
            parameter.requires_grad_(requires_grad)


def _check_shapes(parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that lists the names whose shapes differ, or that only one of them has."""
    wrong = []
    for name in sorted(parameters.keys() | shapes.keys()):
        in_both = name in parameters and name in shapes
        if not in_both or tuple(parameters[name].shape) != tuple(shapes[name]):
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"the vectors are not of this classifier: the shapes of {', '.join(wrong)} differ"
        )


class _Span:
    """The F vectors in blocks. They are held in memory, or read again each time, which gives the
    same numbers.
    """

    def __init__(self, vectors: Coordinates, scales: Tensor, device: torch.device) -> None:
        """Raises ValueError for scales that are not one finite number for each vector."""
        count = len(vectors.read_all(0, min(1, vectors.count)))
        if scales.shape != (count,) or not bool(scales.isfinite().all()):
            raise ValueError(
                f"scales must be {count} finite numbers, one for each vector, not {scales.tolist()}"
            )
        self._vectors, self._device = vectors, device
        self._count, self._columns = count, block_columns(count)
        is_small = 4 * count * vectors.count <= COMBINED_BYTES
        self._held = list(self._read()) if is_small else None

    def _read(self) -> Iterator[tuple[int, Tensor]]:
        """Consecutive (start, rows (F, n) float32), 64 MB each."""
        for start in range(0, self._vectors.count, self._columns):
            width = min(self._columns, self._vectors.count - start)
            yield start, self._vectors.read_all(start, width).to(self._device)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        return self._read() if self._held is None else iter(self._held)

    def direction(self, coefficients: Tensor) -> Tensor:
        """S c (count,) float32 on the device, c (F,) float64."""
        out = torch.zeros(self._vectors.count, device=self._device)
        factors = coefficients.to(self._device, torch.float32)
        if coefficients.any():
            for start, rows in self._blocks():
                out[start : start + rows.shape[1]] = factors @ rows
        return out

    def products(self, gradient: Tensor) -> Tensor:
        """S' g (F,) float64 on the CPU, g (count,) float32; accumulated in float64."""
        total = torch.zeros(self._count, device=self._device, dtype=torch.float64)
        for start, rows in self._blocks():
            part = gradient[start : start + rows.shape[1]].double()
            # One row at a time, so that only one vector's block is copied to float64.
            total += torch.stack([row.double() @ part for row in rows])
        return total.cpu()
