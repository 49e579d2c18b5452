"""Benchmark of sparse training: the optimizer's step by itself, and whole training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from raytvb.bench.measure import (
    Machine,
    Peak,
    Precision,
    Result,
    default_device,
    random_batch,
    random_classifier,
    seconds_of,
    versions,
    without_nulls,
)
from raytvb.maths.fisher import fisher_scores
from raytvb.maths.mask_selection import select_mask
from raytvb.maths.masked_adamw import MaskedAdamW
from raytvb.storage.contract import Contract, JsonObject

LR, WEIGHT_DECAY, CLIP_NORM = 1e-5, 0.1, 1.0


class PublishedOptimizer(Contract):
    """The authors' masked AdamW."""

    algorithm: str = "masked AdamW with dense moments and masks (authors' code)"
    step_s: float
    state_bytes: int


class OurOptimizer(Contract):
    """`MaskedAdamW`."""

    algorithm: str = (
        "fused AdamW on the kept entries, gathered in the backward pass and scattered back"
    )
    step_s: float
    gather_s: float
    """Seconds to gather the kept gradients. In training, the backward pass does that."""
    state_bytes: int


class FusedOptimizer(Contract):
    """torch's fused AdamW."""

    algorithm: str = "torch's fused AdamW on all entries"
    step_s: float
    state_bytes: int
    ours_over_it: float
    """Our seconds, with gathering, divided by those of the fused AdamW."""


class StepTime(Contract):
    """Whole training steps."""

    seconds: float
    """Median seconds of one step."""
    images_per_s: float
    memory_bytes: int | None


class WholeSteps(Contract):
    """Forward and backward pass, clipping and update. Sparse and dense steps take turns."""

    batch_size: int
    precision: Precision
    sparse_over_dense: float
    """Median ratio of the time of a sparse step to that of the dense step after it."""
    sparse: StepTime
    dense: StepTime
    matmul_peak_flops: float | None = None
    """Operations per second of a large matrix product. Measured only on a GPU."""
    share_of_peak: float | None = None
    """Operations per second of a sparse step, as a share of `matmul_peak_flops`."""

    def to_json(self) -> JsonObject:
        """The fields, without those that only a GPU has if there is none."""
        return without_nulls(super().to_json(), "matmul_peak_flops", "share_of_peak")


class FinetuneResult(Result):
    """Seconds and bytes of training a share of the parameters."""

    model: str
    density: float
    kept: int
    """Number of parameters that are trained."""
    parameters: int
    reference: PublishedOptimizer
    ours: OurOptimizer
    ratio_with_gather: float
    """Like `ratio`, but our seconds include gathering."""
    fused_dense: FusedOptimizer
    whole_step: WholeSteps


class PublishedMaskedAdamW:
    """AdamW by the algorithm of the authors' code of TaLoS.

    It keeps moments of all entries, and multiplies the update by a dense mask of floats.
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
        self._parameters = []
        for name, parameter in parameters.items():
            moments = torch.zeros_like(parameter), torch.zeros_like(parameter)
            self._parameters.append((parameter, mask[name].to(parameter), *moments))
        self._weight_decay, self._betas, self._eps, self._steps = weight_decay, betas, eps, 0

    @property
    def state_bytes(self) -> int:
        """Bytes of masks and moments."""
        total = 0
        for _, *state in self._parameters:
            total += sum(4 * tensor.numel() for tensor in state)
        return total

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters once, from their gradients."""
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


@dataclass(frozen=True)
class _Setup:
    """The model, its data, and the settings of the benchmark."""

    classifier: nn.Module
    images: Tensor
    labels: Tensor
    gradients: Mapping[str, Tensor]
    """Random gradients in the parameters' shapes, for timing the optimizers."""
    mask: Mapping[str, Tensor]
    repeats: int
    precision: Precision

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.classifier.named_parameters())

    @property
    def place(self) -> torch.device:
        return self.images.device


def bench_finetune(
    model: str = "ViT-B-32",
    *,
    density: float = 0.1,
    batch_size: int = 8,
    repeats: int = 7,
    threads: int = 1,
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> FinetuneResult:
    """Measure the optimizer step by itself, and whole training steps, sparse and dense.

    The mask keeps the parameters with the lowest sensitivity scores on a batch. In training, the
    backward pass gathers the kept gradients, so our step does not contain the gathering. It is
    timed by itself, and `ratio_with_gather` and `ours_over_it` include it. The optimizers are timed
    without clipping, the whole steps with it.
    """
    torch.set_num_threads(threads)
    place = device or default_device()
    setup = _make_setup(model, batch_size, density, repeats, precision, place)
    reference = _published(setup)
    dense_model = copy.deepcopy(setup.classifier)
    fused_s, fused_bytes = _fused(setup)
    sparse = MaskedAdamW(setup.parameters, setup.mask, lr=LR, weight_decay=WEIGHT_DECAY)
    ours = _ours(setup, sparse)
    ours_s = ours.step_s + ours.gather_s
    return FinetuneResult(
        benchmark="finetune",
        model=model,
        density=density,
        kept=int(sum(m.sum() for m in setup.mask.values())),
        parameters=sum(p.numel() for p in setup.parameters.values()),
        reference=reference,
        ours=ours,
        ratio=reference.step_s / ours.step_s,
        ratio_with_gather=reference.step_s / ours_s,
        fused_dense=FusedOptimizer(
            step_s=fused_s, state_bytes=fused_bytes, ours_over_it=ours_s / fused_s
        ),
        whole_step=_whole_steps(setup, sparse, dense_model),
        machine=Machine.this(place, threads),
        versions=versions(),
    )


def _make_setup(
    model: str,
    batch_size: int,
    density: float,
    repeats: int,
    precision: Precision,
    place: torch.device,
) -> _Setup:
    classifier, size = random_classifier(model, place)
    generator, gradients = torch.Generator().manual_seed(0), {}
    for name, parameter in classifier.named_parameters():
        gradients[name] = torch.randn(parameter.shape, generator=generator).to(place)
    images, labels = random_batch(batch_size, size, place)
    mask = select_mask(fisher_scores(classifier, images, batch_size=batch_size), density)
    return _Setup(classifier, images, labels, gradients, mask, repeats, precision)


def _nothing() -> None:
    """Do nothing with a gradient: most optimizers take no gradient before their step."""


def _timed(
    setup: _Setup, step: Callable[[], object], take: Callable[[], object] = _nothing
) -> tuple[float, float]:
    """Median seconds of a step, and of taking all gradients.

    `take` is called after each gradient is set, as in a backward pass.
    """
    step_s, take_s = [], []
    for _ in range(setup.repeats + 1):
        taking = 0.0
        for name, parameter in setup.parameters.items():
            if parameter.requires_grad:
                parameter.grad = setup.gradients[name].clone()
                taking += seconds_of(take, setup.place)
        step_s.append(seconds_of(step, setup.place))
        take_s.append(taking)
    return median(step_s[1:]), median(take_s[1:])  # the first step allocates


def _published(setup: _Setup) -> PublishedOptimizer:
    optimizer = PublishedMaskedAdamW(setup.parameters, setup.mask, weight_decay=WEIGHT_DECAY)
    seconds, _ = _timed(setup, partial(optimizer.step, LR))
    return PublishedOptimizer(step_s=seconds, state_bytes=optimizer.state_bytes)


def _fused(setup: _Setup) -> tuple[float, int]:
    """Seconds of a step of torch's fused AdamW on all parameters, and the bytes of its state."""
    optimizer = torch.optim.AdamW(
        setup.parameters.values(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
    )
    seconds, _ = _timed(setup, optimizer.step)
    state_bytes = 0
    for state in optimizer.state.values():
        state_bytes += sum(t.numel() * t.element_size() for t in state.values())
    optimizer.zero_grad()
    return seconds, state_bytes


def _ours(setup: _Setup, optimizer: MaskedAdamW) -> OurOptimizer:
    step_s, gather_s = _timed(setup, partial(optimizer.step, LR), optimizer.take_gradients)
    return OurOptimizer(step_s=step_s, gather_s=gather_s, state_bytes=optimizer.state_bytes)


def _forward_backward(setup: _Setup, model: nn.Module) -> None:
    with torch.autocast(setup.place.type, torch.bfloat16, enabled=setup.precision == "bf16"):
        logits = model(setup.images)
    nn.functional.cross_entropy(logits.float(), setup.labels).backward()


def _whole_steps(setup: _Setup, sparse: MaskedAdamW, dense_model: nn.Module) -> WholeSteps:
    """Time steps of the sparsely trained classifier and of its densely trained copy.

    The two take turns, because other work on the machine comes and goes.
    """
    dense = torch.optim.AdamW(
        dense_model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True
    )

    def dense_step() -> None:
        _forward_backward(setup, dense_model)
        nn.utils.clip_grad_norm_(dense_model.parameters(), CLIP_NORM)
        dense.step()
        dense.zero_grad()

    def sparse_step() -> None:
        _forward_backward(setup, setup.classifier)
        sparse.step(LR, CLIP_NORM)

    sparse_peak, dense_peak = Peak(setup.place), Peak(setup.place)
    sparse_s, dense_s, ratios = [], [], []
    for number in range(setup.repeats + 1):
        with sparse_peak.watch():
            one = seconds_of(sparse_step, setup.place)
        with dense_peak.watch():
            other = seconds_of(dense_step, setup.place)
        if number:  # the first steps allocate
            sparse_s.append(one)
            dense_s.append(other)
            ratios.append(one / other)
    peak, share = _share_of_peak(setup, median(sparse_s))
    return WholeSteps(
        batch_size=len(setup.images),
        precision=setup.precision,
        sparse_over_dense=median(ratios),
        sparse=_step_time(setup, sparse_s, sparse_peak),
        dense=_step_time(setup, dense_s, dense_peak),
        matmul_peak_flops=peak,
        share_of_peak=share,
    )


def _step_time(setup: _Setup, times: list[float], peak: Peak) -> StepTime:
    seconds = median(times)
    return StepTime(
        seconds=seconds, images_per_s=len(setup.images) / seconds, memory_bytes=peak.bytes
    )


def _share_of_peak(setup: _Setup, seconds: float) -> tuple[float | None, float | None]:
    """The peak operations per second of a large matrix product, and the share that a step reaches.

    seconds: of one sparse step. Both results are None on a CPU.
    """
    if setup.place.type != "cuda":
        return None, None
    peak = matmul_peak(setup.place, setup.precision)
    flops = _flops(partial(_forward_backward, setup, setup.classifier))
    return peak, flops / seconds / peak


def matmul_peak(device: torch.device, precision: Precision, side: int = 8192) -> float:
    """Operations per second of a large square matrix product.

    This is what the device reaches, which is less than its data sheet says.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * side**3 / median(seconds_of(lambda: left @ right, device) for _ in range(5))


def _flops(work: Callable[[], None]) -> float:
    """Floating point operations of the matrix products and convolutions of a piece of work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
