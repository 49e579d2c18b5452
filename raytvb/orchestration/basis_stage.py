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
"""A message names at most this many missing vectors."""


def build_bases(context: RunContext) -> bool:
    """Write the bases that the store lacks. Returns whether any was written.

    If fine-tuning has fed a basis actor in this run, that actor writes them. Otherwise this stage
    starts an actor and feeds it. Raises UserError if a vector is missing or cannot be used.
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
    """Raise UserError unless the store has the vector of every task."""
    missing = context.missing_vectors()
    if missing:
        names = ", ".join(task.name for task in missing[:NAMED])
        more = ", …" if len(missing) > NAMED else ""
        raise UserError(
            f"{len(missing)} of {len(context.experiment.tasks)} task vectors are missing "
            f"({names}{more}): run `raytvb finetune` first"
        )


def _fed_stream(context: RunContext) -> Stream:
    """The stream to a basis actor that has taken in all vectors."""
    if context.stream is not None:
        return context.stream
    tasks = context.experiment.tasks
    raise_failed("basis", make_missing_twins(context, tasks))
    stream = start_stream(context, tasks)
    raise_failed("basis", finish_stream(stream, {}))
    return stream


def _cache_note(stream: Stream) -> str:
    """How large the actor's copy of the vectors is, and whether it is in memory or on disk."""
    status = stream.status
    if not status.cache.bytes:
        return ""
    where = "in memory" if status.cache.kind == "memory" else "on disk"
    return f"; {format_bytes(status.cache.bytes)} of vectors cached {where}"
