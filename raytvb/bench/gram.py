"""Benchmark of the Gram matrix from files: ours beside loading everything, in one process, on the
same files.
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
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from raytvb.bench.measure import CPU, Peak, machine, versions
from raytvb.maths.gram import BLOCK
from raytvb.storage.gram_files import gram_matrix
from raytvb.storage.vector_set import block_columns
from raytvb.storage.vectors import vector_bytes, vector_info

_TENSOR = 768 * 3072  # values; most of a ViT-B lies in tensors of this size


PUBLISHED_ROWS = 2_000_000


def published_gram(paths: Sequence[str]) -> Tensor:
    """G (T, T) float32 by the algorithm of the authors' code: every vector in memory, then products
    of chunks of at most two million coordinates that are stacked to (rows, T)."""
    # Copies, as that code's loading leaves them in memory: safetensors would only map the files.
    vectors = [{name: tensor.clone() for name, tensor in load_file(path).items()} for path in paths]
    gram = torch.zeros(len(paths), len(paths))
    for name in vectors[0]:
        for start in range(0, vectors[0][name].numel(), PUBLISHED_ROWS):
            rows = torch.stack(
                [v[name].flatten()[start : start + PUBLISHED_ROWS] for v in vectors], dim=1
            ).float()
            gram += rows.T @ rows
    return gram


def write_vectors(
    folder: Path, tasks: int, parameters: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[str]:
    """Random vector files with a common part; their paths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [_TENSOR] * (parameters // _TENSOR) + (
        [parameters % _TENSOR] if parameters % _TENSOR else []
    )
    paths = []
    for task in range(tasks):
        values = {
            f"w{i:04d}": torch.randn(n, generator=generator).mul_(1e-3).add_(2e-4).to(dtype)
            for i, n in enumerate(sizes)
        }
        path = folder / f"{task:04d}" / "vector.safetensors"
        path.parent.mkdir()
        path.write_bytes(vector_bytes(values, vector_info("random")))
        paths.append(str(path))
    return paths


def bare_products(tasks: int, parameters: int) -> float:
    """Seconds of the products alone, on one block that is read from nowhere."""
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
    """Most memory that ours takes above an interpreter with torch loaded, bytes: in a process that
    did nothing else.

    None where the system (another than Linux) does not tell.
    """
    run = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(list(paths)),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


def _timed(paths: Sequence[str], repeats: int) -> tuple[Tensor, float]:
    """Ours: G, median seconds."""
    times, gram = [], torch.zeros(0)
    for _ in range(repeats):
        started = time.perf_counter()
        gram = gram_matrix(paths)
        times.append(time.perf_counter() - started)
    return gram, median(times)


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
) -> dict[str, Any]:
    """Seconds from files on a warm local disk to G, ours and the published way, and of bare
    products and bare reads.

    The files take tasks * parameters * 4 (or 2) bytes in a temporary folder below `folder`. The
    published way holds them in memory twice. `curve` adds ours alone, at other numbers of vectors
    and lengths.
    """
    torch.set_num_threads(threads)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-", dir=folder) as place:
        paths = write_vectors(Path(place), tasks, parameters, kind, seed)
        bare_reads(paths)  # warms the disk's cache
        gram, ours = _timed(paths, repeats)
        memory = _peak(paths)
        with (peak := Peak(CPU)).watch():
            started = time.perf_counter()
            reference_gram = published_gram(paths)
            reference = time.perf_counter() - started
        products = median(bare_products(tasks, parameters) for _ in range(repeats))
        reads = median(bare_reads(paths) for _ in range(repeats))
    scale = float(gram.diagonal().mean())
    found: dict[str, Any] = {
        "benchmark": "gram",
        "tasks": tasks,
        "parameters": parameters,
        "dtype": dtype,
        "reference": {
            "algorithm": "all vectors loaded, products of two million coordinates (authors' code)",
            "seconds": reference,
            "memory_bytes": peak.bytes,
        },
        "ours": {
            "algorithm": "range reads of blocks, the next one while one is multiplied",
            "seconds": ours,
            "memory_bytes": memory,
            "bytes_read": tasks * parameters * kind.itemsize,
            "flops": 2 * tasks**2 * parameters,
        },
        "ratio": reference / ours,
        "largest_difference": float((gram - reference_gram).abs().max()) / scale,
        "bare": {
            "products_s": products,
            "reads_s": reads,
            "ours_over_it": ours / (products + reads),
        },
        "machine": machine(CPU, threads),
        "versions": versions(),
    }
    return found | ({"curve": _curve(kind, folder, repeats)} if curve else {})


def _curve(dtype: torch.dtype, folder: str | None, repeats: int) -> list[dict[str, Any]]:
    """Ours for growing T at one length, and growing D at T = 20; no more than 2 GB of files at a
    time.
    """
    points = [(t, 2**17) for t in (8, 20, 50, 200, 500, 1000, 2000)]
    points += [(20, 2**n) for n in (16, 18, 20, 22, 24)]
    found = []
    for tasks, parameters in points:
        with tempfile.TemporaryDirectory(prefix="raytvb-bench-", dir=folder) as place:
            paths = write_vectors(Path(place), tasks, parameters, dtype)
            seconds, memory = _timed(paths, repeats)[1], _peak(paths)
        found.append(
            {
                "tasks": tasks,
                "parameters": parameters,
                "seconds": seconds,
                "memory_bytes": memory,
                "flops_per_s": 2 * tasks**2 * parameters / seconds,
                "bytes_per_s": tasks * parameters * dtype.itemsize / seconds,
            }
        )
    return found
