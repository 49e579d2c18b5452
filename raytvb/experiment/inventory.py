"""What a store must hold, judged by what it holds: a thing whose parts or parents are gone.

A store is filled step by step, so a thing that is not there may just not have been made. But a
basis shows that its task vectors were there, and a report that the evaluations were. This module
draws such conclusions from the records, and names what is missing.

A store grows, so not everything in it belongs to one experiment. A vector may lie in another store,
a shared mask may have taken the place of another one, and a vector may be about to be replaced.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping

from raytvb.experiment.identities import vector_settings
from raytvb.experiment.layout import (
    BASE,
    OVERLAP,
    REPORT,
    SEARCH,
    basis_prefix,
    head_prefix,
    online_prefix,
    search_prefix,
)
from raytvb.storage.gram_rows import PREFIX as GRAM
from raytvb.storage.records import RECORD, Record, file_key
from raytvb.storage.store import Store
from raytvb.storage.verify import (
    MISSING,
    ORPHANED,
    Findings,
    Problem,
    record_keys_of,
    unclaimed,
    verify_records,
)

_SHARED = re.compile(r"masks/shared(-[0-9]+)?")

ONLINE = "-online"
"""How the name of an online basis ends."""

Records = Mapping[str, Record]
"""The records of a store, by the folders of the things."""


def verify_store(store: Store) -> Findings:
    """Check every file of a store, and that nothing is missing. Reads the store as a whole."""
    sizes = store.sizes()
    findings, found = verify_records(store, record_keys_of(sizes), sizes)
    findings.add(unclaimed(store, sizes))
    findings.problems += missing_things(found, sizes) + outlived(found)
    return findings


def missing_things(found: Records, keys: Container[str]) -> list[Problem]:
    """The things that must have been in the store, and have no record now.

    keys: of all files of the store. A record that is there and cannot be read is not missing.
    """
    problems: dict[str, Problem] = {}
    for prefix, reason in _expected(found):
        key = file_key(prefix, RECORD)
        if prefix not in found and prefix not in problems and key not in keys:
            problems[prefix] = Problem(key, MISSING, f"{reason}; the next run makes it anew")
    return list(problems.values())


def outlived(found: Records) -> list[Problem]:
    """The files of checkpoints whose fine-tune has ended: a worker was killed before it removed
    them.
    """
    problems = []
    for prefix, record in found.items():
        vector, _, last = prefix.rpartition("/")
        if last == "checkpoint" and vector in found:
            if _is_of_next(record, found[vector]):
                continue
            for name in (RECORD, *record.files):
                reason = f"the fine-tune of {vector} has ended"
                problems.append(Problem(file_key(prefix, name), ORPHANED, reason))
    return problems


def _is_of_next(checkpoint: Record, vector: Record) -> bool:
    """Whether a checkpoint is not of the fine-tune that made the vector, but of one that replaces
    it.
    """
    identity = dict(checkpoint.identity)
    mask = identity.pop("mask", None)
    if mask is not None and mask != vector.parents.get("mask"):
        return True
    return vector_settings(identity) != vector_settings(vector.identity)


def _is_elsewhere(parent: str) -> bool:
    """Whether a parent is named by its place in another store."""
    return "://" in parent or parent.startswith("/")


def _expected(found: Records) -> Iterator[tuple[str, str]]:
    """Folders that must have a record, each with the reason."""
    if BASE in found or any(prefix.startswith("vectors/") for prefix in found):
        yield BASE, "the pretrained model is a part of every store"
        if BASE in found and found[BASE].format > 1:
            yield "", "the store's own record says which experiment it belongs to"
    borrows = "" in found and found[""].metrics.get("vectors") is not None
    for prefix, record in found.items():
        folder, _, name = prefix.partition("/")
        if folder in ("basis", REPORT):
            for parent in record.parents:
                if not _is_elsewhere(parent):
                    yield parent, f"{prefix} was made of it"
        if folder == "vectors" and not name.endswith("/checkpoint"):
            yield from _of_vector(prefix, name, record, found)
        if folder == "prepared" and not borrows:
            yield f"vectors/{name}", f"{prefix} was made of it"
        if folder == "basis":
            yield GRAM, f"{prefix} was made of the Gram matrix"
            if name.endswith(ONLINE):
                yield online_prefix(name), f"{prefix} was written from its state"
        if prefix == GRAM and not borrows:
            for task in record.parents:
                yield f"vectors/{task}", "the Gram matrix has its inner products"
    if GRAM in found and _have_own_masks(found):
        yield OVERLAP, "the tasks have masks of their own"
    if SEARCH in found:
        yield from _of_search(found)
    if REPORT in found:
        yield SEARCH, "the report shows its choice"


def _have_own_masks(found: Records) -> bool:
    """Whether tasks of the experiment that ran last have masks of their own, and not just one."""
    own = [p for p in found if p.startswith("masks/") and not _SHARED.fullmatch(p)]
    talos = found[""].identity.get("talos") if "" in found else None
    return len(own) > 1 and not (isinstance(talos, dict) and talos.get("mask") == "shared")


def _of_vector(prefix: str, task: str, record: Record, found: Records) -> Iterator[tuple[str, str]]:
    if "head" in record.parents:
        yield head_prefix(task), f"{prefix} was trained with it"
    fingerprint = record.parents.get("mask")
    if fingerprint is None:
        return
    for name, mask in found.items():
        if name.startswith("masks/") and mask.parents.get("mask") == fingerprint:
            return
    own = record.identity.get("talos")
    shared = isinstance(own, dict) and own.get("mask") == "shared"
    yield ("masks/shared" if shared else f"masks/{task}"), f"{prefix} was trained with this mask"


def _of_search(found: Records) -> Iterator[tuple[str, str]]:
    """The candidates of the search, their rounds, and the bases among them."""
    candidates = found[SEARCH].identity.get("candidates")
    bases = _names_of_bases(found)
    for name in candidates if isinstance(candidates, list) else ():
        prefix = search_prefix(str(name))
        yield prefix, "it is a candidate of the search"
        if str(name) in bases:
            yield basis_prefix(str(name)), "it is a candidate of the search"
        outcome = found.get(prefix)
        objectives = [] if outcome is None else outcome.metrics.get("objectives")
        for number in range(1, len(objectives) + 1 if isinstance(objectives, list) else 1):
            yield f"{prefix}/round-{number}", f"{prefix} was chosen from its rounds"


def _names_of_bases(found: Records) -> set[str]:
    """Names that bases of the store's experiment can have."""
    experiment = found[""].identity if "" in found else {}
    basis, tasks = experiment.get("basis"), experiment.get("tasks")
    methods = basis.get("method") if isinstance(basis, dict) else None
    names: set[str] = set()
    for method in methods if isinstance(methods, list) else ():
        for size in range(1, len(tasks) + 1 if isinstance(tasks, list) else 1):
            names |= {f"{method}-m{size}", f"{method}-m{size}{ONLINE}"}
    return names
