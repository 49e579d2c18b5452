"""Benchmark of the optimizer and of whole training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from raytvb.bench.measure import (
    CLASSES,
    Peak,
    Precision,
    machine,
    random_classifier,
    seconds_of,
    versions,
)
from raytvb.maths.fisher import fisher_scores
from raytvb.maths.mask_selection import select_mask
from raytvb.maths.masked_adamw import MaskedAdamW


class PublishedMaskedAdamW:
    """AdamW by the algorithm of the authors' code of TaLoS: moments of all entries, a dense float
    mask on the steps.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mask: Mapping[str, Tensor],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._parameters = [
            (p, mask[n].to(p), torch.zeros_like(p), torch.zeros_like(p))
            for n, p in parameters.items()
        ]
        self._weight_decay, self._betas, self._eps, self._steps = weight_decay, betas, eps, 0

    @property
    def state_bytes(self) -> int:
        """Masks and moments."""
        return sum(4 * (m.numel() + a.numel() + b.numel()) for _, m, a, b in self._parameters)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' gradients."""
        self._steps += 1
        one, two = self._betas
        for parameter, mask, mean, square in self._parameters:
            gradient = parameter.grad
            assert gradient is not None
            parameter.mul_(1 - mask * lr * self._weight_decay)
            mean.mul_(one).add_(gradient, alpha=1 - one)
            square.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            rate = mask * lr / (1 - one**self._steps)
            deviation = (square.sqrt() / (1 - two**self._steps) ** 0.5).add_(self._eps)
            parameter.add_(-1 * rate * (mean / deviation))


def matmul_peak(device: torch.device, precision: Precision, side: int = 8192) -> float:
    """Operations a second of a large square matrix product: what the device reaches, not what its
    data sheet says.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * side**3 / median(seconds_of(lambda: left @ right, device) for _ in range(5))


def _whole_steps(
    classifier: nn.Module,
    sparse: MaskedAdamW,
    plain: nn.Module,
    images: Tensor,
    labels: Tensor,
    repeats: int,
    precision: Precision,
) -> dict[str, Any]:
    """Forward, backward, clipping and update of the sparsely trained classifier and of its densely
    trained copy.
    """
    place = images.device
    dense = torch.optim.AdamW(plain.parameters(), lr=1e-5, weight_decay=0.1, fused=True)

    def forward_backward(tuned: nn.Module) -> None:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = tuned(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()

    def dense_step() -> None:
        forward_backward(plain)
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        dense.step()
        dense.zero_grad()

    def sparse_step() -> None:
        forward_backward(classifier)
        sparse.step(1e-5, 1.0)

    steps = {"sparse": sparse_step, "dense": dense_step}
    peaks = {name: Peak(place) for name in steps}
    times = dict[str, list[float]]({name: [] for name in steps})
    for _ in range(
        repeats + 1
    ):  # in turns, as the machine is not always equally quiet; the first ones allocate
        for name, step in steps.items():
            with peaks[name].watch():
                times[name].append(seconds_of(step, place))
    seconds = {name: median(t[1:]) for name, t in times.items()}
    pairs = zip(times["sparse"][1:], times["dense"][1:], strict=True)
    found: dict[str, Any] = {
        "batch_size": len(images),
        "precision": precision,
        "sparse_over_dense": median(sparse_s / dense_s for sparse_s, dense_s in pairs),
    }
    found |= {
        name: {"seconds": s, "images_per_s": len(images) / s, "memory_bytes": peaks[name].bytes}
        for name, s in seconds.items()
    }
    if place.type == "cuda":
        peak = matmul_peak(place, precision)
        found |= {
            "matmul_peak_flops": peak,
            "share_of_peak": _flops(partial(forward_backward, classifier))
            / seconds["sparse"]
            / peak,
        }
    return found


def bench_finetune(
    model: str = "ViT-B-32",
    *,
    density: float = 0.1,
    batch_size: int = 8,
    repeats: int = 7,
    threads: int = 1,
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Seconds and bytes of the optimizer step alone, and seconds of a whole training step, sparse
    and dense.

    The mask is that of the lowest sensitivity scores on a batch. Our step finds the kept gradients
    gathered, which the backward pass does; that is timed by itself, and `ratio_with_gather` and
    `ours_over_it` count it. The optimizers are timed without clipping; the whole steps have it, in
    turns.
    """
    torch.set_num_threads(threads)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, size = random_classifier(model, place)
    parameters = dict(classifier.named_parameters())
    generator = torch.Generator().manual_seed(0)
    gradients = {
        n: torch.randn(p.shape, generator=generator).to(place) for n, p in parameters.items()
    }
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(place)
    mask = select_mask(fisher_scores(classifier, images, batch_size=batch_size), density)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(place)

    def timed(
        step: Callable[[], object], take: Callable[[], object] = lambda: None
    ) -> tuple[float, float]:
        """Seconds of a step, and of taking each gradient as soon as it is there, as in a backward
        pass.
        """
        times = []
        for _ in range(repeats + 1):  # the first one allocates
            taken = 0.0
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    parameter.grad = gradients[name].clone()
                    taken += seconds_of(take, place)
            times.append((seconds_of(step, place), taken))
        step_s, take_s = zip(*times[1:], strict=True)
        return median(step_s), median(take_s)

    published = PublishedMaskedAdamW(parameters, mask, weight_decay=0.1)
    published_s, published_bytes = timed(partial(published.step, 1e-5))[0], published.state_bytes
    del published
    plain = copy.deepcopy(classifier)
    fused = torch.optim.AdamW(parameters.values(), lr=1e-5, weight_decay=0.1, fused=True)
    fused_s = timed(fused.step)[0]
    fused_bytes = sum(
        t.numel() * t.element_size() for s in fused.state.values() for t in s.values()
    )
    fused.zero_grad()
    del fused
    sparse = MaskedAdamW(parameters, mask, lr=1e-5, weight_decay=0.1)
    ours_s, taken_s = timed(partial(sparse.step, 1e-5), sparse.take_gradients)
    ours_bytes = sparse.state_bytes
    whole_step = _whole_steps(classifier, sparse, plain, images, labels, repeats, precision)
    return {
        "benchmark": "finetune",
        "model": model,
        "density": density,
        "kept": int(sum(m.sum() for m in mask.values())),
        "parameters": sum(p.numel() for p in parameters.values()),
        "reference": {
            "algorithm": "masked AdamW with dense moments and masks (authors' code)",
            "step_s": published_s,
            "state_bytes": published_bytes,
        },
        "ours": {
            "algorithm": "fused AdamW on the kept entries, gathered in the backward pass and scattered back",
            "step_s": ours_s,
            "gather_s": taken_s,
            "state_bytes": ours_bytes,
        },
        "ratio": published_s / ours_s,
        "ratio_with_gather": published_s / (ours_s + taken_s),
        "fused_dense": {
            "algorithm": "torch's fused AdamW on all entries",
            "step_s": fused_s,
            "state_bytes": fused_bytes,
            "ours_over_it": (ours_s + taken_s) / fused_s,
        },
        "whole_step": whole_step,
        "machine": machine(place, threads),
        "versions": versions(),
    }


def _flops(work: Callable[[], None]) -> float:
    """Floating point operations of the matrix products and convolutions of a piece of work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
