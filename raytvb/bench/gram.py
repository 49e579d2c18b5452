"""Benchmark of the Gram matrix from files. Compares our way, which reads blocks, with loading all
files, on the same files in one process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file
from torch import Tensor

from raytvb.bench.measure import CPU, Machine, Peak, Result, versions, without_nulls
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.contract import Contract, JsonObject
from raytvb.storage.gram_files import gram_matrix
from raytvb.storage.vector_set import block_columns
from raytvb.storage.vectors import vector_bytes, vector_info

TENSOR = 768 * 3072
"""Values in each tensor of the files. Most values of a ViT-B lie in tensors of this size."""

PUBLISHED_ROWS = 2_000_000
"""How many coordinates the authors' code multiplies at a time."""

CURVE = (
    *((tasks, 2**17) for tasks in (8, 20, 50, 200, 500, 1000, 2000)),
    *((20, 2**power) for power in (16, 18, 20, 22, 24)),
)
"""Numbers of vectors and of parameters at which our way is timed alone; at most 2 GB of files."""


class AllLoaded(Contract):
    """The authors' way: load all vectors, then multiply."""

    algorithm: str = "all vectors loaded, products of two million coordinates (authors' code)"
    seconds: float
    memory_bytes: int | None


class InBlocks(Contract):
    """Our way, `gram_matrix`: read and multiply blocks."""

    algorithm: str = "range reads of blocks, the next one while one is multiplied"
    seconds: float
    memory_bytes: int | None
    bytes_read: int
    flops: int


class Bare(Contract):
    """The least that any way must take."""

    products_s: float
    """Seconds of the products alone, on a block that is in memory already."""
    reads_s: float
    """Seconds of reading all bytes into one buffer."""
    ours_over_it: float
    """Our seconds divided by the sum of `products_s` and `reads_s`."""


class CurvePoint(Contract):
    """Our way alone, at one number of vectors and one number of parameters."""

    tasks: int
    parameters: int
    seconds: float
    memory_bytes: int | None
    flops_per_s: float
    bytes_per_s: float


class GramResult(Result):
    """Seconds and memory to compute the Gram matrix of vector files."""

    tasks: int
    parameters: int
    dtype: str
    reference: AllLoaded
    ours: InBlocks
    largest_difference: float
    """Largest difference between both matrices, over the mean squared norm."""
    bare: Bare
    curve: tuple[CurvePoint, ...] | None = None

    def to_json(self) -> JsonObject:
        """The fields, without `curve` if the request had none."""
        return without_nulls(super().to_json(), "curve")


def bench_gram(
    tasks: int = 20,
    parameters: int = 87_849_216,
    *,
    dtype: str = "fp32",
    folder: str | None = None,
    repeats: int = 3,
    threads: int = 1,
    curve: bool = False,
    seed: int = 0,
) -> GramResult:
    """Time our way and the published way from files in the disk's cache to G.

    Also times the products and the reads alone. The files take tasks * parameters * 4 bytes (2 for
    bf16) in a temporary folder below `folder`. The published way holds them in memory twice. curve:
    also time our way alone, at the numbers of CURVE.
    """
    torch.set_num_threads(threads)
    values = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-", dir=folder) as place:
        paths = write_vectors(Path(place), tasks, parameters, values, seed)
        bare_reads(paths)  # warms the disk's cache
        gram, ours = _in_blocks(paths, repeats, parameters, values)
        published, reference = _all_loaded(paths)
        bare = _bare(paths, parameters, repeats, ours.seconds)
    difference = (gram - published).abs().max() / gram.diagonal().mean()
    return GramResult(
        benchmark="gram",
        tasks=tasks,
        parameters=parameters,
        dtype=dtype,
        reference=reference,
        ours=ours,
        ratio=reference.seconds / ours.seconds,
        largest_difference=float(difference),
        bare=bare,
        curve=_curve(values, folder, repeats) if curve else None,
        machine=Machine.this(CPU, threads),
        versions=versions(),
    )


def write_vectors(
    folder: Path, tasks: int, parameters: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[str]:
    """Write files of random vectors that have a common mean. Returns their paths."""
    generator, info = torch.Generator().manual_seed(seed), vector_info("random")
    sizes = [TENSOR] * (parameters // TENSOR)
    if parameters % TENSOR:
        sizes.append(parameters % TENSOR)
    paths = []
    for task in range(tasks):
        values = {}
        for number, size in enumerate(sizes):
            noise = torch.randn(size, generator=generator)
            values[f"w{number:04d}"] = noise.mul_(1e-3).add_(2e-4).to(dtype)
        path = folder / f"{task:04d}" / "vector.safetensors"
        path.parent.mkdir()
        path.write_bytes(vector_bytes(values, info))
        paths.append(str(path))
    return paths


def published_gram(paths: Sequence[str]) -> Tensor:
    """G (T, T) float32 by the algorithm of the authors' code.

    Loads every vector into memory. Then stacks chunks of at most two million coordinates to
    (rows, T), and multiplies them.
    """
    vectors = []
    for path in paths:
        # The authors' code loads copies into memory. safetensors alone would only map the files.
        vectors.append({name: tensor.clone() for name, tensor in load_file(path).items()})
    gram = torch.zeros(len(paths), len(paths))
    for name, first in vectors[0].items():
        for start in range(0, first.numel(), PUBLISHED_ROWS):
            chunk = slice(start, start + PUBLISHED_ROWS)
            rows = torch.stack([v[name].flatten()[chunk] for v in vectors], dim=1).float()
            gram += rows.T @ rows
    return gram


def bare_products(tasks: int, parameters: int) -> float:
    """Seconds of the products alone, on one block that is in memory already."""
    step = block_columns(tasks)
    rows = torch.randn(tasks, min(step, parameters))
    gram = torch.zeros(tasks, tasks, dtype=torch.float64)
    started = time.perf_counter()
    for start in range(0, parameters, step):
        for part in rows[:, : parameters - start].split(BLOCK, dim=1):
            gram += part @ part.T
    return time.perf_counter() - started


def bare_reads(paths: Sequence[str]) -> float:
    """Seconds of reading all bytes of the files into one buffer."""
    buffer = memoryview(bytearray(4 * 2**20))
    started = time.perf_counter()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


_CHILD = """
import json, sys, torch
from raytvb.storage.gram_files import gram_matrix
def peak():
    try:
        lines = open("/proc/self/status").read().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
torch.set_num_threads(1)
before = peak()
gram_matrix(json.load(sys.stdin))
print(json.dumps(None if before is None else peak() - before))
"""


def _peak(paths: Sequence[str]) -> int | None:
    """The peak memory of our way, in bytes above an interpreter that has loaded torch.

    Measured in a process that does nothing else. None on systems other than Linux, which do not
    tell their peak.
    """
    run = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(list(paths)),
        capture_output=True,
        text=True,
        check=True,
    )
    peak: int | None = json.loads(run.stdout)
    return peak


def _timed(paths: Sequence[str], repeats: int) -> tuple[Tensor, float]:
    """G by our way, and the median seconds."""
    times, gram = [], torch.zeros(0)
    for _ in range(repeats):
        started = time.perf_counter()
        gram = gram_matrix(paths)
        times.append(time.perf_counter() - started)
    return gram, median(times)


def _in_blocks(
    paths: Sequence[str], repeats: int, parameters: int, dtype: torch.dtype
) -> tuple[Tensor, InBlocks]:
    gram, seconds = _timed(paths, repeats)
    return gram, InBlocks(
        seconds=seconds,
        memory_bytes=_peak(paths),
        bytes_read=len(paths) * parameters * dtype.itemsize,
        flops=2 * len(paths) ** 2 * parameters,
    )


def _all_loaded(paths: Sequence[str]) -> tuple[Tensor, AllLoaded]:
    with Peak(CPU).watch() as peak:
        started = time.perf_counter()
        gram = published_gram(paths)
        seconds = time.perf_counter() - started
    return gram, AllLoaded(seconds=seconds, memory_bytes=peak.bytes)


def _bare(paths: Sequence[str], parameters: int, repeats: int, ours_s: float) -> Bare:
    products = median(bare_products(len(paths), parameters) for _ in range(repeats))
    reads = median(bare_reads(paths) for _ in range(repeats))
    return Bare(products_s=products, reads_s=reads, ours_over_it=ours_s / (products + reads))


def _curve(dtype: torch.dtype, folder: str | None, repeats: int) -> tuple[CurvePoint, ...]:
    """Our way for growing T at D = 2^17, and for growing D at T = 20."""
    points = []
    for tasks, parameters in CURVE:
        with tempfile.TemporaryDirectory(prefix="raytvb-bench-", dir=folder) as place:
            paths = write_vectors(Path(place), tasks, parameters, dtype)
            _, seconds = _timed(paths, repeats)
            memory = _peak(paths)
        points.append(
            CurvePoint(
                tasks=tasks,
                parameters=parameters,
                seconds=seconds,
                memory_bytes=memory,
                flops_per_s=2 * tasks**2 * parameters / seconds,
                bytes_per_s=tasks * parameters * dtype.itemsize / seconds,
            )
        )
    return tuple(points)
