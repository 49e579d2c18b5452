"""Benchmarks: our kernels beside plainly written references of the published algorithms, in one process.

Every result is a dict with `reference` and `ours` (seconds, bytes, counts of the work done), `ratio` (reference divided
by ours), `machine` and `versions`. Weights are random: they do not matter to the time. Times are the best of several.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raytvb.config import TINY_MODEL, ModelConfig
from raytvb.encoder import ImageClassifier, load_encoder, random_tower
from raytvb.fisher import fisher_scores
from raytvb.sparse import MaskedAdamW
from raytvb.talos import select_mask

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


class Peak:
    """Largest memory above that at the start of a block, in bytes: of the GPU, or resident (0 where not known)."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device

    def _resident(self) -> int:
        fields = _lines("/proc/self/statm")
        return int(fields[0].split()[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        """Measure the block."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield self
            self.bytes = torch.cuda.max_memory_allocated(self._device) - before
            return
        done, before = threading.Event(), self._resident()

        def sample() -> None:
            while not done.wait(0.005):
                self.bytes = max(self.bytes, self._resident() - before)

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
        visual, size = encoder.model.visual, encoder.preprocess.size
    else:
        visual, size = random_tower(model)
    with torch.no_grad():
        width = visual.eval()(torch.zeros(1, 3, size, size)).shape[1]
    head = 10 * nn.functional.normalize(torch.randn(CLASSES, width), dim=-1)
    return ImageClassifier(visual, head).eval().to(device), size  # type: ignore[arg-type]


def published_scores(classifier: nn.Module, images: Tensor, labels: Tensor, scored: int) -> dict[str, Tensor]:
    """Diagonal Fisher information as in the authors' code of TaLoS, summed over the first `scored` images.

    One forward pass of the batch; then for each image a backward pass through the graph of the whole batch, whose
    gradients are copied to the host, squared and added.
    """
    parameters = dict(classifier.named_parameters())
    scores = {n: torch.zeros(p.shape) for n, p in parameters.items()}
    log_p = classifier(images).log_softmax(dim=1).gather(1, labels[:, None])[:, 0]
    for n in range(scored):
        gradients = torch.autograd.grad(log_p[n], list(parameters.values()), retain_graph=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            scores[name] += gradient.cpu().square()
    return scores


def bench_fisher(model: str = "ViT-B-32", *, batch_size: int = 32, scored: int = 4, threads: int = 1,
                 device: torch.device | None = None, precision: Precision = "fp32") -> dict[str, Any]:
    """Seconds an image of `fisher_scores` on one batch, of the published loop on the same batch, of a batch-1 loop.

    The loops are timed on the first `scored` images only, as each takes the same time.
    """
    torch.set_num_threads(threads)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, size = _classifier(model, place)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(place)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(place)
    scored = min(scored, batch_size)
    fisher_scores(classifier, images[:2], batch_size=2, precision=precision)  # the first call allocates
    with Peak(place).watch() as ours_memory:
        ours = min(_seconds(lambda: fisher_scores(classifier, images, batch_size=batch_size, precision=precision), place)
                   for _ in range(2))
    published_scores(classifier, images[:1], labels[:1], 1)
    forward = _seconds(lambda: published_scores(classifier, images, labels, 0), place)
    with Peak(place).watch() as published_memory:
        published = _seconds(lambda: published_scores(classifier, images, labels, scored), place)

    def loop() -> None:
        for n in range(scored):
            published_scores(classifier, images[n:n + 1], labels[n:n + 1], 1)

    one_by_one = _seconds(loop, place) / scored
    reference = max(published - forward, 0.0) / scored + forward / batch_size
    return {
        "benchmark": "fisher", "model": model, "batch_size": batch_size, "precision": precision,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "reference": {"algorithm": "one backward pass an image through the graph of its batch (authors' code)",
                      "seconds_per_image": reference, "images_timed": scored, "memory_bytes": published_memory.bytes},
        "ours": {"algorithm": "one forward and one backward pass a batch", "seconds_per_image": ours / batch_size,
                 "images_timed": batch_size, "memory_bytes": ours_memory.bytes, "images_per_s": batch_size / ours},
        "ratio": reference / (ours / batch_size),
        "loop": {"algorithm": "forward and backward pass of one image at a time", "seconds_per_image": one_by_one,
                 "images_timed": scored, "ratio": one_by_one / (ours / batch_size)},
        "machine": machine(place, threads), "versions": versions()}


class PublishedMaskedAdamW:
    """AdamW as in the authors' code of TaLoS: dense moments and a dense float mask that gradients and steps pass."""

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
            assert parameter.grad is not None
            gradient = parameter.grad * mask
            parameter.mul_(1 - lr * self._weight_decay * mask)
            mean.mul_(one).add_(gradient, alpha=1 - one)
            square.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            deviation = (square.sqrt() / (1 - two ** self._steps) ** 0.5).add_(self._eps)
            parameter.sub_(lr / (1 - one ** self._steps) * mask * mean / deviation)


def matmul_peak(device: torch.device, precision: Precision, side: int = 8192) -> float:
    """Floating point operations a second of a large square matrix product: what the device reaches, not its data sheet."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    left @ right
    return 2 * side ** 3 / min(_seconds(lambda: left @ right, device) for _ in range(5))


def bench_finetune(model: str = "ViT-B-32", *, density: float = 0.1, batch_size: int = 8, repeats: int = 5,
                   threads: int = 1, device: torch.device | None = None, precision: Precision = "fp32") -> dict[str, Any]:
    """Seconds and bytes of the optimizer step alone, and of a whole training step, sparse and dense.

    Ours counts collecting the kept gradients, which in training happens within the backward pass. The optimizers are
    timed without clipping; the whole steps have it.
    """
    torch.set_num_threads(threads)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, size = _classifier(model, place)
    parameters = dict(classifier.named_parameters())
    generator = torch.Generator().manual_seed(0)
    mask = select_mask({n: torch.rand(p.shape, generator=generator) for n, p in parameters.items()}, density)
    gradients = {n: torch.randn(p.shape, generator=generator).to(place) for n, p in parameters.items()}
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(place)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(place)

    def best(step: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 1):  # the first one allocates
            for name, parameter in parameters.items():
                parameter.grad = gradients[name].clone() if parameter.requires_grad else None
            times.append(_seconds(step, place))
        return min(times[1:])

    def forward_backward() -> None:
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = classifier(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()

    published = PublishedMaskedAdamW(parameters, mask, weight_decay=0.1)
    published_s = best(lambda: published.step(1e-5))
    published_bytes = published.state_bytes
    del published
    dense = torch.optim.AdamW(parameters.values(), lr=1e-5, weight_decay=0.1, fused=True)
    dense_s = best(dense.step)
    dense_bytes = sum(t.numel() * t.element_size() for s in dense.state.values() for t in s.values())

    def dense_step() -> None:
        forward_backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        dense.step()
        dense.zero_grad()

    def sparse_step() -> None:
        forward_backward()
        sparse.step(1e-5, 1.0)

    def whole(step: Callable[[], None]) -> dict[str, Any]:
        step()
        with Peak(place).watch() as memory:
            times = [_seconds(step, place) for _ in range(repeats)]
        return {"seconds": min(times), "images_per_s": batch_size / min(times), "memory_bytes": memory.bytes}

    dense.zero_grad()
    dense_whole = whole(dense_step)
    flops = _flops(forward_backward) if place.type == "cuda" else 0.0
    dense.zero_grad()
    sparse = MaskedAdamW(parameters, mask, lr=1e-5, weight_decay=0.1)

    def sparse_update() -> None:
        sparse.take_gradients()
        sparse.step(1e-5)

    ours_s = best(sparse_update)
    sparse_whole = whole(sparse_step)
    # Once more the other way round, so that neither has the quieter machine.
    sparse.close()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    again = whole(dense_step)
    dense_whole = min(dense_whole, again, key=lambda w: w["seconds"])
    whole_step = {"batch_size": batch_size, "precision": precision, "sparse": sparse_whole, "dense": dense_whole,
                  "sparse_over_dense": sparse_whole["seconds"] / dense_whole["seconds"]}
    if flops:
        peak = matmul_peak(place, precision)
        whole_step |= {"matmul_peak_flops": peak, "share_of_peak": flops / sparse_whole["seconds"] / peak}
    return {
        "benchmark": "finetune", "model": model, "density": density, "kept": int(sum(m.sum() for m in mask.values())),
        "parameters": sum(p.numel() for p in parameters.values()),
        "reference": {"algorithm": "masked AdamW with dense moments and masks (authors' code)", "step_s": published_s,
                      "state_bytes": published_bytes},
        "ours": {"algorithm": "fused AdamW on the kept entries, gathered and scattered", "step_s": ours_s,
                 "state_bytes": sparse.state_bytes},
        "ratio": published_s / ours_s,
        "fused_dense": {"algorithm": "torch's fused AdamW on all entries", "step_s": dense_s, "state_bytes": dense_bytes,
                        "ours_over_it": ours_s / dense_s},
        "whole_step": whole_step, "machine": machine(place, threads), "versions": versions()}


def _flops(work: Callable[[], None]) -> float:
    """Floating point operations of the matrix products and convolutions of a piece of work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
