"""Writes a merged model as a folder that open_clip loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from raytvb.experiment.layout import BASE
from raytvb.models.open_clip_models import CONFIG_FILE, WEIGHTS_FILE
from raytvb.storage.records import Record
from raytvb.storage.store import Store


def write_folder(store: Store, base: Record, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights, and the configuration and tokenizer of the pretrained model.

    base: the record of the pretrained model in the store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in base.files:
        if name == WEIGHTS_FILE:
            continue
        data = store.read(f"{BASE}/{name}")
        (folder / name).write_bytes(_with_full_path(data, folder) if name == CONFIG_FILE else data)
    save_file(dict(state), folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors writes files that only their owner can read


def _with_full_path(document: bytes, folder: Path) -> bytes:
    """A model's configuration with the full path of its tokenizer file.

    open_clip would look for a relative path in the working folder.
    """
    config = json.loads(document)
    options = config["model_cfg"].get("text_cfg", {}).get("tokenizer_kwargs", {})
    if "bpe_path" in options:
        options["bpe_path"] = str(folder.resolve() / options["bpe_path"])
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
