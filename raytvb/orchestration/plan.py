"""A dry run: says what an experiment would do, what is done already, and what it will store."""

from __future__ import annotations

from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.changes import Changes, changes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.missing import missing_parts
from raytvb.experiment.places import check_new_store
from raytvb.experiment.present_experiments import check_model
from raytvb.maths.mask_selection import kept_count
from raytvb.models.open_clip_models import count_parameters
from raytvb.models.open_clip_package import quiet_open_clip
from raytvb.models.pretrained_files import activation_warnings
from raytvb.report.formatting import format_bytes
from raytvb.storage.store import Store

FLOAT_BYTES = 4
"""Bytes of a stored value, in float32."""


def describe(experiment: Experiment) -> str:
    """The plan of an experiment, as lines of text.

    Writes, deletes and makes nothing, not even the store's folder. Raises StoreError if a run could
    not write the store, and UserError if the store belongs to another pretrained model.
    """
    store = Store(experiment.store)
    store.check_reachable()
    check_new_store(store)
    check_model(store, experiment)
    changes = changes_of(experiment)
    quiet_open_clip()
    parameters = count_parameters(experiment.model)
    kept = kept_count(parameters, experiment.talos.density)
    lines = (
        f"model     {experiment.model.name}: {parameters:,} parameters in the image tower, "
        f"{kept:,} trained per task",
        *(f"warning   {line}" for line in activation_warnings(experiment.model)),
        _vectors_line(experiment, changes, parameters, kept),
        _bases_line(experiment, changes, parameters, kept),
        *_changes_lines(changes),
        *_missing_lines(experiment, store),
        _resources_line(experiment),
        _store_line(store),
    )
    return "\n".join(lines)


def _missing_lines(experiment: Experiment, store: Store) -> list[str]:
    """The tasks that an earlier run has left out."""
    lines = []
    for part in missing_parts(store, experiment):
        if part.stage:
            lines.append(f"missing   {part}")
    return lines


def _changes_lines(changes: Changes) -> list[str]:
    """What a run would keep, make, and make again, and what it would ask."""
    if not (changes.kept or changes.again or changes.unused):
        return []  # all is new
    lines = [f"run       {line}" for line in changes.lines()]
    question = changes.question()
    if question:
        lines += [f"asks      {line}" for line in question.splitlines()]
    return lines


def _vectors_line(experiment: Experiment, changes: Changes, parameters: int, kept: int) -> str:
    tasks, done = len(experiment.tasks), len(changes.kept)
    masks = 0
    if experiment.talos.density < 1.0:
        masks = 1 if experiment.talos.mask == "shared" else tasks
    return (
        f"vectors   {tasks} tasks, {done} done; {format_bytes(FLOAT_BYTES * kept * tasks)} (dense: "
        f"{format_bytes(FLOAT_BYTES * parameters * tasks)}), "
        f"masks {format_bytes(masks * parameters // 8)}"
    )


def _bases_line(experiment: Experiment, changes: Changes, parameters: int, kept: int) -> str:
    specs = basis_specs(experiment)
    done = 0 if changes.grows else sum(changes.bases.values())
    vectors = sum(spec.size for spec in specs)
    names = ", ".join(spec.name for spec in specs)
    # If every vector has a mask of its own, the only coordinates that all share are the dense ones.
    dense = experiment.own_masks and len(experiment.tasks) > 1
    size = FLOAT_BYTES * vectors * (parameters if dense else kept)
    note = " (dense, as every task has its own mask)" if dense else ""
    return f"bases     {len(specs)} ({names}), {done} done; {format_bytes(size)}{note}"


def _resources_line(experiment: Experiment) -> str:
    resources = experiment.resources
    return (
        f"each task asks for {resources.cpus_per_task:g} CPUs and {resources.gpus_per_task:g} "
        f"GPUs, and is restarted up to {resources.max_retries} times; the run checks whether the "
        f"cluster has these resources"
    )


def _store_line(store: Store) -> str:
    if store.local_path("") is not None:
        return f"store     {store.url}: writable"
    return f"store     {store.url}: reachable; the run checks whether it can be written"
