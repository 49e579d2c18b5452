"""What a store holds that no present experiment uses.

A store grows: a task that is taken out of an experiment leaves its vector behind, and a basis of
another size leaves the one before. Nothing is changed here. `raytvb gc` and `raytvb rm` delete what
is listed.

An experiment is present as long as `experiments/<name>` is in the store. If this version of raytvb
cannot read one of them, only what certainly belongs to no experiment counts as unused. Other
stores that take vectors from this one are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import basis_specs, sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import (
    BASES,
    EVALS,
    FAILED,
    ONLINE,
    OVERLAP,
    REPORT,
    SEARCH,
    mask_prefix,
)
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_experiments import (
    present_experiments,
    store_metrics,
    stored_experiment,
)
from raytvb.experiment.shared_masks import shared_mask_ids
from raytvb.storage import records
from raytvb.storage.records import RECORD, Record, file_key
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis

Records = Mapping[str, Record]
"""The records of a store, by the folders of the things."""

ORDER = (REPORT, SEARCH, EVALS, BASES, ONLINE, "prepared", OVERLAP, "vectors", "masks", "heads")
"""The order of deletion. What is made of other things comes before these."""

ALONE = (REPORT, SEARCH)
"""Things whose folder has other things, too: only the files in their records belong to them."""

_CANDIDATE = re.compile(r"full-.+|.+-m[0-9]+(-.+)?")
_RANDOM = re.compile(r"random-(?:own|lstsq)-m([0-9]+)(?:-[0-9]+)?")


@dataclass(frozen=True)
class UnusedThing:
    """A thing that no present experiment uses."""

    prefix: str
    """Its folder."""
    reason: str
    size: int
    """Bytes of all its files."""

    @property
    def alone(self) -> bool:
        """Whether its folder has other things, which are not meant."""
        return self.prefix in ALONE


@dataclass(frozen=True)
class Unused:
    """Everything that no present experiment uses, in the order in which it is to be deleted."""

    things: tuple[UnusedThing, ...]
    unclear: tuple[str, ...] = ()
    """Names of the experiments that this version of raytvb cannot read."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(thing.size for thing in self.things)

    @property
    def prefixes(self) -> frozenset[str]:
        """The folders of the things."""
        return frozenset(thing.prefix for thing in self.things)

    @property
    def tasks(self) -> list[str]:
        """The tasks whose vectors are among the things."""
        return sorted(_vector_tasks(thing.prefix for thing in self.things))

    def has(self, prefix: str) -> bool:
        """Whether a thing, or the thing that it is a part of, is among them."""
        return any(prefix == p or prefix.startswith(f"{p}/") for p in self.prefixes - {*ALONE})


@dataclass(frozen=True)
class Needs:
    """What the present experiments of a store can use."""

    experiments: Mapping[str, Experiment]
    """Those that can be read, by name."""
    unclear: Mapping[str, frozenset[str]]
    """The others, by name, and every text in them."""
    trained: frozenset[str]
    """Tasks that have a vector."""
    every: frozenset[str]
    """These tasks, the controls and the unseen tasks."""
    bases: frozenset[str]
    candidates: frozenset[str]
    """Names of the search's candidates, without the random ones."""
    sizes: frozenset[int]
    """Sizes of bases and of random subsets."""
    pairs: frozenset[str]
    """Pairs of tasks in the names of evaluations."""

    def names(self, task: str, among: Collection[str]) -> bool:
        """Whether a task is among those, or is named by an experiment that cannot be read."""
        return task in among or any(task in texts for texts in self.unclear.values())

    def users(self, task: str) -> list[str]:
        """The experiments that list a task, also as their control or as an unseen task."""
        found = []
        for name, experiment in self.experiments.items():
            if task in {*experiment.task_names, *(each.name for each in experiment.every_task)}:
                found.append(name)
        return [*found, *(name for name, texts in self.unclear.items() if task in texts)]


def needs_of(store: Store, vectors: Collection[str]) -> Needs:
    """What the present experiments need. vectors: the tasks with a vector.

    Raises UserError if the store has no experiment.
    """
    experiments, unclear = parsed_experiments(store)
    if not experiments and not unclear:
        raise UserError(
            f"{store.url} names no experiment, so nothing tells what is used: run one in it first"
        )
    forms = list(experiments.values())
    for experiment in experiments.values():
        forms.append(without_missing(experiment, vectors))  # the bases of a run without some tasks
    bases = {spec.name for experiment in forms for spec in basis_specs(experiment)}
    merges = {merge for experiment in forms for merge in experiment.search.merges}
    endings = ["", "-sum", *(f"-{merge}" for merge in merges)]
    return Needs(
        experiments=experiments,
        unclear=unclear,
        trained=frozenset(name for e in forms for name in e.task_names),
        every=frozenset(task.name for e in experiments.values() for task in e.every_task),
        bases=frozenset(bases),
        candidates=frozenset(f"{name}{end}" for name in (*bases, "full") for end in endings),
        sizes=frozenset(size for e in forms for size in sizes_of(e)),
        pairs=frozenset("+".join(map(_dashed, pair)) for e in forms for pair in e.pairs),
    )


def parsed_experiments(
    store: Store,
) -> tuple[dict[str, Experiment], dict[str, frozenset[str]]]:
    """The experiments that can be read, and every text in those that cannot, both by name."""
    last, metrics = stored_experiment(store), store_metrics(store)
    identities = dict(present_experiments(store))
    if last is not None and last not in identities.values():
        identities[metrics.name or ""] = last
    experiments, unclear = {}, {}
    for name, identity in identities.items():
        other = metrics.vectors if identity == last else None
        try:
            experiments[name] = parse_experiment({**identity, "store": store.url, "vectors": other})
        except UserError:
            unclear[name] = frozenset(_texts(identity))
    return experiments, unclear


def _texts(value: object) -> Iterable[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from _texts(each)


def without_missing(experiment: Experiment, vectors: Collection[str]) -> Experiment:
    """The experiment without the tasks that have no vector; as it is if no task has one.

    vectors: the tasks with a vector.
    """
    present = set(experiment.task_names) & set(vectors)
    untrained = {task.name for task in experiment.every_task} - set(experiment.task_names)
    return experiment.restricted(present | untrained) if present else experiment


def _dashed(task: str) -> str:
    """A task's name as in the name of a pair."""
    return task.replace("/", "-")


# What is unused -----------------------------------------------------------------------------------


def find_unused(store: Store, folders: Iterable[str] = ("",)) -> Unused:
    """Everything that no present experiment uses.

    folders: look only at the things in these, and at what they are made of in them. Raises
    UserError if the store has no experiment, and DamagedError for a damaged record.
    """
    found: dict[str, Record] = {}
    for folder in folders:
        found |= records.find_all(store, folder)
    needs = needs_of(store, _vector_tasks(found))
    reasons: dict[str, str] = {}
    for prefix in found:
        reason = _why_unused(prefix, needs)
        if reason is not None:
            reasons[prefix] = reason
    _add_made_of(reasons, found)
    _add_masks(reasons, found, store, needs)
    return _listed(store, found, reasons, needs)


def unused_of_tasks(store: Store, tasks: Collection[str]) -> Unused:
    """What belongs to tasks that no present experiment lists, and the bases made of their vectors.

    Raises as `find_unused`.
    """
    found = records.find_all(store)
    needs = needs_of(store, _vector_tasks(found))
    reasons: dict[str, str] = {}
    for prefix in found:
        whose = [task for task in _tasks_of(prefix) if task in tasks]
        whose += [task for task in tasks if _dashed(task) in _pair_of(prefix)]
        if whose:
            reasons[prefix] = f"it belongs to {whose[0]}"
    _add_made_of(reasons, found)
    return _listed(store, found, reasons, needs)


def known_tasks(store: Store) -> list[str]:
    """All tasks that have anything in the store."""
    names = {
        task for key in records.record_keys(store) for task in _tasks_of(records.prefix_of(key))
    }
    return sorted(names)


def _vector_tasks(prefixes: Iterable[str]) -> set[str]:
    """The tasks whose vectors are among some folders; a checkpoint is none."""
    vectors = [prefix for prefix in prefixes if prefix.startswith("vectors/")]
    return {p.removeprefix("vectors/") for p in vectors if not p.endswith("/checkpoint")}


def _tasks_of(prefix: str) -> list[str]:
    """The task that a thing belongs to, if it belongs to one."""
    folder, _, name = prefix.partition("/")
    if folder == "splits":
        name = name.partition("/")[2]
    elif folder == EVALS:
        kind, _, name = name.partition("/")
        if kind != "unseen" and not kind.startswith("negation-"):
            return []
    elif _is_shared(prefix) or folder not in ("vectors", "prepared", "masks", "heads", FAILED):
        return []
    return [name.removesuffix("/checkpoint")] if name else []


def _pair_of(prefix: str) -> list[str]:
    """The two tasks whose disentanglement was measured, with dashes; [] for anything else."""
    parts = prefix.split("/")
    is_pair = parts[:2] == [EVALS, "disentanglement"] and len(parts) == 4
    return parts[3].split("+") if is_pair else []


def _is_shared(prefix: str) -> bool:
    return re.fullmatch(r"masks/shared(-[0-9]+)?", prefix) is not None


def _why_unused(prefix: str, needs: Needs) -> str | None:
    """Why no present experiment can use a thing, judged by its name alone; None if one can."""
    folder, _, name = prefix.partition("/")
    if folder in ("heads", "splits", FAILED):
        return _why_not_tasks(prefix, needs, needs.every)
    if folder in ("vectors", "prepared", "masks"):
        reason = _why_not_tasks(prefix, needs, needs.trained)
        prepares = any(e.basis.prepare != "none" for e in needs.experiments.values())
        if folder == "prepared" and not prepares and not needs.unclear:
            reason = "no present experiment prepares vectors for its bases"
        return reason
    if folder == EVALS:
        reason = _why_not_tasks(prefix, needs, needs.every)
        return reason or (None if needs.unclear else _why_not_evaluated(name, needs))
    if needs.unclear:
        return None
    if folder == OVERLAP and not any(e.own_masks for e in needs.experiments.values()):
        return "in no present experiment tasks have masks of their own"
    if folder in (BASES, ONLINE) and name not in needs.bases:
        return "no present experiment has this basis"
    if folder == SEARCH and name:
        return _why_no_candidate(name.partition("/")[0], needs)
    return None


def _why_not_tasks(prefix: str, needs: Needs, among: Collection[str]) -> str | None:
    for task in _tasks_of(prefix):
        if not needs.names(task, among):
            return f"no present experiment lists {task}"
    return None


def _why_no_candidate(name: str, needs: Needs) -> str | None:
    """Why no search can have a candidate of this name; None if one can."""
    drawn = _RANDOM.fullmatch(name)
    if name in needs.candidates or (drawn and int(drawn[1]) in needs.sizes):
        return None
    return "no present experiment has this candidate" if _CANDIDATE.fullmatch(name) else None


def _why_not_evaluated(name: str, needs: Needs) -> str | None:
    """Why no present experiment can have the evaluation `name`; None if one can."""
    kind, _, rest = name.partition("/")
    if kind.startswith("negation-"):
        return _why_no_candidate(kind.removeprefix("negation-"), needs)
    if kind in ("additions", "online"):
        return _why_no_candidate(rest, needs)
    if kind == "disentanglement":
        candidate, _, pair = rest.partition("/")
        if pair and pair not in needs.pairs:
            return "no present experiment measures this pair"
        return _why_no_candidate(candidate, needs)
    return None if rest else _why_no_candidate(kind, needs)


def _add_made_of(reasons: dict[str, str], found: Records) -> None:
    """Add the bases that were made of something unused, and the choice and the report of these."""
    for prefix, record in found.items():
        if prefix.startswith(f"{BASES}/") and prefix not in reasons:
            gone = [parent for parent in record.parents if parent in reasons]
            if gone:
                reasons[prefix] = f"it was made of {gone[0]}, which is removed"
    choice = found.get(SEARCH)
    candidates = None if choice is None else choice.identity.get("candidates")
    for name in candidates if isinstance(candidates, list) else ():
        if f"{SEARCH}/{name}" in reasons or f"{BASES}/{name}" in reasons:
            reasons[SEARCH] = f"it compares {name}, which is removed"
            if REPORT in found:
                reasons[REPORT] = "it shows a choice that is removed"
            return


def _add_masks(reasons: dict[str, str], found: Records, store: Store, needs: Needs) -> None:
    """Take the masks that something was trained on out of the list, and add shared ones."""
    used = set[str]()
    for prefix, record in found.items():
        folder = prefix.partition("/")[0]
        if prefix in reasons or prefix == SEARCH:
            continue
        if folder in ("vectors", "prepared"):
            used.add(record.parents.get("mask", ""))
        elif folder == BASES:
            used.add(StoredBasis(store, prefix, record.files).layout.mask or "")
    is_shared = needs.unclear or any(e.shares_mask for e in needs.experiments.values())
    newest = [mask_prefix(mask_id) for mask_id in shared_mask_ids(store)[-1:] if is_shared]
    for prefix, record in found.items():
        if prefix.startswith("masks/"):
            if record.parents.get("mask") in used or prefix in newest:
                reasons.pop(prefix, None)
            elif _is_shared(prefix):
                reasons[prefix] = "no vector was trained on this mask"


def _listed(store: Store, found: Records, reasons: Mapping[str, str], needs: Needs) -> Unused:
    """The things with their sizes, without those that are a part of another one."""
    sizes = store.sizes()
    things = []
    for prefix in sorted(reasons, key=_rank):
        above = [p for p in _folders_above(prefix) if p in reasons and p not in ALONE]
        if not above:
            size = _size_of(prefix, found[prefix], sizes)
            things.append(UnusedThing(prefix, reasons[prefix], size))
    return Unused(tuple(things), tuple(needs.unclear))


def _rank(prefix: str) -> tuple[int, str]:
    folder = prefix.partition("/")[0]
    return (ORDER.index(folder) if folder in ORDER else len(ORDER), prefix)


def _folders_above(prefix: str) -> list[str]:
    parts = prefix.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _size_of(prefix: str, record: Record, sizes: Mapping[str, int]) -> int:
    if prefix in ALONE:
        return sum(sizes.get(file_key(prefix, name), 0) for name in (RECORD, *record.files))
    return sum(size for key, size in sizes.items() if key.startswith(f"{prefix}/"))
