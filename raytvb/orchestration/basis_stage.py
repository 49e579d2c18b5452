"""The stage `basis`: the actor takes in all vectors, then writes every basis that is missing."""

from __future__ import annotations

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import basis_specs
from raytvb.orchestration.finetune_stage import (
    finish_stream,
    make_missing_twins,
    start_stream,
)
from raytvb.orchestration.ray_tasks import raise_failed
from raytvb.orchestration.run_context import RunContext
from raytvb.orchestration.stream import Stream
from raytvb.report.formatting import format_bytes

NAMED = 3
"""How many missing vectors a message names."""


def build_bases(context: RunContext) -> bool:
    """Write the bases that are missing; whether there were any.

    Uses the actor that fine-tuning has fed in this run, else feeds one. Raises UserError where a
    vector is missing or cannot be used.
    """
    _check_vectors(context)
    stream, context.stream = _fed_stream(context), None
    with context.reporter.stage("basis", 1) as stage:
        cache = _cache_note(stream)
        written = stream.write_bases()
        count = len(basis_specs(context.experiment))
        stage.advance(f"{count} bases, {len(written.names)} new{cache}")
    for note in written.notes:
        context.reporter.say(f"note: {note}")
    return bool(written.names)


def _check_vectors(context: RunContext) -> None:
    """Raise UserError unless every task has its vector."""
    missing = context.missing_vectors()
    if missing:
        names = ", ".join(task.name for task in missing[:NAMED])
        more = ", …" if len(missing) > NAMED else ""
        raise UserError(
            f"{len(missing)} of {len(context.experiment.tasks)} task vectors are missing "
            f"({names}{more}): run `raytvb finetune` first"
        )


def _fed_stream(context: RunContext) -> Stream:
    """An actor that has taken in all vectors."""
    if context.stream is not None:
        return context.stream
    tasks = context.experiment.tasks
    raise_failed("basis", make_missing_twins(context, tasks))
    stream = start_stream(context, tasks)
    raise_failed("basis", finish_stream(stream, {}))
    return stream


def _cache_note(stream: Stream) -> str:
    """How large the actor's copy of the vectors is, and where."""
    status = stream.status
    if not status.cache.bytes:
        return ""
    where = "in memory" if status.cache.kind == "memory" else "on disk"
    return f"; {format_bytes(status.cache.bytes)} of vectors cached {where}"
