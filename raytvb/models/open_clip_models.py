"""open_clip models: names, loading, the files of a folder, fingerprint.

How the room works, in reading order: `open_clip_package` imports open_clip and translates our names
of models. This module loads a model as an `Encoder`. `pretrained_files` checks weights from users'
files. `pretrained_model` keeps the pretrained model in a store, and `heads` the zero-shot heads;
`pretrained_task` loads both for one task. `classifier` is the model that is fine-tuned. `evaluator`
measures accuracies with merged weights. `few_shot` learns coefficients for an unseen task.
`worker_process` sets up a worker process.

A model is kept in a store as an ordinary open_clip folder (`open_clip_config.json`,
`model.safetensors`). So workers and users load it with open_clip's own `local-dir:` scheme and need
no hub. open_clip has no type annotations, so its objects have the type `Any` here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError
from raytvb.experiment.fields import TINY_MODEL
from raytvb.experiment.sections.model import ModelConfig
from raytvb.maths.finite import listed, not_finite
from raytvb.models.open_clip_package import model_source, open_clip_package, tag_options
from raytvb.models.pretrained_files import check_checkpoint
from raytvb.storage.contract import JsonObject

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "model.safetensors"
VISUAL = "visual."
"""Prefix of the names of the image tower's parameters."""


@dataclass(frozen=True)
class Encoder:
    """A loaded open_clip model in eval mode on the CPU, its configuration and preprocessing."""

    model: nn.Module
    config: JsonObject
    """open_clip's description of the architecture."""
    preprocess: Preprocess

    @property
    def visual(self) -> nn.Module:
        """The image tower itself. Do not change it."""
        tower: Any = self.model.visual
        assert isinstance(tower, nn.Module)
        return tower

    def fresh_tower(self) -> nn.Module:
        """A copy of the image tower, which the caller may change."""
        return copy.deepcopy(self.visual)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Unit text embeddings (N, E) of token sequences (N, L)."""
        model: Any = self.model
        features: Tensor = model.encode_text(tokens, normalize=True)
        return features

    @property
    def logit_scale(self) -> Tensor:
        """The learned factor, a scalar (), of unit image features @ unit text embeddings."""
        model: Any = self.model
        scale: Tensor = model.logit_scale.exp()
        return scale

    def visual_state(self) -> dict[str, Tensor]:
        """Parameters of the image tower by their open_clip names (`visual.…`). A task vector covers
        exactly these.
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
    """Raise UserError for an unknown model or tag; the message lists the known ones."""
    if config.name == TINY_MODEL or config.name.startswith(("local-dir:", "hf-hub:")):
        return
    names = open_clip_package().list_models()
    if config.name not in names:
        raise UserError(
            f"model.name: unknown model {config.name!r}; open_clip has {', '.join(names)}; or use "
            f"local-dir:PATH, hf-hub:OWNER/NAME or {TINY_MODEL}"
        )
    tags = open_clip_package().list_pretrained_tags_by_model(config.name)
    pretrained = config.pretrained
    if pretrained is None or not (pretrained in tags or os.path.isfile(pretrained)):
        raise UserError(
            f"model.pretrained: {pretrained!r} is neither a file nor a tag of {config.name}; "
            f"its tags: {', '.join(tags) or '(none)'}"
        )


def load_encoder(config: ModelConfig) -> Encoder:
    """Load the pretrained model that an experiment names, in float32.

    Raises UserError for an unknown model or tag (the message lists the known ones), for a
    checkpoint file whose tensors are not those of the model (it lists all differences), for weights
    that cannot be loaded, and for weights that are not finite (it names them).
    """
    check_names(config)
    source = model_source(config)
    if config.pretrained is not None and os.path.isfile(config.pretrained):
        check_checkpoint(config, config.pretrained)
    options = tag_options(config)
    try:
        model = open_clip_package().create_model(
            source, config.pretrained, **options, require_pretrained=True
        )
        model_config = dict(open_clip_package().get_model_config(source))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"model {config.name} ({config.pretrained or 'its own weights'}) cannot be loaded: "
            f"{error}"
        ) from error
    if options["force_quick_gelu"]:
        model_config["quick_gelu"] = True
    encoder = _encoder_of(model, model_config)
    _check_finite(encoder.model, config)
    return encoder


def _check_finite(model: nn.Module, config: ModelConfig) -> None:
    """Raise UserError that names the parameters with NaN or infinite values.

    A buffer may be infinite, as attention masks are, but not NaN.
    """
    bad = not_finite(dict(model.named_parameters()))
    bad += [name for name, buffer in sorted(model.named_buffers()) if buffer.isnan().any()]
    if bad:
        raise UserError(
            f"model {config.name} ({config.pretrained or 'its own weights'}) has NaN or infinite "
            f"values in {listed(bad)}: use a checkpoint whose weights are finite in float32"
        )


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the image tower, from the model's configuration alone.

    Raises UserError for an unknown model.
    """
    check_names(config)
    model = open_clip_package().create_model(model_source(config), load_weights=False)
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(VISUAL))


def random_tower(name: str) -> tuple[nn.Module, int]:
    """The image tower of a model with random weights, and the side of its images in pixels.

    Raises UserError for an unknown name.
    """
    names = open_clip_package().list_models()
    if name not in names:
        raise UserError(f"unknown model {name!r}; open_clip has {', '.join(names)}")
    visual = open_clip_package().create_model(name, load_weights=False).visual
    return visual, _image_size(visual.preprocess_cfg)


def load_folder(folder: str | Path) -> Encoder:
    """Load an open_clip folder that `encoder_files` wrote."""
    source = f"local-dir:{folder}"
    model = open_clip_package().create_model(source, require_pretrained=True)
    return _encoder_of(model, open_clip_package().get_model_config(source))


def _encoder_of(model: nn.Module, config: JsonObject) -> Encoder:
    """An encoder of a model that open_clip created, in float32 and eval mode."""
    model.float().eval()
    visual: Any = model.visual
    cfg = dict(visual.preprocess_cfg)
    preprocess = Preprocess(_image_size(cfg), tuple(cfg["mean"]), tuple(cfg["std"]), cfg)
    return Encoder(model, config, preprocess)


def _image_size(cfg: Any) -> int:
    """Side of the square images of an open_clip `preprocess_cfg`, whose size may be a pair."""
    size = cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def encoder_files(encoder: Encoder, source: ModelConfig) -> dict[str, bytes]:
    """The files of an open_clip folder, by name; weights in float32."""
    files: dict[str, bytes] = {}
    config = json.loads(json.dumps(encoder.config))
    tokenizer = config.get("text_cfg", {}).get("tokenizer_kwargs", {})
    if tokenizer.get("bpe_path") is not None:
        path = Path(model_source(source).removeprefix("local-dir:")) / tokenizer["bpe_path"]
        tokenizer["bpe_path"] = path.name
        files[path.name] = path.read_bytes()
    document = {"model_cfg": config, "preprocess_cfg": dict(encoder.preprocess.config)}
    files[CONFIG_FILE] = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    state = encoder.model.state_dict()
    files[WEIGHTS_FILE] = save({n: t.float().contiguous() for n, t in state.items()})
    return files
