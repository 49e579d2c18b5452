"""open_clip models: loading, fingerprint, zero-shot heads, and the image classifier that is
fine-tuned.

A model is kept in a store as an ordinary open_clip folder (`open_clip_config.json`,
`model.safetensors`), so workers and users load it with open_clip's own `local-dir:` scheme and need
no hub.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError
from raytvb.experiment.base import TINY_MODEL
from raytvb.experiment.training import ModelConfig
from raytvb.models.checkpoint_files import check_checkpoint
from raytvb.models.open_clip_package import model_source, open_clip_package, tag_options

CONFIG_FILE = "open_clip_config.json"


WEIGHTS_FILE = "model.safetensors"


VISUAL = "visual."


@dataclass(frozen=True)
class Encoder:
    """A loaded open_clip model in eval mode on the CPU, its configuration and preprocessing."""

    model: nn.Module
    config: Mapping[str, Any]
    preprocess: Preprocess

    def visual_state(self) -> dict[str, Tensor]:
        """Parameters of the image tower by their open_clip names (`visual.…`): what a task vector
        covers.
        """
        return {n: p.detach() for n, p in self.model.named_parameters() if n.startswith(VISUAL)}

    def fingerprint(self) -> str:
        """sha256 over names, shapes and float32 values of the image tower's parameters."""
        digest = hashlib.sha256()
        for name, value in sorted(self.visual_state().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def check_names(config: ModelConfig) -> None:
    """Raise UserError for an unknown model or tag, with those that exist."""
    if config.name == TINY_MODEL or config.name.startswith(("local-dir:", "hf-hub:")):
        return
    known = open_clip_package().list_models()
    if config.name not in known:
        raise UserError(
            f"model.name: unknown model {config.name!r}; open_clip has {', '.join(known)}; or use "
            f"local-dir:PATH, hf-hub:OWNER/NAME or {TINY_MODEL}"
        )
    tags = open_clip_package().list_pretrained_tags_by_model(config.name)
    if config.pretrained is None or not (
        config.pretrained in tags or os.path.isfile(config.pretrained)
    ):
        raise UserError(
            f"model.pretrained: {config.pretrained!r} is neither a file nor a tag of {config.name}; "
            f"its tags: {', '.join(tags) or '(none)'}"
        )


def load_encoder(config: ModelConfig) -> Encoder:
    """Load the pretrained model that an experiment names, in float32.

    Raises UserError for an unknown model or tag (with those that exist), a checkpoint file whose
    tensors are not those of the model (with all that differ), and weights that cannot be loaded.
    """
    check_names(config)
    source = model_source(config)
    if config.pretrained is not None and os.path.isfile(config.pretrained):
        check_checkpoint(config, config.pretrained)
    try:
        model = open_clip_package().create_model(
            source, config.pretrained, **tag_options(config), require_pretrained=True
        )
        model_config = dict(open_clip_package().get_model_config(source))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"model {config.name} ({config.pretrained or 'its own weights'}) cannot be loaded: "
            f"{error}"
        ) from error
    if tag_options(config)["force_quick_gelu"]:
        model_config["quick_gelu"] = True
    return _finish(model, model_config)


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the image tower, from the model's configuration alone. Raises UserError for an
    unknown model.
    """
    check_names(config)
    model = open_clip_package().create_model(model_source(config), load_weights=False)
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(VISUAL))


def random_tower(name: str) -> tuple[nn.Module, int]:
    """The image tower of a named model with random weights, and the side of its images in pixels.

    Raises UserError for an unknown name.
    """
    known = open_clip_package().list_models()
    if name not in known:
        raise UserError(f"unknown model {name!r}; open_clip has {', '.join(known)}")
    visual = open_clip_package().create_model(name, load_weights=False).visual
    return visual, int(
        visual.preprocess_cfg["size"][0]
        if isinstance(visual.preprocess_cfg["size"], Sequence)
        else visual.preprocess_cfg["size"]
    )


def load_folder(folder: str | Path) -> Encoder:
    """Load an open_clip folder that `encoder_files` wrote."""
    model = open_clip_package().create_model(f"local-dir:{folder}", require_pretrained=True)
    return _finish(model, open_clip_package().get_model_config(f"local-dir:{folder}"))


def _finish(model: nn.Module, config: Mapping[str, Any]) -> Encoder:
    model.float().eval()
    visual: Any = model.visual
    cfg = dict(visual.preprocess_cfg)
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][0]
    return Encoder(model, config, Preprocess(int(size), tuple(cfg["mean"]), tuple(cfg["std"]), cfg))


def encoder_files(encoder: Encoder, source: ModelConfig) -> dict[str, bytes]:
    """The files of an open_clip folder, by name; weights in float32."""
    from safetensors.torch import save

    files: dict[str, bytes] = {}
    config = json.loads(json.dumps(encoder.config))
    bpe = config.get("text_cfg", {}).get("tokenizer_kwargs", {}).get("bpe_path")
    if bpe is not None:
        path = Path(model_source(source).removeprefix("local-dir:")) / bpe
        config["text_cfg"]["tokenizer_kwargs"]["bpe_path"] = path.name
        files[path.name] = path.read_bytes()
    document = {"model_cfg": config, "preprocess_cfg": dict(encoder.preprocess.config)}
    files[CONFIG_FILE] = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    files[WEIGHTS_FILE] = save(
        {n: t.float().contiguous() for n, t in encoder.model.state_dict().items()}
    )
    return files
