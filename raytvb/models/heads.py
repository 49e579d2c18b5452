"""Zero-shot heads: made from class names and prompts, kept in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from raytvb.data.splits import task_classes
from raytvb.errors import VectorError
from raytvb.experiment.sections.model import ModelConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.models.open_clip_models import Encoder
from raytvb.models.open_clip_package import model_source, open_clip_package
from raytvb.storage.header import Header
from raytvb.storage.records import FileInfo
from raytvb.storage.store_errors import StoreKeyError

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
    """
    source = model_source(config)
    options: dict[str, Any] = {}
    if source.startswith("local-dir:"):
        bpe_path = _bpe_path(source)
        if bpe_path is not None:
            options["bpe_path"] = _bpe_file(Path(source.removeprefix("local-dir:")), bpe_path)
    tokenizer: Tokenizer = open_clip_package().get_tokenizer(source, **options)
    return tokenizer


def _bpe_path(source: str) -> str | None:
    """The path of the BPE file that a model's configuration names, or None."""
    text = open_clip_package().get_model_config(source).get("text_cfg", {})
    path: str | None = text.get("tokenizer_kwargs", {}).get("bpe_path")
    return path


def _bpe_file(folder: Path, bpe_path: str) -> str:
    # The configuration of a merged model has the full path of the folder where it was written.
    beside = folder / Path(bpe_path).name
    return str(beside if beside.is_file() else folder / bpe_path)


@torch.no_grad()
def zero_shot_head(
    encoder: Encoder, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Text embeddings of the classes (C, E) float32, times the logit scale.

    The embedding of a class is the mean over templates of unit vectors, scaled to unit length. So
    logits are unit image features @ head.T. An underscore in a class name is read as a space.
    """
    words = [name.replace("_", " ") for name in classes]
    total: Tensor | int = 0
    for template in templates:
        prompts = [template.format(word) for word in words]
        total = total + encoder.text_features(tokenizer(prompts))
    assert isinstance(total, Tensor)
    return nn.functional.normalize(total, dim=-1) * encoder.logit_scale


def write_head(
    task_store: TaskStore, encoder: Encoder, tokenizer: Tokenizer, classes: Sequence[str]
) -> StoredHead:
    """Compute and store the zero-shot head of a task. Its metadata has the classes and prompts."""
    task = task_store.task
    weights = zero_shot_head(encoder, tokenizer, classes, task.prompts).contiguous()
    data = save({"head": weights}, metadata={"raytvb": _head_source(task)})
    task_store.store.write(task_store.head_key, data)
    return StoredHead(weights, FileInfo.of(data))


def _head_source(task: TaskConfig) -> str:
    source = {"data": task.data, "classes": task.classes, "prompts": task.prompts}
    return json.dumps(source, sort_keys=True)


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
    """The head in the store; None if there is no head for this task's classes and prompts."""
    store, key = task_store.store, task_store.head_key
    try:
        header = Header.read(store, key)
        if json.dumps(header.info, sort_keys=True) != _head_source(task_store.task):
            return None
        is_whole = len(header.first) == header.size  # a small head was read with its header
        data = header.first if is_whole else store.read(key)
    except (StoreKeyError, VectorError):
        return None
    return StoredHead(load(data)["head"], FileInfo.of(data))
