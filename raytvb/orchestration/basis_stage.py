"""The stage `basis`: the actor takes in all vectors, then writes every basis that is missing."""

from __future__ import annotations

from raytvb.errors import UserError
from raytvb.experiment.basis_specs import basis_specs
from raytvb.orchestration.finetune_stage import finish_stream, start_stream, with_twins
from raytvb.orchestration.run_context import RunContext
from raytvb.orchestration.stream import Stream
from raytvb.report.formatting import format_bytes

NAMED = 3
"""A message names at most this many missing vectors."""


def build_bases(context: RunContext) -> bool:
    """Write the bases that the store lacks, and those that were made from other tasks. Returns
    whether any was written.

    If fine-tuning has fed a basis actor in this run, that actor writes them. Otherwise this stage
    starts an actor and feeds it. The bases are built from the vectors that are there. If a single
    one of several is left, nothing is built. Raises UserError if there is none.
    """
    stream, context.stream = _fed_stream(context), None
    context.leave_out_missing()
    if context.has_too_few:
        stream.close()
        return False
    with context.reporter.stage("basis", 1) as stage:
        cache = _cache_note(stream)
        written = stream.write_bases(context.experiment)
        count = len(basis_specs(context.experiment))
        stage.advance(f"{count} bases, {len(written.names)} new{cache}")
    for note in written.notes:
        context.reporter.say(f"note: {note}")
    return bool(written.names)


def _fed_stream(context: RunContext) -> Stream:
    """The stream to a basis actor that has taken in all vectors."""
    if context.stream is not None:
        return context.stream
    committed = context.vector_records()
    if not committed:
        raise no_vectors(context)
    tasks = [task for task in context.whole.tasks if task.name in committed]
    stream = start_stream(context, with_twins(context, tasks))
    finish_stream(context, stream)
    return stream


def no_vectors(context: RunContext) -> UserError:
    """The error of stages that need vectors, if no task has one."""
    tasks = context.whole.tasks
    names = ", ".join(task.name for task in tasks[:NAMED])
    more = ", …" if len(tasks) > NAMED else ""
    return UserError(
        f"{len(tasks)} of {len(tasks)} task vectors are missing ({names}{more}): run "
        f"`raytvb finetune` first"
    )


def _cache_note(stream: Stream) -> str:
    """How large the actor's copy of the vectors is, and whether it is in memory or on disk."""
    status = stream.status
    if not status.cache.bytes:
        return ""
    where = "in memory" if status.cache.kind == "memory" else "on disk"
    return f"; {format_bytes(status.cache.bytes)} of vectors cached {where}"
