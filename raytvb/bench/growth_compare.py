"""Compares a store that grew with what it was, and with one that had all tasks from the start."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from raytvb.bases.builder import BasisBuilder
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE
from raytvb.experiment.stored import existing_basis
from raytvb.report.timings import read_timings
from raytvb.storage import records
from raytvb.storage.contract import Contract
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store

KEPT = (BASE, "masks", "vectors")
"""Folders with all that bases are made of. A file in them stays as it is when tasks are added."""


class Identical(Contract):
    """Whether the bits are the same as before, and as if all tasks had been there from the start.

    The bases are compared with those that are made of a copy of all vectors in an empty store.
    """

    vectors: bool
    """Of the earlier tasks."""
    gram: bool
    """The rows and columns of the earlier tasks."""
    base: bool
    mask: bool
    offline: bool
    online: bool

    @property
    def is_all(self) -> bool:
        """Whether all of it is the same."""
        return all(same for _, same in self)


@dataclass(frozen=True)
class Contents:
    """What a store has, as far as an addition must not change it."""

    files: dict[str, str]
    """Checksums of the files in the folders that are kept, by key."""
    gram: GramState
    stages: dict[str, float]
    """Seconds of each stage, summed over all runs."""

    @classmethod
    def of(cls, experiment: Experiment) -> Contents:
        """What the store of an experiment has now."""
        store = Store(experiment.store)
        files = {}
        for folder in KEPT:
            for key in store.keys(folder):
                files[key] = hashlib.sha256(store.read(key)).hexdigest()
        return cls(files, GramState.read(store), read_timings(store))

    def vector_records(self) -> dict[str, str]:
        """Checksums of the records of the vectors, by key."""
        ending, found = f"/{records.RECORD}", {}
        for key, checksum in self.files.items():
            if key.startswith("vectors/") and key.endswith(ending):
                found[key] = checksum
        return found

    def keeps(self, before: Contents, folder: str) -> bool:
        """Whether every file that the folder had before has the same bytes."""
        keys = [key for key in before.files if key.startswith(f"{folder}/")]
        return bool(keys) and all(self.files.get(key) == before.files[key] for key in keys)


def identical(experiment: Experiment, folder: Path, before: Contents, after: Contents) -> Identical:
    """Compare the store with what it was, and with one that is made at once in an empty folder.

    before: what the store had without the last task of the experiment. after: what it has now.
    """
    fresh = _made_at_once(experiment, folder)
    return Identical(
        vectors=after.keeps(before, "vectors"),
        gram=torch.equal(before.gram.gram, after.gram.ordered(before.gram.tasks)),
        base=after.keeps(before, BASE),
        mask=after.keeps(before, "masks"),
        offline=_same_bases(experiment, fresh, online=False),
        online=_same_bases(experiment, fresh, online=True),
    )


def _made_at_once(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment with a new store that has copies of all vectors, and bases made of them."""
    for name in KEPT:
        shutil.copytree(Path(experiment.store) / name, folder / name)
    fresh = experiment.model_copy(update={"store": str(folder)})
    builder = BasisBuilder(fresh)
    builder.add(fresh.task_names)
    builder.write_bases()
    return fresh


def _same_bases(one: Experiment, other: Experiment, *, online: bool) -> bool:
    """Whether B, W and the vectors of all bases of a kind have the same bits in two stores."""
    for spec in basis_specs(one):
        if spec.online == online:
            versions = [existing_basis(Store(each.store), spec.name) for each in (one, other)]
            left, right = (
                [*version.coefficients(), *(block for _, block in version.vectors().blocks())]
                for version in versions
            )
            if not all(torch.equal(a, b) for a, b in zip(left, right, strict=True)):
                return False
    return True
