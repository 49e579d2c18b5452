"""A dry run: what an experiment would do, what is there already, and what it will store."""

from __future__ import annotations

from raytvb.data.source import SPLITS
from raytvb.data.splits import check_task
from raytvb.experiment.config import Experiment
from raytvb.experiment.freezing import freeze
from raytvb.experiment.layout import EXPERIMENT, basis_prefix, vector_prefix
from raytvb.maths.mask_selection import kept_count
from raytvb.models.open_clip_models import count_parameters
from raytvb.models.open_clip_package import quiet_open_clip
from raytvb.report.formatting import format_bytes
from raytvb.search.candidates import basis_candidates
from raytvb.storage import records
from raytvb.storage.store import Store


def describe(experiment: Experiment) -> str:
    """Lines for people. Raises StoreError where the store cannot be written, UserError where it is
    another's.
    """
    store = Store(experiment.store)
    store.check_writable()
    if store.exists(EXPERIMENT):
        freeze(store, experiment)
    for task in experiment.every_task:
        check_task(task, [s for s in SPLITS if task in experiment.tasks_with(s)])
    quiet_open_clip()
    parameters, tasks = count_parameters(experiment.model), len(experiment.tasks)
    kept = kept_count(parameters, experiment.talos.density)
    bases = basis_candidates(experiment)
    sparse = experiment.talos.density < 1.0
    masks = (1 if experiment.talos.mask == "shared" else tasks) * parameters // 8 if sparse else 0
    wide = sparse and experiment.talos.mask == "per-task" and tasks > 1
    done = sum(records.find(store, vector_prefix(t)) is not None for t in experiment.task_names)
    built = sum(records.find(store, basis_prefix(c.name)) is not None for c in bases)
    asked = experiment.resources
    return "\n".join(
        (
            f"model     {experiment.model.name}: {parameters:,} parameters in the image tower, {kept:,} trained per task",
            f"vectors   {tasks} tasks, {done} done; {format_bytes(4 * kept * tasks)} (dense: "
            f"{format_bytes(4 * parameters * tasks)}), masks {format_bytes(masks)}",
            f"bases     {len(bases)} ({', '.join(c.name for c in bases)}), {built} done; "
            f"{format_bytes(4 * (parameters if wide else kept) * sum(c.size for c in bases))}"
            f"{' (dense, as every task has its own mask)' if wide else ''}",
            f"each task asks for {asked.cpus_per_task:g} CPUs and {asked.gpus_per_task:g} GPUs, restarted up to "
            f"{asked.max_retries} times; whether the cluster has them is checked when it runs",
            f"store     {store.url}: writable",
        )
    )
