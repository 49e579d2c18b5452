"""Zero-shot heads: made from class names and prompts, kept in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from raytvb.data.splits import task_classes
from raytvb.errors import VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import head_key
from raytvb.experiment.tasks import TaskConfig
from raytvb.experiment.training import ModelConfig
from raytvb.models.open_clip_models import Encoder
from raytvb.models.open_clip_package import model_source, open_clip_package
from raytvb.storage.header import Header
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError

Tokenizer = Callable[[Sequence[str]], Tensor]


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's tokenizer; a BPE file named in the configuration is looked for in the model's own
    folder.
    """
    source = model_source(config)
    options: dict[str, Any] = {}
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:"))
        bpe = (
            open_clip_package()
            .get_model_config(source)
            .get("text_cfg", {})
            .get("tokenizer_kwargs", {})
            .get("bpe_path")
        )
        if bpe is not None:
            beside = folder / Path(bpe).name  # a merged folder has the path of where it was written
            options["bpe_path"] = str(beside if beside.is_file() else folder / bpe)
    return open_clip_package().get_tokenizer(source, **options)


@torch.no_grad()
def zero_shot_head(
    encoder: Encoder, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """Text embeddings of the classes (C, E) float32: mean over templates of unit vectors, made unit
    length, times the logit scale, so that logits are unit image features @ head.T. An underscore in
    a name is read as a space."""
    model: Any = encoder.model
    words = [c.replace("_", " ") for c in classes]
    total = sum(
        model.encode_text(tokenizer([t.format(w) for w in words]), normalize=True)
        for t in templates
    )
    return nn.functional.normalize(total, dim=-1) * model.logit_scale.exp()


def write_head(
    store: Store,
    experiment: Experiment,
    task: TaskConfig,
    encoder: Encoder,
    tokenizer: Tokenizer,
    classes: Sequence[str],
) -> Tensor:
    """Make and store the zero-shot head (C, E) float32 of a task; its metadata says what of."""
    head = zero_shot_head(encoder, tokenizer, classes, task.prompts).contiguous()
    store.write(
        head_key(experiment, task), save({"head": head}, metadata={"raytvb": _head_source(task)})
    )
    return head


def _head_source(task: TaskConfig) -> str:
    source = {"data": task.data, "classes": task.classes, "prompts": task.prompts}
    return json.dumps(source, sort_keys=True)


def load_head(store: Store, experiment: Experiment, task: TaskConfig, encoder: Encoder) -> Tensor:
    """The zero-shot head (C, E) float32 of a task; made again where its folder was deleted, or
    where it is that of a control or unseen task of the same name with other classes or prompts."""
    key = head_key(experiment, task)
    try:
        if json.dumps(Header.read(store, key).info, sort_keys=True) == _head_source(task):
            return load(store.read(key))["head"]
    except (StoreKeyError, VectorError):
        pass
    return write_head(
        store, experiment, task, encoder, load_tokenizer(experiment.model), task_classes(task)
    )
