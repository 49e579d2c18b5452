"""Why a Ray task or actor failed: one line for users that says what happened and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from raytvb.errors import UserError

DEATHS = OutOfMemoryError | WorkerCrashedError | NodeDiedError
"""Ray raises these once it has used up all repetitions of a task."""


@dataclass(frozen=True)
class Failure:
    """Why a task failed, and how often it was tried."""

    reason: str
    """One line."""
    attempts: int = 1
    """How often the task was started, as far as Ray tells: it does not count a repetition after the
    planned end of a node."""

    def __str__(self) -> str:
        return self.reason if self.attempts == 1 else f"{self.reason} ({self.attempts} attempts)"


class TransientError(Exception):
    """The storage or the network failed in a way that may pass, so Ray runs the task again."""


def failure_of(error: BaseException, retries: int) -> Failure:
    """The failure that an error of `ray.get` stands for. retries: that the task was allowed."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    was_repeated = isinstance(cause, DEATHS | TransientError)
    return Failure(explain(error), retries + 1 if was_repeated else 1)


def explain(error: BaseException) -> str:
    """What went wrong in a worker, in one line, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError | TransientError | ValueError | OSError):
        return str(cause)
    if isinstance(error, RayTaskError) or not isinstance(error, RayError):
        return f"{type(cause).__name__}: {cause}"
    return _explain_death(error)


def _explain_death(error: RayError) -> str:
    """What Ray did to a worker, and what the user can do."""
    match error:
        case OutOfMemoryError():
            return (
                f"Ray ended its worker because {_memory_use(str(error))}: raise "
                f"resources.memory_gb_per_task, so that fewer tasks run at once, or lower the "
                f"batch size, or use nodes with more memory"
            )
        case WorkerCrashedError():
            return (
                "its worker died at once: it crashed, or the system killed it, as Linux does if "
                "memory runs out (`dmesg` says so). Raise resources.memory_gb_per_task, so that "
                "fewer tasks run at once, or lower the batch size"
            )
        case NodeDiedError():
            return "its node died, or cannot be reached: check the node, or use another"
        case ActorDiedError():
            return (
                "the process of its actor died: it crashed, was killed, or lost its node. Check "
                "the memory of its node, and raise resources.memory_gb_per_task"
            )
        case TaskCancelledError():
            return "it was cancelled, because the run was stopped"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _memory_use(text: str) -> str:
    """How full the memory was, from the text of Ray's OutOfMemoryError."""
    node = re.search(r"was ([\d.]+)GB used / ([\d.]+)GB", text)
    return f"{node[1]} of {node[2]} GB of its node were in use" if node else "memory ran out"


def stage_error(stage: str, failed: Mapping[str, Failure]) -> UserError:
    """The error of a stage in which some tasks failed: their reasons, and what the user can do."""
    lines = "".join(f"\n  {name}: {failure}" for name, failure in sorted(failed.items()))
    return UserError(
        f"{stage} failed for {len(failed)} of its parts, the rest is done and kept:{lines}\n"
        f"Once the cause is removed, run the same command again to go on."
    )


def raise_failed(stage: str, failed: Mapping[str, Failure]) -> None:
    """Raise UserError if tasks of a stage failed."""
    if failed:
        raise stage_error(stage, failed)
