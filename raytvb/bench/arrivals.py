"""Benchmark of the incremental Gram matrix: what an arrival costs when many vectors are there
already.
"""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any

import torch

from raytvb.bases.builder import BasisBuilder
from raytvb.bench.measure import CPU, machine, resident_bytes, versions
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_key, vector_prefix
from raytvb.experiment.parsing import parse_experiment
from raytvb.storage import records
from raytvb.storage.gram_files import gram_matrix
from raytvb.storage.store import Store
from raytvb.storage.vectors import vector_bytes, vector_info


def _experiment(folder: str, tasks: int, cache: str) -> Experiment:
    names = [{"name": f"t{i:05d}", "data": "none"} for i in range(tasks)]
    return parse_experiment(
        {
            "store": folder,
            "tasks": names,
            "model": {"name": "ViT-B-32"},
            "talos": {"density": 1.0},
            "basis": {"method": "svd"},
            "resources": {"cache": cache},
        }
    )


def bench_arrivals(
    tasks: int = 1000,
    values: int = 47_700,
    *,
    cache: str = "memory",
    threads: int = 1,
    folder: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds of each of `tasks` arrivals of vectors with `values` kept entries, one call each, the
    state saved.

    The reference is what a Gram matrix that is made anew at every arrival would cost, from the time
    of one for all: n² products for n vectors, and all of them read. `growth` is how the time of an
    arrival grows from half of the vectors to all (2: linearly).
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-", dir=folder) as place:
        experiment, store = _experiment(place, tasks, cache), Store(place)
        for task in experiment.tasks:
            data = vector_bytes(
                {"w": torch.randn(values, generator=generator)}, vector_info("random")
            )
            records.commit(
                store, vector_prefix(task.name), identity={}, files={"vector.safetensors": data}
            )
        builder, times, memory = BasisBuilder(experiment), list[float](), list[int]()
        before = resident_bytes()
        for name in experiment.task_names:
            started = time.perf_counter()
            status = builder.add([name])
            times.append(time.perf_counter() - started)
            memory.append(resident_bytes() - before)
        started = time.perf_counter()
        gram = gram_matrix([store.path(vector_key(t)) for t in experiment.task_names])
        whole = time.perf_counter() - started
    window = max(1, tasks // 20)
    marks = sorted({max(1, round(tasks * f)) for f in (0.1, 0.25, 0.5, 0.75, 1.0)})
    at = {n: median(times[max(0, n - window) : n]) for n in marks}
    anew = sum(whole * (n / tasks) for n in range(1, tasks + 1))
    return {
        "benchmark": "arrivals",
        "tasks": tasks,
        "values": values,
        "cache": status["cache"],
        "reference": {
            "algorithm": "the Gram matrix made anew at every arrival, at the time of reading alone",
            "seconds": anew,
            "vectors_read": tasks * (tasks + 1) // 2,
        },
        "ours": {
            "algorithm": "one row an arrival, against a cache of blocks",
            "seconds": sum(times),
            "vectors_read": tasks,
            "seconds_an_arrival": {str(n): s for n, s in at.items()},
            "growth": at[marks[-1]] / at[max(1, round(tasks / 2))],
            "cache_bytes": status["cache_bytes"],
            "memory_bytes": {str(n): memory[n - 1] for n in marks},
            "largest_difference": float(
                (builder.gram() - gram).abs().max() / gram.diagonal().mean()
            ),
        },
        "ratio": anew / sum(times),
        "machine": machine(CPU, threads),
        "versions": versions(),
    }
