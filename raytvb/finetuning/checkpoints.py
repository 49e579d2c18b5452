"""Checkpoints of fine-tunes that have not ended."""

from __future__ import annotations

from safetensors.torch import load, save

from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import vector_identity
from raytvb.experiment.layout import checkpoint_prefix
from raytvb.experiment.tasks import TaskConfig
from raytvb.finetuning.training import Checkpoint
from raytvb.storage import records
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError


def write_checkpoint(
    store: Store, experiment: Experiment, task: TaskConfig, checkpoint: Checkpoint
) -> None:
    """Keep a fine-tune's latest checkpoint; the one before goes when this one is whole."""
    prefix, name = checkpoint_prefix(task.name), f"step-{checkpoint.step:07d}.safetensors"
    metrics = {"step": checkpoint.step, "loss": checkpoint.loss, "seconds": checkpoint.seconds}
    records.commit(
        store,
        prefix,
        identity=vector_identity(experiment, task),
        metrics=metrics,
        files={name: save(checkpoint.tensors)},
    )
    for key in store.keys(prefix):
        if key not in (f"{prefix}/{name}", f"{prefix}/{records.RECORD}"):
            store.delete(key)


def load_checkpoint(store: Store, experiment: Experiment, task: TaskConfig) -> Checkpoint | None:
    """The checkpoint to go on from; None where there is none that is whole."""
    prefix = checkpoint_prefix(task.name)
    record = records.find(store, prefix, vector_identity(experiment, task))
    if record is None:
        return None
    ((name, info),) = record["files"].items()
    try:
        data = store.read(f"{prefix}/{name}")
    except StoreKeyError:
        return None
    if not FileInfo.from_json(info).is_of(data):
        return None
    return Checkpoint(**record["metrics"], tensors=load(data))
