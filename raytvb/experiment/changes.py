"""What a run would make, keep and make again, judged by what the store holds.

Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from raytvb.errors import listed
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import vector_identity, vector_settings
from raytvb.experiment.present_versions import present_versions
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.shared_masks import (
    SharedMask,
    find_shared_mask,
    in_force,
    mask_changes,
)
from raytvb.experiment.vector_states import VectorState, borrowed_error, vector_states
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store

NAMED = 8
"""A line names at most this many tasks or bases."""

DETAILED = 20
"""For at most this many tasks, what differs is shown."""


@dataclass(frozen=True)
class Changes:
    """What a run of an experiment would do to the vectors and bases of its store."""

    states: dict[str, VectorState]
    """The tasks, by name."""
    mask: SharedMask | None
    """The mask in force that all tasks share; None if they share none, or it is not made yet."""
    makes_mask: bool
    """Whether a shared mask is made."""
    renews: bool
    """Whether the mask in force is made anew, and with it all vectors."""
    renamed: dict[str, str]
    """Tasks without a vector, each with a stored task that the experiment does not list, and that
    has the same data and settings."""
    unused: tuple[str, ...]
    """Tasks with a vector in the store that the experiment does not list."""
    bases: dict[str, bool]
    """The bases, by name, and whether each is there as it would be made."""
    own: Store

    @property
    def new(self) -> list[str]:
        """The tasks that have no vector yet."""
        return [name for name, state in self.states.items() if state.vector is None]

    @property
    def kept(self) -> list[str]:
        """The tasks whose vector stays as it is."""
        if self.renews:
            return []
        return [name for name, state in self.states.items() if state.is_current]

    @property
    def again(self) -> list[str]:
        """The tasks whose vector is replaced by one that is made again."""
        return [
            name
            for name, state in self.states.items()
            if state.vector is not None and name not in self.kept
        ]

    @property
    def grows(self) -> bool:
        """Whether any vector is made."""
        return bool(self.new or self.again)

    def check_borrowed(self) -> None:
        """Raise UserError if a vector of another store, which is only read, has other settings."""
        for state in self.states.values():
            if state.is_outdated and state.is_borrowed(self.own):
                raise borrowed_error(state)

    def without_vectors(self) -> Changes:
        """The changes of a run that makes no vectors: only those that are there are used."""
        there = {name: state for name, state in self.states.items() if state.is_current}
        return replace(self, states=there, makes_mask=False, renews=False, renamed={})

    def lines(self) -> Iterator[str]:
        """What is kept, made and made again, one line for each kind of thing."""
        parts = []
        for count, what in ((self.kept, "kept"), (self.new, "new"), (self.again, "made again")):
            if count:
                names = "" if what == "kept" else f" ({listed(count, NAMED)})"
                parts.append(f"{len(count)} {what}{names}")
        borrowed = [n for n in self.kept if self.states[n].is_borrowed(self.own)]
        if borrowed:
            parts.append(f"{len(borrowed)} of them in another store")
        yield f"{len(self.states)} task vectors: {', '.join(parts)}"
        for name in self.again[:DETAILED] if not self.renews else ():
            yield f"made again: {name}: {'; '.join(self.states[name].differing)}"
        if self.renews and self.mask is not None:
            yield f"the shared mask {self.mask.where} is made anew, and with it all vectors"
        elif self.mask is not None:
            yield self._about_mask(self.mask)
        if self.unused:
            yield (
                f"{len(self.unused)} stored vectors are not in this experiment, and stay: "
                f"{listed(self.unused, NAMED)}"
            )
        yield from self._about_bases()

    def _about_mask(self, mask: SharedMask) -> str:
        others = [name for name in self.states if name not in mask.scored]
        text = f"shared mask kept ({mask.where})"
        if not others:
            return text
        return f"{text}; it was not scored on {listed(others, NAMED)}"

    def _about_bases(self) -> Iterator[str]:
        rest = [name for name, is_there in self.bases.items() if not is_there or self.grows]
        there = len(self.bases) - len(rest)
        parts = [f"{there} kept"] if there else []
        if rest:
            parts.append(f"{len(rest)} made ({listed(rest, NAMED)})")
        yield f"{len(self.bases)} bases: {', '.join(parts)}"

    def question(self) -> str:
        """What the user has to agree to, because stored work is replaced or a task may just have
        another name; '' if there is nothing.
        """
        reasons = []
        if self.again:
            tasks = "1 task vector" if len(self.again) == 1 else f"{len(self.again)} task vectors"
            reasons.append(
                f"{tasks} will be made again, in place of what is stored: "
                f"{listed(self.again, NAMED)}"
            )
            if not self.renews:
                for name in self.again[:DETAILED]:
                    reasons += [f"  {name}: {line}" for line in self.states[name].differing]
        for name, before in self.renamed.items():
            reasons.append(
                f"task {name} has no vector, but {before}, which the experiment does not list, has "
                f"the same data and settings: if it was renamed, call it {before} again; otherwise "
                f"{name} is fine-tuned as another task"
            )
        return "\n".join(reasons)


def changes_of(experiment: Experiment, *, renew_mask: bool = False) -> Changes:
    """What a run would do. renew_mask: whether the shared mask is to be made anew.

    Raises UserError if the shared mask was made with other settings, unless it is made anew.
    """
    own = Store(experiment.store)
    mask = _mask(own, experiment, renew_mask)
    states = vector_states(experiment, mask)
    is_unfinished = any(s.is_outdated and _is_of_older_mask(s) for s in states.values())
    differs = mask is not None and bool(mask_changes(mask, experiment))
    renews = renew_mask and mask is not None and (differs or not is_unfinished)
    found = records.find_all(own, "vectors")
    unused = _unused(experiment, found)
    identities = {name: found[f"vectors/{name}"].identity for name in unused}
    bases = {} if renews else present_versions(experiment).bases
    return Changes(
        states=states,
        mask=mask,
        makes_mask=experiment.shares_mask and (mask is None or renews),
        renews=renews,
        renamed=_renamed(experiment, states, identities),
        unused=tuple(unused),
        bases={spec.name: spec.name in bases for spec in basis_specs(experiment)},
        own=own,
    )


def _mask(own: Store, experiment: Experiment, renew_mask: bool) -> SharedMask | None:
    if not experiment.shares_mask:
        return None
    return in_force(own, experiment) if renew_mask else find_shared_mask(own, experiment)


def _is_of_older_mask(state: VectorState) -> bool:
    """Whether nothing but the mask is different: a renewal of the mask has not ended."""
    return len(state.differing) == 1 and state.differing[0].startswith("mask: ")


def _unused(experiment: Experiment, found: dict[str, records.Record]) -> list[str]:
    """The tasks with a vector in the store that an experiment does not list."""
    names = set(experiment.task_names)
    unused = []
    for prefix in found:
        task = prefix.removeprefix("vectors/")
        if task not in names and not task.endswith("/checkpoint"):
            unused.append(task)
    return unused


def _renamed(
    experiment: Experiment, states: dict[str, VectorState], unused: dict[str, JsonObject]
) -> dict[str, str]:
    """The tasks without a vector that only differ in their names from an unused one."""
    nameless = {name: _without_name(identity) for name, identity in unused.items()}
    renamed = {}
    for name, state in states.items():
        if state.vector is not None or _is_of_suite(state.task):
            continue
        wanted = _without_name(vector_identity(experiment, state.task))
        match = next((other for other, fields in nameless.items() if fields == wanted), None)
        if match is not None:
            renamed[name] = match
    return renamed


def _is_of_suite(task: TaskConfig) -> bool:
    """Whether the name of a task says which images it has."""
    return task.data is None


def _without_name(identity: JsonObject) -> JsonObject:
    settings = vector_settings(identity)
    task = settings.get("task")
    return {**settings, "task": {**task, "name": None} if isinstance(task, dict) else task}
