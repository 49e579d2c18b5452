"""The pretrained model in a store."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from raytvb.errors import UserError, described
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity
from raytvb.experiment.layout import BASE
from raytvb.experiment.metrics import BaseMetrics
from raytvb.models.open_clip_models import Encoder, encoder_files, load_encoder, load_folder
from raytvb.models.worker_process import worker_setup
from raytvb.storage import records
from raytvb.storage.damage import differs, unreadable
from raytvb.storage.mirror import mirror
from raytvb.storage.records import Record
from raytvb.storage.store import Store


def store_base(experiment: Experiment) -> Record:
    """Put the pretrained model into the store, unless it is there.

    Returns its record; the parent `fingerprint` is the checksum of the weights. Raises UserError
    for a model that cannot be loaded, and for a store of another experiment.
    """
    worker_setup()
    store = Store(experiment.store)
    record = records.find(store, BASE, base_identity(experiment))
    if record is not None:
        return record
    encoder = load_encoder(experiment.model)
    parameters = sum(tensor.numel() for tensor in encoder.visual_state().values())
    return records.commit(
        store,
        BASE,
        identity=base_identity(experiment),
        metrics=BaseMetrics(parameters=parameters),
        files=encoder_files(encoder, experiment.model, _folder_of(store)),
        parents={"fingerprint": encoder.fingerprint()},
    )


def _folder_of(store: Store) -> Path | None:
    """Where the model's files lie on this machine; None for a store elsewhere."""
    folder = store.local_path(BASE)
    return None if folder is None else Path(folder).resolve()


@cache
def load_base(url: str, fingerprint: str) -> Encoder:
    """The pretrained model in the store at `url`, loaded and compared once in each process.

    Raises UserError if the store has no model, and DamagedError if one of its files is missing or
    differs from the record, or if its weights have another fingerprint.
    """
    store, copies = Store(url), mirror(url)
    record = records.find(store, BASE)
    if record is None:
        raise UserError(f"{url} holds no pretrained model; run all stages with `raytvb run`")
    for name in record.files:
        copies.checked(f"{BASE}/{name}")
    _check_no_other_files(store, record)
    try:
        encoder = load_folder(copies.local.path(BASE))
    # The files are as their record says, but somebody else may have made both. open_clip raises
    # errors of many kinds for a description or for weights that are none.
    except Exception as error:
        raise unreadable(store.where(BASE), f"{described(error):.300}") from error
    if encoder.fingerprint() != fingerprint:
        raise differs(store.where(BASE), url, "its weights have another fingerprint")
    return encoder


def _check_no_other_files(store: Store, record: Record) -> None:
    """Raise DamagedError if the model's folder has a file that its record does not list.

    open_clip takes weights from files of several names, so it might load another file.
    """
    for key in store.keys(BASE) if store.is_local else ():
        name = key.removeprefix(f"{BASE}/")
        if "/" not in name and name not in (records.RECORD, *record.files):
            raise differs(store.where(key), store.url, "no record lists it")
