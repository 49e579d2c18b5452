"""Benchmark of the growing Gram matrix: what one more vector costs when many have been added."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from raytvb.bases.builder import BasisBuilder
from raytvb.bench.measure import CPU, Machine, Result, resident_bytes, versions
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.parsing import parse_experiment
from raytvb.storage import records
from raytvb.storage.contract import Contract
from raytvb.storage.gram_files import gram_matrix
from raytvb.storage.store import Store
from raytvb.storage.vectors import VECTOR, vector_bytes, vector_info

MARKS = (0.1, 0.25, 0.5, 0.75, 1.0)
"""Shares of all arrivals after which the result gives times and memory."""


class MadeAnew(Contract):
    """The cost of making the whole Gram matrix again at every arrival.

    The cost is estimated from the time of one Gram matrix of all T vectors. In favour of this
    reference, its time grows only as its reads do: n vectors at the n-th arrival.
    """

    algorithm: str = "the Gram matrix made anew at every arrival, at the time of reading alone"
    seconds: float
    vectors_read: int


class Grown(Contract):
    """`BasisBuilder.add`, called once for each vector. Every call saves the builder's state."""

    algorithm: str = "one row an arrival, against a cache of blocks"
    seconds: float
    """Seconds of all arrivals together."""
    vectors_read: int
    seconds_an_arrival: dict[int, float]
    """Seconds of one arrival, by the number of vectors that have arrived."""
    growth: float
    """Time of an arrival after all vectors, divided by that after half of them; 2 means linear."""
    cache_bytes: int
    memory_bytes: dict[int, int]
    """Memory above that at the start, by the number of vectors that have arrived."""
    largest_difference: float
    """Largest difference from the Gram matrix of all files, over the mean squared norm."""


class ArrivalsResult(Result):
    """Seconds and memory of vectors that arrive one by one."""

    tasks: int
    values: int
    cache: str
    reference: MadeAnew
    ours: Grown


@dataclass
class _Measured:
    """Seconds and memory after each arrival."""

    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def bench_arrivals(
    tasks: int = 1000,
    values: int = 47_700,
    *,
    cache: str = "memory",
    threads: int = 1,
    folder: str | None = None,
    seed: int = 0,
) -> ArrivalsResult:
    """Measure `tasks` arrivals of vectors with `values` kept entries each.

    cache: memory or disk, where the builder keeps the vectors. folder: where the vector files are
    written; default: the system's temporary folder.
    """
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-", dir=folder) as place:
        experiment = _experiment(place, tasks, cache)
        _write_vectors(experiment, values, seed)
        builder = BasisBuilder(experiment)
        measured = _add_all(builder, experiment.task_names)
        gram, whole_s = _gram_of_all(experiment)
        grown = _grown(builder, measured, gram)
    anew = whole_s * (tasks + 1) / 2  # the n-th of T arrivals takes n / T of whole_s
    return ArrivalsResult(
        benchmark="arrivals",
        tasks=tasks,
        values=values,
        cache=builder.status().cache.kind,
        reference=MadeAnew(seconds=anew, vectors_read=tasks * (tasks + 1) // 2),
        ours=grown,
        ratio=anew / grown.seconds,
        machine=Machine.this(CPU, threads),
        versions=versions(),
    )


def _experiment(folder: str, tasks: int, cache: str) -> Experiment:
    names = [{"name": f"t{number:05d}", "data": "none"} for number in range(tasks)]
    fields = {
        "store": folder,
        "tasks": names,
        "model": {"name": "ViT-B-32"},
        "talos": {"density": 1.0},
        "basis": {"method": "svd"},
        "resources": {"cache": cache},
    }
    return parse_experiment(fields)


def _write_vectors(experiment: Experiment, values: int, seed: int) -> None:
    """Commit a random vector for every task."""
    generator, store = torch.Generator().manual_seed(seed), Store(experiment.store)
    info = vector_info("random")
    for task in experiment.task_names:
        data = vector_bytes({"w": torch.randn(values, generator=generator)}, info)
        files = {VECTOR: data}
        records.commit(store, vector_prefix(task), identity={}, files=files)


def _add_all(builder: BasisBuilder, tasks: Sequence[str]) -> _Measured:
    """Add the vectors one by one."""
    measured, before = _Measured(), resident_bytes()
    for task in tasks:
        started = time.perf_counter()
        builder.add([task])
        measured.seconds.append(time.perf_counter() - started)
        measured.memory.append(resident_bytes() - before)
    return measured


def _gram_of_all(experiment: Experiment) -> tuple[Tensor, float]:
    """The Gram matrix of all files, and the seconds to compute it."""
    store = Store(experiment.store)
    paths = [store.path(f"{vector_prefix(task)}/{VECTOR}") for task in experiment.task_names]
    started = time.perf_counter()
    gram = gram_matrix(paths)
    return gram, time.perf_counter() - started


def _grown(builder: BasisBuilder, measured: _Measured, gram: Tensor) -> Grown:
    tasks = len(measured.seconds)
    window = max(1, tasks // 20)  # the time of an arrival is the median of the last few
    seconds, memory = {}, {}
    for mark in MARKS:
        count = max(1, round(tasks * mark))
        seconds[count] = median(measured.seconds[max(0, count - window) : count])
        memory[count] = measured.memory[count - 1]
    difference = (builder.gram() - gram).abs().max() / gram.diagonal().mean()
    return Grown(
        seconds=sum(measured.seconds),
        vectors_read=tasks,
        seconds_an_arrival=seconds,
        growth=seconds[tasks] / seconds[max(1, round(tasks / 2))],
        cache_bytes=builder.status().cache.bytes,
        memory_bytes=memory,
        largest_difference=float(difference),
    )
