"""Benchmarks: our kernels beside plainly written references of the published algorithms, in one
process.

Every result is a dict with `reference` and `ours` (seconds, bytes, counts of the work done),
`ratio` (reference divided by ours), `machine` and `versions`. Weights are random: they do not
matter to the time.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from raytvb.experiment.base import TINY_MODEL
from raytvb.experiment.training import ModelConfig
from raytvb.models.classifier import ImageClassifier
from raytvb.models.open_clip_models import load_encoder, random_tower

CPU = torch.device("cpu")


CLASSES = 50


Precision = Literal["fp32", "bf16"]


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    names = [
        line.split(":")[1].strip()
        for line in _lines("/proc/cpuinfo")
        if line.startswith("model name")
    ]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
    }
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def versions() -> dict[str, str]:
    """Of what does the arithmetic."""
    return {"python": platform.python_version()} | {
        n: version(n) for n in ("raytvb", "torch", "open_clip_torch")
    }


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
    """Largest memory above that at the start of a block, in bytes: of the GPU, or resident (None:
    not measured).
    """

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


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def random_classifier(model: str, device: torch.device) -> tuple[ImageClassifier, int]:
    """A tower with random weights (the embedded model's own) and a random head; the side of its
    images in pixels.
    """
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
