"""The pretrained model in a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from raytvb.data.image_source import SPLITS
from raytvb.data.splits import check_task
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import BASE
from raytvb.experiment.metrics import BaseMetrics
from raytvb.experiment.task_store import TaskStore
from raytvb.models.heads import load_tokenizer, write_head
from raytvb.models.open_clip_models import Encoder, encoder_files, load_encoder, load_folder
from raytvb.models.worker_process import worker_setup
from raytvb.storage import records
from raytvb.storage.mirror import mirror
from raytvb.storage.records import Record
from raytvb.storage.store import Store


def store_base(experiment: Experiment, splits: Sequence[str] = SPLITS) -> Record:
    """Put the pretrained model and the zero-shot heads into the store, unless they are stored.

    First, the data of every task are checked for those of `splits` that the experiment needs from
    the task. Returns the model's record; its parent `fingerprint` is the checksum of the weights.

    Raises UserError for a model that cannot be loaded, for a task without a split that is needed,
    and for a store of another experiment.
    """
    worker_setup()
    store = Store(experiment.store)
    record = records.find(store, BASE, base_identity(experiment))
    if record is not None:
        return record
    classes: dict[str, Sequence[str]] = {}
    for task in experiment.every_task:
        needed = [split for split in splits if task in experiment.tasks_with(split)]
        classes[task.name] = check_task(task, needed)
    return _commit_base(store, experiment, classes)


def _commit_base(
    store: Store, experiment: Experiment, classes: Mapping[str, Sequence[str]]
) -> Record:
    """Write heads and model; `classes`: names of the classes by task."""
    encoder = load_encoder(experiment.model)
    tokenizer = load_tokenizer(experiment.model)
    for task in experiment.every_task:
        write_head(TaskStore(experiment, task), encoder, tokenizer, classes[task.name])
    parameters = sum(tensor.numel() for tensor in encoder.visual_state().values())
    return records.commit(
        store,
        BASE,
        identity=base_identity(experiment),
        metrics=BaseMetrics(parameters=parameters),
        files=encoder_files(encoder, experiment.model),
        parents={"fingerprint": encoder.fingerprint()},
    )


@cache
def load_base(url: str, fingerprint: str) -> Encoder:
    """The pretrained model in the store at `url`, loaded once in each process.

    Raises UserError if the store has no model, or if its weights have another fingerprint.
    """
    store, copies = Store(url), mirror(url)
    record = records.find(store, BASE)
    if record is None:
        raise UserError(f"{url} holds no pretrained model; run all stages with `raytvb run`")
    for name in record.files:
        copies.fetch(f"{BASE}/{name}")
    encoder = load_folder(copies.local.path(BASE))
    if encoder.fingerprint() != fingerprint:
        raise UserError(
            f"{store.where(BASE)}: weights and record differ; delete the folder to make it again"
        )
    return encoder
