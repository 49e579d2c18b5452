"""The tasks of a run that failed. A task that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from raytvb.errors import FailedPart
from raytvb.experiment.config import Experiment
from raytvb.experiment.missing import (
    clear_failure,
    clear_outdated,
    commit_failure,
    failures,
)
from raytvb.orchestration.failures import Failure
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError


class TaskFailures:
    """The failures of this run and those that earlier runs have recorded in the store, by task."""

    def __init__(self, store: Store, experiment: Experiment, tell: Callable[[str], None]) -> None:
        """experiment: with all of its tasks. tell: called with a line on each new failure."""
        self._store, self._tell = store, tell
        self._tasks = {task.name: task for task in experiment.every_task}
        self.parts: dict[str, FailedPart] = failures(store, experiment)
        """The failures, by task."""
        clear_outdated(store, self.parts)

    def add(self, stage: str, failed: Mapping[str, Failure]) -> None:
        """Record tasks that failed at a stage (see `experiment.missing`)."""
        for name, failure in failed.items():
            reason = failure.reason.removeprefix(f"task {name}: ")
            part = FailedPart(name, stage, reason, failure.attempts)
            self.parts[name] = part
            self._tell(f"left out: {part}")
            with suppress(StoreError):  # the failure may be that the storage cannot be written
                commit_failure(self._store, self._tasks[name], part)

    def clear(self, names: Iterable[str], *stages: str) -> None:
        """Forget the failures of these tasks at these stages, which have succeeded now."""
        for name in names:
            part = self.parts.get(name)
            if part is not None and part.stage in stages:
                clear_failure(self._store, name)
                del self.parts[name]

    def at(self, stage: str) -> list[str]:
        """The tasks that failed at a stage."""
        return [name for name, part in self.parts.items() if part.stage == stage]
