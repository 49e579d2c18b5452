"""Zero-shot heads: made from class names and prompts, kept in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import save
from torch import Tensor, nn

from raytvb.data.splits import task_classes
from raytvb.errors import UserError, VectorError, described
from raytvb.experiment.layout import BASE, HEAD
from raytvb.experiment.sections.model import ModelConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.models.hub import reached_soon
from raytvb.models.open_clip_models import Encoder
from raytvb.models.open_clip_package import model_source, open_clip_package
from raytvb.models.tokenizer_files import bpe_file
from raytvb.storage import records
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError, unreadable
from raytvb.storage.header import Header
from raytvb.storage.records import FileInfo
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.tensor_file import tensor_of, tensors_of

Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class StoredHead:
    """A zero-shot head and the file that it was read from."""

    weights: Tensor
    """(C, E) float32: logits are unit image features @ weights.T."""
    file: FileInfo


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's tokenizer.

    If the model's configuration names a BPE file, the file is taken from the model's own folder.
    Raises UserError for a tokenizer that cannot be loaded.
    """
    source = model_source(config)
    folder = Path(source.removeprefix("local-dir:")) if source.startswith("local-dir:") else None
    try:
        text = open_clip_package().get_model_config(source).get("text_cfg", {})
        bpe_path = text.get("tokenizer_kwargs", {}).get("bpe_path")
        options: dict[str, str] = {}
        if folder is not None and bpe_path is not None:
            options["bpe_path"] = str(bpe_file(folder, bpe_path))
        is_fetched = folder is None and text.get("hf_tokenizer_name")
        with reached_soon() if is_fetched else nullcontext():
            tokenizer: Tokenizer = open_clip_package().get_tokenizer(source, **options)
        return tokenizer
    # Of files, of the hub and of transformers: there is no common class.
    except Exception as error:
        raise UserError(
            f"model {config.name}: its tokenizer cannot be loaded: put the tokenizer's files "
            f"beside the model, or fetch them where there is a network ({described(error):.200})"
        ) from error


@torch.no_grad()
def zero_shot_head(
    encoder: Encoder, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Text embeddings of the classes (C, E) float32, times the logit scale.

    The embedding of a class is the mean over templates of unit vectors, scaled to unit length. So
    logits are unit image features @ head.T. An underscore in a class name is read as a space.
    """
    total: Tensor | int = 0
    for template in templates:
        prompts = [template.format(word) for word in words(classes)]
        total = total + encoder.text_features(tokenizer(prompts))
    assert isinstance(total, Tensor)
    return nn.functional.normalize(total, dim=-1) * encoder.logit_scale


def words(classes: Sequence[str]) -> list[str]:
    """The class names as they stand in prompts: an underscore becomes a space."""
    return [name.replace("_", " ") for name in classes]


def write_head(
    task_store: TaskStore, encoder: Encoder, tokenizer: Tokenizer, classes: Sequence[str]
) -> StoredHead:
    """Compute and commit the zero-shot head of a task.

    Raises VectorError for a head with NaN or infinite values.
    """
    weights = zero_shot_head(encoder, tokenizer, classes, task_store.task.prompts).contiguous()
    if not bool(weights.isfinite().all()):
        raise VectorError(
            f"the zero-shot head of task {task_store.task.name} has NaN or infinite values",
            "the pretrained model's text tower gives such embeddings: check its weights",
        )
    record = records.commit(
        task_store.store,
        task_store.head_prefix,
        identity=_head_identity(task_store.task),
        files={HEAD: save({"head": weights})},
    )
    return StoredHead(weights, record.files[HEAD])


def _head_identity(task: TaskConfig) -> JsonObject:
    """All that a head depends on beside the pretrained model."""
    return {"data": task.data, "classes": _listed(task.classes), "prompts": _listed(task.prompts)}


def _listed(names: Sequence[str] | None) -> list[JsonValue] | None:
    return None if names is None else [*names]


def load_head(task_store: TaskStore, encoder: Encoder) -> StoredHead:
    """The stored zero-shot head of a task, or of a control or unseen task.

    The head is computed again if its file is missing or damaged, or has other classes or prompts. A
    control or unseen task of the same name may have had others.
    """
    stored = _stored_head(task_store)
    if stored is not None:
        return stored
    task = task_store.task
    tokenizer = load_tokenizer(task_store.experiment.model)
    return write_head(task_store, encoder, tokenizer, task_classes(task))


def _stored_head(task_store: TaskStore) -> StoredHead | None:
    """The head in the store; None if there is no whole head for this task's classes and prompts."""
    store, prefix = task_store.store, task_store.head_prefix
    try:
        record = records.find(store, prefix)
        if record is None:
            return _first_format_head(task_store)
        if not record.is_of(_head_identity(task_store.task)):
            return None
        data = records.read_file(store, prefix, HEAD, record)
        return StoredHead(_weights(data, store.where(prefix)), record.files[HEAD])
    except DamagedError:
        return None


def _weights(data: bytes, where: str) -> Tensor:
    """The weights in the file of a head. Raises DamagedError if the file holds none."""
    weights = tensor_of(tensors_of(data, where), "head", torch.float32, 2, where)
    if not bool(weights.isfinite().all()):
        raise unreadable(where, "the head has NaN or infinite values")
    return weights


def _first_format_head(task_store: TaskStore) -> StoredHead | None:
    """The head where a store of format 1 has it.

    It lies beside the vector of its task, whose record lists both. Heads of the control and of
    unseen tasks lie with the pretrained model, and no record lists them.
    """
    store, name = task_store.store, task_store.task.name
    vector = records.find(store, task_store.prefix)
    if vector is not None and HEAD in vector.files:
        key, info = records.file_key(task_store.prefix, HEAD), vector.files[HEAD]
        file = CheckedFile(store, key, info)
    elif records.is_first_format(store):
        file = CheckedFile(store, f"{BASE}/heads/{name}.safetensors", None)
    else:
        return None
    try:
        header, data = Header.read(file), file.read()
    except (StoreKeyError, VectorError):
        return None
    if header.info != _head_identity(task_store.task):
        return None
    return StoredHead(_weights(data, file.where), FileInfo.of(data))
