"""Benchmarks: our kernels beside plainly written references of the published algorithms, in one process.

Every result is a dict with `reference` and `ours` (seconds, bytes, counts of the work done), `ratio` (reference divided
by ours), `machine` and `versions`. Weights are random: they do not matter to the time.
"""

from __future__ import annotations

import copy
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytvb.config import TINY_MODEL, ModelConfig
from raytvb.encoder import ImageClassifier, load_encoder, random_tower
from raytvb.fisher import fisher_scores
from raytvb.sparse import MaskedAdamW
from raytvb.talos import select_mask

CPU = torch.device("cpu")
CLASSES = 50
Precision = Literal["fp32", "bf16"]


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    found = {"cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": threads,
             "system": f"{platform.system()} {platform.machine()}", "device": device.type}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def versions() -> dict[str, str]:
    """Of what does the arithmetic."""
    return {"python": platform.python_version()} | {n: version(n) for n in ("raytvb", "torch", "open_clip_torch")}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def resident_bytes() -> int:
    """Memory that this process holds; 0 where that is not known."""
    fields = _lines("/proc/self/statm")  # of Linux
    return int(fields[0].split()[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


class Peak:
    """Largest memory above that at the start of a block, in bytes: of the GPU, or resident (None: not measured)."""

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        self._device = device

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        """Measure the block."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield self
            self.bytes = torch.cuda.max_memory_allocated(self._device) - before
            return
        done, before = threading.Event(), resident_bytes()

        def sample() -> None:
            while not done.wait(0.05):
                self.bytes = max(self.bytes or 0, resident_bytes() - before)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield self
        finally:
            done.set()
            sampler.join()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _classifier(model: str, device: torch.device) -> tuple[ImageClassifier, int]:
    """A tower with random weights (the embedded model's own) and a random head; the side of its images in pixels."""
    torch.manual_seed(0)
    if model == TINY_MODEL:
        encoder = load_encoder(ModelConfig())
        clip: Any = encoder.model
        visual, size = clip.visual, encoder.preprocess.size
    else:
        visual, size = random_tower(model)
    with torch.no_grad():
        found = visual.eval()(torch.zeros(1, 3, size, size))
        width = (found[0] if isinstance(found, tuple) else found).shape[1]
    head = 10 * nn.functional.normalize(torch.randn(CLASSES, width), dim=-1)
    return ImageClassifier(visual, head).eval().to(device), size


def published_scores(classifier: nn.Module, images: Tensor, labels: Tensor, scored: int) -> dict[str, Tensor]:
    """Diagonal Fisher information by the algorithm of the authors' code of TaLoS, summed over the first images.

    One forward pass of the batch; then for each of `scored` images a backward pass through the graph of the whole
    batch, whose squared gradients are copied to the host and added there.
    """
    parameters = dict(classifier.named_parameters())
    scores = {n: torch.zeros(p.shape) for n, p in parameters.items()}
    log_p = classifier(images).log_softmax(dim=1).gather(1, labels[:, None])
    for n in range(scored):
        classifier.zero_grad()
        log_p[n].backward(retain_graph=True)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                scores[name] += parameter.grad.square().to("cpu", copy=True)
    classifier.zero_grad()
    return scores


def bench_fisher(model: str = "ViT-B-32", *, batch_size: int = 32, batches: int = 4, scored: int = 4, threads: int = 1,
                 device: torch.device | None = None, precision: Precision = "fp32") -> dict[str, Any]:
    """Seconds an image of `fisher_scores` on some batches, of the published loop on one, of a batch-1 loop.

    The loops are timed on the first `scored` images only, as each takes the same time.
    """
    torch.set_num_threads(threads)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, size = _classifier(model, place)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(place)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(place)
    scored = min(scored, batch_size)
    score = partial(fisher_scores, classifier, batch_size=batch_size, precision=precision)
    score(images)  # the first call takes memory from the system
    with Peak(place).watch() as ours_memory:
        ours = _seconds(partial(score, torch.cat([images] * batches)), place)
    published_scores(classifier, images, labels, 1)
    forward = median(_seconds(lambda: published_scores(classifier, images, labels, 0), place) for _ in range(3))
    with Peak(place).watch() as published_memory:
        published = _seconds(lambda: published_scores(classifier, images, labels, scored), place)

    def loop() -> None:
        for n in range(scored):
            published_scores(classifier, images[n:n + 1], labels[n:n + 1], 1)

    one_by_one = median(_seconds(loop, place) for _ in range(3)) / scored
    reference, mine = max(published - forward, 0.0) / scored + forward / batch_size, ours / (batches * batch_size)
    return {
        "benchmark": "fisher", "model": model, "batch_size": batch_size, "precision": precision,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "reference": {"algorithm": "one backward pass an image through the graph of its batch (authors' code)",
                      "seconds_per_image": reference, "images_timed": scored, "memory_bytes": published_memory.bytes},
        "ours": {"algorithm": "one forward and one backward pass a batch", "seconds_per_image": mine,
                 "images_timed": batches * batch_size, "memory_bytes": ours_memory.bytes, "images_per_s": 1 / mine},
        "ratio": reference / mine,
        "loop": {"algorithm": "forward and backward pass of one image at a time", "seconds_per_image": one_by_one,
                 "images_timed": scored, "ratio": one_by_one / mine},
        "machine": machine(place, threads), "versions": versions()}


class PublishedMaskedAdamW:
    """AdamW by the algorithm of the authors' code of TaLoS: moments of all entries, a dense float mask on the steps."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor], *, weight_decay: float,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self._parameters = [(p, mask[n].to(p), torch.zeros_like(p), torch.zeros_like(p)) for n, p in parameters.items()]
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
            rate = mask * lr / (1 - one ** self._steps)
            deviation = (square.sqrt() / (1 - two ** self._steps) ** 0.5).add_(self._eps)
            parameter.add_(-1 * rate * (mean / deviation))


def matmul_peak(device: torch.device, precision: Precision, side: int = 8192) -> float:
    """Operations a second of a large square matrix product: what the device reaches, not what its data sheet says."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * side ** 3 / median(_seconds(lambda: left @ right, device) for _ in range(5))


def _whole_steps(classifier: nn.Module, sparse: MaskedAdamW, plain: nn.Module, images: Tensor, labels: Tensor,
                 repeats: int, precision: Precision) -> dict[str, Any]:
    """Forward, backward, clipping and update of the sparsely trained classifier and of its densely trained copy."""
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
    for _ in range(repeats + 1):  # in turns, as the machine is not always equally quiet; the first ones allocate
        for name, step in steps.items():
            with peaks[name].watch():
                times[name].append(_seconds(step, place))
    seconds = {name: median(t[1:]) for name, t in times.items()}
    pairs = zip(times["sparse"][1:], times["dense"][1:], strict=True)
    found: dict[str, Any] = {"batch_size": len(images), "precision": precision,
                             "sparse_over_dense": median(sparse_s / dense_s for sparse_s, dense_s in pairs)}
    found |= {name: {"seconds": s, "images_per_s": len(images) / s, "memory_bytes": peaks[name].bytes}
              for name, s in seconds.items()}
    if place.type == "cuda":
        peak = matmul_peak(place, precision)
        found |= {"matmul_peak_flops": peak,
                  "share_of_peak": _flops(partial(forward_backward, classifier)) / seconds["sparse"] / peak}
    return found


def bench_finetune(model: str = "ViT-B-32", *, density: float = 0.1, batch_size: int = 8, repeats: int = 7,
                   threads: int = 1, device: torch.device | None = None,
                   precision: Precision = "fp32") -> dict[str, Any]:
    """Seconds and bytes of the optimizer step alone, and seconds of a whole training step, sparse and dense.

    The mask is that of the lowest sensitivity scores on a batch. Our step finds the kept gradients gathered, which the
    backward pass does; that is timed by itself, and `ratio_with_gather` and `ours_over_it` count it. The optimizers are
    timed without clipping; the whole steps have it, in turns.
    """
    torch.set_num_threads(threads)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, size = _classifier(model, place)
    parameters = dict(classifier.named_parameters())
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(p.shape, generator=generator).to(place) for n, p in parameters.items()}
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(place)
    mask = select_mask(fisher_scores(classifier, images, batch_size=batch_size), density)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(place)

    def timed(step: Callable[[], object], take: Callable[[], object] = lambda: None) -> tuple[float, float]:
        """Seconds of a step, and of taking each gradient as soon as it is there, as in a backward pass."""
        times = []
        for _ in range(repeats + 1):  # the first one allocates
            taken = 0.0
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    parameter.grad = gradients[name].clone()
                    taken += _seconds(take, place)
            times.append((_seconds(step, place), taken))
        step_s, take_s = zip(*times[1:], strict=True)
        return median(step_s), median(take_s)

    published = PublishedMaskedAdamW(parameters, mask, weight_decay=0.1)
    published_s, published_bytes = timed(partial(published.step, 1e-5))[0], published.state_bytes
    del published
    plain = copy.deepcopy(classifier)
    fused = torch.optim.AdamW(parameters.values(), lr=1e-5, weight_decay=0.1, fused=True)
    fused_s = timed(fused.step)[0]
    fused_bytes = sum(t.numel() * t.element_size() for s in fused.state.values() for t in s.values())
    fused.zero_grad()
    del fused
    sparse = MaskedAdamW(parameters, mask, lr=1e-5, weight_decay=0.1)
    ours_s, taken_s = timed(partial(sparse.step, 1e-5), sparse.take_gradients)
    ours_bytes = sparse.state_bytes
    whole_step = _whole_steps(classifier, sparse, plain, images, labels, repeats, precision)
    return {
        "benchmark": "finetune", "model": model, "density": density, "kept": int(sum(m.sum() for m in mask.values())),
        "parameters": sum(p.numel() for p in parameters.values()),
        "reference": {"algorithm": "masked AdamW with dense moments and masks (authors' code)", "step_s": published_s,
                      "state_bytes": published_bytes},
        "ours": {"algorithm": "fused AdamW on the kept entries, gathered in the backward pass and scattered back",
                 "step_s": ours_s, "gather_s": taken_s, "state_bytes": ours_bytes},
        "ratio": published_s / ours_s, "ratio_with_gather": published_s / (ours_s + taken_s),
        "fused_dense": {"algorithm": "torch's fused AdamW on all entries", "step_s": fused_s,
                        "state_bytes": fused_bytes, "ours_over_it": (ours_s + taken_s) / fused_s},
        "whole_step": whole_step, "machine": machine(place, threads), "versions": versions()}


def _flops(work: Callable[[], None]) -> float:
    """Floating point operations of the matrix products and convolutions of a piece of work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
