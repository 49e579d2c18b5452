"""The pretrained model in a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from raytvb.data.source import SPLITS
from raytvb.data.splits import check_task
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import BASE
from raytvb.models.heads import load_tokenizer, write_head
from raytvb.models.open_clip_models import Encoder, encoder_files, load_encoder, load_folder
from raytvb.models.process import worker_setup
from raytvb.storage import records
from raytvb.storage.mirror import mirror
from raytvb.storage.store import Store


def write_base(
    store: Store, experiment: Experiment, classes: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Store the pretrained model and the zero-shot heads of all tasks; `classes` by task name."""
    encoder = load_encoder(experiment.model)
    tokenizer = load_tokenizer(experiment.model)
    for task in experiment.every_task:
        write_head(store, experiment, task, encoder, tokenizer, classes[task.name])
    sizes = {"parameters": sum(t.numel() for t in encoder.visual_state().values())}
    return records.commit(
        store,
        BASE,
        identity=base_identity(experiment),
        metrics=sizes,
        files=encoder_files(encoder, experiment.model),
        parents={"fingerprint": encoder.fingerprint()},
    )


@cache
def base_encoder(url: str, fingerprint: str) -> Encoder:
    """The stored pretrained model, loaded once a process. Raises UserError where it is not the one
    recorded.
    """
    store, copies = Store(url), mirror(url)
    record = records.find(store, BASE)
    if record is None:
        raise UserError(f"{url} holds no pretrained model; run all stages with `raytvb run`")
    for name in record["files"]:
        copies.fetch(f"{BASE}/{name}")
    encoder = load_folder(copies.local.path(BASE))
    if encoder.fingerprint() != fingerprint:
        raise UserError(
            f"{store.where(BASE)}: weights and record differ; delete the folder to make it again"
        )
    return encoder


def prepare_base(experiment: Experiment, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Store the pretrained model and the heads, if every task has the splits; returns its
    record.
    """
    worker_setup()
    store = Store(experiment.store)
    record = records.find(store, BASE, base_identity(experiment))
    if record is not None:
        return record
    classes = {
        t.name: check_task(t, [s for s in splits if t in experiment.tasks_with(s)])
        for t in experiment.every_task
    }
    return write_base(store, experiment, classes)
