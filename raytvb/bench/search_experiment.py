"""The experiment whose bases the search benchmark uses, and its files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import yaml

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import BasisSpec
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, EXPERIMENT, basis_prefix, vector_prefix
from raytvb.experiment.parsing import parse_experiment
from raytvb.search.candidates import Candidate
from raytvb.storage import records
from raytvb.storage.mirror import Mirror
from raytvb.storage.records import Record
from raytvb.storage.store import Store
from raytvb.suite.task_names import task_names

TASKS, DENSITY = 16, 0.1
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Default sizes of the bases, as shares of the number of tasks."""

Objective: TypeAlias = Literal["all", "subsets"]

Subsets: TypeAlias = Mapping[int, Sequence[tuple[int, ...]]]
"""Which tasks are added together (by their positions), by the number of tasks."""


def basis_sizes(count: int, sizes: Sequence[int] = ()) -> list[int]:
    """The sizes in rising order; default: T/8, T/4, 3T/8, T/2 and 3T/4, rounded.

    Raises ValueError for a size that is not below the number of tasks.
    """
    if count < 2:
        raise ValueError("a basis is smaller than the number of tasks: give two tasks or more")
    if not sizes:
        sizes = [min(count - 1, max(1, round(count * share))) for share in SHARES]
    for size in sizes:
        if not 1 <= size < count:
            raise ValueError(
                f"basis size must be from 1 to {count - 1} for {count} tasks, got {size}"
            )
    return sorted(set(sizes))


def suite_experiment(
    store: str, tasks: int, method: str, sizes: Sequence[int], objective: Objective, density: float
) -> Experiment:
    """The first tasks of the embedded suite, fine-tuned as in the quickstart."""
    fields = {
        "name": "bench-search",
        "store": store,
        "tasks": list(task_names()[:tasks]),
        "talos": {"density": density},
        "finetune": {"epochs": 7.5, "batch_size": 64},
        "basis": {"method": [method]},
        "search": {"sizes": basis_sizes(tasks, sizes), "objective": objective},
    }
    return parse_experiment(fields, "bench search")


def stored_experiment(
    store: Store, method: str, sizes: Sequence[int], objective: Objective
) -> Experiment:
    """The experiment of a store, with the search of the benchmark.

    Raises UserError that names everything that the search needs and the store lacks.
    """
    if not store.exists(EXPERIMENT):
        raise UserError(f"{store.url} holds no experiment yet")
    stored = yaml.safe_load(store.read(EXPERIMENT))
    fields = {
        **stored,
        "store": store.url,
        "basis": {**stored["basis"], "method": [method]},
        "search": {"sizes": basis_sizes(len(stored["tasks"]), sizes), "objective": objective},
    }
    experiment = parse_experiment(fields, store.where(EXPERIMENT))
    missing = _missing(store, experiment)
    if missing:
        bases = sorted({key.split("/")[1] for key in store.keys("basis")})
        raise UserError(
            f"{store.url} lacks {', '.join(missing)} (its bases: {', '.join(bases) or 'none'}): "
            f"choose among those with --method and --size, or make what is missing with "
            f"`raytvb basis`"
        )
    return experiment


def _missing(store: Store, experiment: Experiment) -> list[str]:
    """What the search needs and the store has no record of."""
    needed = [BASE]
    for task in experiment.task_names:
        needed.append(vector_prefix(task))
    for candidate in basis_candidates(experiment):
        needed.append(basis_prefix(candidate.name))
    return [prefix for prefix in needed if records.find(store, prefix) is None]


SETUP = """
import sys
from raytvb import load_experiment, run
run(load_experiment(sys.argv[1]), ("finetune", "basis"))
"""


def make_bases(experiment: Experiment, folder: Path) -> None:
    """Make the vectors and bases in a separate process, so that no Ray runs while something else is
    timed. The output of that process goes to standard error.
    """
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")), encoding="utf-8")
    environment = dict(os.environ)
    environment.pop("RAY_ADDRESS", None)  # another machine would not see the folder
    command = [sys.executable, "-c", SETUP, str(file)]
    if subprocess.run(command, stdout=2, env=environment, check=False).returncode:
        raise UserError("the vectors and bases could not be made: the reason is above")


def basis_candidates(experiment: Experiment) -> list[Candidate]:
    """The bases to choose among. Unlike a run, the benchmark does not add the size T/2 itself."""
    (method,) = experiment.basis.method
    candidates = []
    for size in experiment.search.sizes:
        candidates.append(Candidate.decoded(BasisSpec(method, size)))
    return candidates


def record_of(experiment: Experiment, prefix: str) -> Record:
    """A record that the store is known to have."""
    record = records.find(Store(experiment.store), prefix)
    assert record is not None
    return record


def fetched_base(copies: Mirror, experiment: Experiment) -> str:
    """The folder of the pretrained model, copied to this machine."""
    for name in record_of(experiment, BASE).files:
        copies.fetch(f"{BASE}/{name}")
    return copies.local.path(BASE)
