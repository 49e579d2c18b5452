"""Benchmark of the search over basis sizes and coefficients. Compares our search with the published
one on the same bases.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. Both searches run in one process
without Ray. Both choose by the mean accuracy over tasks on the validation split, and then measure
their choice once on the test split. One evaluation measures the accuracy of one coefficient for
additions of one number of tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from raytvb.bench.measure import Machine, Result, torch_threads, versions
from raytvb.bench.our_search import our_search
from raytvb.bench.published_search import published_search
from raytvb.bench.search_experiment import (
    DENSITY,
    TASKS,
    Objective,
    basis_candidates,
    fetched_base,
    make_bases,
    stored_experiment,
    suite_experiment,
)
from raytvb.bench.search_outcome import SearchOutcome
from raytvb.data.load_split import load_split
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import basis_prefix
from raytvb.maths.basis_registry import BASIS_METHODS
from raytvb.maths.subsets import task_subsets
from raytvb.models.evaluator import BATCH
from raytvb.models.open_clip_models import load_folder
from raytvb.models.worker_process import device
from raytvb.storage.mirror import Mirror
from raytvb.storage.store import Store


class SearchResult(Result):
    """Processor seconds, images and accuracy of two searches over the same bases."""

    tasks: int
    sizes: tuple[int, ...]
    """Numbers of basis vectors to choose among."""
    method: str
    """Basis method."""
    objective: str
    density: float
    reference: SearchOutcome
    ours: SearchOutcome
    images_ratio: float
    """Images of the published search divided by ours."""
    accuracy_gap: float
    """Test accuracy of the published search minus ours."""


def bench_search(
    tasks: int | None = None,
    sizes: Sequence[int] = (),
    *,
    method: str = "ae",
    objective: Objective = "all",
    density: float | None = None,
    store: str | None = None,
    threads: int = 1,
) -> SearchResult:
    """Seconds, images and accuracy of both searches over bases of one basis method.

    Args:
        tasks: how many tasks of the embedded suite to use (default: 16). A Ray on this machine
            fine-tunes them in a temporary folder, which is not timed.
        sizes: numbers of basis vectors; default: T/8, T/4, 3T/8, T/2 and 3T/4.
        method: basis method.
        objective: `all` is the accuracy after all tasks are added; `subsets` is the mean over
            subsets of tasks (see `task_subsets`), with a coefficient for each number of tasks.
        density: share of the parameters that is fine-tuned (default: 0.1).
        store: store of an experiment whose bases are searched. `tasks` and `density` must then be
            None, for they are those of the store.

    Raises UserError if the store lacks something.
    """
    BASIS_METHODS.lookup(method)  # an unknown basis method raises before any work
    if store is not None:
        if tasks is not None or density is not None:
            raise UserError(
                "the tasks and the density are those of the store: leave out --tasks and --density"
            )
        return _compared(stored_experiment(Store(store), method, sizes, objective), threads)
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-") as folder:
        experiment = suite_experiment(
            f"{folder}/store",
            TASKS if tasks is None else tasks,
            method,
            sizes,
            objective,
            DENSITY if density is None else density,
        )
        make_bases(experiment, Path(folder))
        return _compared(experiment, threads)


def _compared(experiment: Experiment, threads: int) -> SearchResult:
    """Run both searches, one after the other."""
    count, objective = len(experiment.tasks), experiment.search.objective
    subsets = task_subsets(count, experiment.seed)
    if objective == "all":
        subsets = {count: subsets[count]}
    with torch_threads(threads):
        _warm_up(experiment)
        reference = published_search(experiment, subsets)
        ours = our_search(experiment, subsets)
    return SearchResult(
        benchmark="search",
        tasks=count,
        sizes=experiment.search.sizes,
        method=experiment.basis.method[0],
        objective=objective,
        density=experiment.talos.density,
        reference=reference,
        ours=ours,
        ratio=reference.seconds / ours.seconds,
        images_ratio=reference.images / ours.images,
        accuracy_gap=reference.test_accuracy - ours.test_accuracy,
        machine=Machine.this(device(), threads),
        versions=versions(),
    )


@torch.inference_mode()
def _warm_up(experiment: Experiment) -> None:
    """Do what costs time only once, so that neither search pays for it.

    Draws the images of the suite, imports libraries, and brings all files into the disk's cache.
    """
    copies = Mirror(Store(experiment.store))
    encoder = load_folder(fetched_base(copies, experiment))
    for task in experiment.tasks:
        for name in ("val", "test"):
            split = load_split(task, name, encoder.preprocess)
    images = split.images[:BATCH].to(device())
    encoder.visual.to(device())(encoder.preprocess.normalise(images))
    for candidate in basis_candidates(experiment):
        for _ in copies.basis(basis_prefix(candidate.name)).blocks():
            pass
