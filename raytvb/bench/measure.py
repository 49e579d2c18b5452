"""What all benchmarks share: results, the machine, seconds, memory and models with random weights.

A benchmark runs our implementation and a plain version of a published algorithm, on the same input
in the same process. Each file holds one benchmark: `fisher` (sensitivity scores), `finetune`
(sparse training), `basis` (the fit), `gram` (the Gram matrix from files), `arrivals` (the Gram
matrix as it grows) and `search` with `search_experiment`, `published_search` and `our_search`.

Weights are random, because the time does not depend on them.
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
from typing import Literal, TypeAlias

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from raytvb.models.classifier import ImageClassifier
from raytvb.models.open_clip_models import random_tower
from raytvb.storage.contract import Contract, JsonObject

CPU = torch.device("cpu")

CLASSES = 50
"""Number of classes of the random heads."""

Precision: TypeAlias = Literal["fp32", "bf16"]


class Machine(Contract):
    """The machine that the figures were measured on."""

    cpu: str
    """Name of the processor."""
    cores: int | None
    threads: int
    """CPU threads that each side could use."""
    system: str
    device: str
    """cpu or cuda."""
    gpu: str | None = None
    """Name of the GPU, if there is one."""

    @classmethod
    def this(cls, device: torch.device, threads: int) -> Machine:
        """The machine that this process runs on."""
        return cls(
            cpu=_processor(),
            cores=os.cpu_count(),
            threads=threads,
            system=f"{platform.system()} {platform.machine()}",
            device=device.type,
            gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        )

    def to_json(self) -> JsonObject:
        """The fields, without `gpu` if there is none."""
        return without_nulls(super().to_json(), "gpu")


class Result(Contract):
    """What every benchmark prints in addition to its own figures."""

    benchmark: str
    """Name of the benchmark."""
    ratio: float
    """The published algorithm's seconds divided by ours."""
    machine: Machine
    versions: dict[str, str]
    """Versions of the packages that do the arithmetic."""

    def to_json(self) -> JsonObject:
        """All fields in the order of the class. The fields that all results share come last."""
        fields: JsonObject = {"benchmark": self.benchmark}
        for name, value in self:
            if name not in Result.model_fields:
                fields[name] = _plain(value)
        fields["ratio"] = self.ratio
        fields["machine"] = self.machine.to_json()
        fields["versions"] = _plain(self.versions)
        return fields


def _plain(value: object) -> JsonValue:
    """The value of a field as JSON. A contract inside it is converted by its own `to_json`."""
    match value:
        case Contract():
            return value.to_json()
        case dict():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case tuple() | list():
            return [_plain(inner) for inner in value]
        case None | str() | int() | float():
            return value
    raise TypeError(f"JSON has no value for a {type(value).__name__}")


def without_nulls(fields: JsonObject, *names: str) -> JsonObject:
    """The fields, without those among `names` that are null because they do not apply."""
    kept: JsonObject = {}
    for name, value in fields.items():
        if value is not None or name not in names:
            kept[name] = value
    return kept


def versions() -> dict[str, str]:
    """Versions of the packages that do the arithmetic."""
    packages = {"python": platform.python_version()}
    for name in ("raytvb", "torch", "open_clip_torch"):
        packages[name] = version(name)
    return packages


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def _lines(path: str) -> list[str]:
    """Lines of a file in Linux's /proc. Empty on other systems."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def resident_bytes() -> int:
    """Memory that this process holds, in bytes; 0 on systems that do not tell."""
    fields = _lines("/proc/self/statm")
    return int(fields[0].split()[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


class Peak:
    """The peak memory of a block of code, above the memory that was held at its start.

    On a GPU, this is the GPU memory. On a CPU, it is the memory of the process, sampled 20 times a
    second.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes: int | None = None
        """The peak; None until it is measured."""
        self._device = device

    @contextmanager
    def watch(self) -> Iterator[Peak]:
        """Measure a block."""
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


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` CPU threads in a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a piece of work, including all kernels that it started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def default_device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_classifier(model: str, device: torch.device) -> tuple[ImageClassifier, int]:
    """An image tower with random weights (the embedded model keeps its own) and a random head.

    model: an open_clip architecture, or the embedded model. Returns the classifier and the side of
    its images in pixels.
    """
    torch.manual_seed(0)
    visual, size = _tower(model)
    with torch.no_grad():
        features = visual.eval()(torch.zeros(1, 3, size, size))
    width = (features[0] if isinstance(features, tuple) else features).shape[1]
    head = 10 * nn.functional.normalize(torch.randn(CLASSES, width), dim=-1)
    return ImageClassifier(visual, head).eval().to(device), size


def _tower(model: str) -> tuple[nn.Module, int]:
    from raytvb.experiment.fields import TINY_MODEL
    from raytvb.experiment.sections.model import ModelConfig
    from raytvb.models.open_clip_models import load_encoder

    if model != TINY_MODEL:
        return random_tower(model)
    encoder = load_encoder(ModelConfig())
    visual = encoder.model.visual
    assert isinstance(visual, nn.Module)
    return visual, encoder.preprocess.size


def random_batch(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size) of noise and their labels (N,), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator).to(device)
    labels = torch.randint(CLASSES, (count,), generator=generator).to(device)
    return images, labels
