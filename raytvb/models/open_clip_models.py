"""open_clip models: names, loading, the files of a folder, fingerprint.

How the room works, in reading order: `open_clip_package` imports open_clip and translates our names
of models. This module loads a model as an `Encoder`. Users' files are checked before anything is
built from them: a folder by `model_folder` and `model_fields`, its tokenizer by `tokenizer_files`,
a checkpoint by `file_kinds`, `weight_files`, `pretrained_files` and `model_names`, what lies beside
it by `beside_checkpoint`, an archive of SigLIP by `big_vision`; `hub` fetches models.
`pretrained_model` keeps the pretrained model in a store, and `heads` the zero-shot heads;
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
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError, described, shortened
from raytvb.experiment.fields import TINY_MODEL
from raytvb.experiment.sections.model import ModelConfig
from raytvb.maths.finite import listed, not_finite
from raytvb.models.beside_checkpoint import Beside
from raytvb.models.big_vision import ARCHIVE, load_archive
from raytvb.models.classifier import tower_features
from raytvb.models.hub import fetch_tag, fetched_folder, reached_soon
from raytvb.models.model_folder import CONFIG_FILE as CONFIG_FILE
from raytvb.models.model_folder import (
    Description,
    check_folder,
    folder_weights,
    read_description,
)
from raytvb.models.open_clip_package import (
    described_model,
    model_source,
    open_clip_package,
    tag_options,
)
from raytvb.models.pretrained_files import check_tensors, checked_file, load_values, outline
from raytvb.models.tokenizer_files import check_package, check_tokenizer, stored_tokenizer
from raytvb.models.weight_files import describe, read_values, tied_apart
from raytvb.storage.contract import JsonObject

WEIGHTS_FILE = "model.safetensors"
VISUAL = "visual."
"""Prefix of the names of the image tower's parameters."""

_SCHEMES = ("local-dir:", "hf-hub:")
"""How names of models that bring their own weights begin."""


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
    if config.name == TINY_MODEL or config.name.startswith(_SCHEMES):
        return
    names = open_clip_package().list_models()
    if config.name not in names:
        raise UserError(
            f"model.name: unknown model {shortened(config.name, 200)}; open_clip has "
            f"{', '.join(names)}; or use local-dir:PATH, hf-hub:OWNER/NAME or {TINY_MODEL}"
        )
    tags = open_clip_package().list_pretrained_tags_by_model(config.name)
    pretrained = config.pretrained
    if pretrained is not None and os.path.isdir(pretrained):
        raise UserError(
            f"model.pretrained: {pretrained} is a folder: give a file in it, or the folder as "
            f"`name: local-dir:{pretrained}` without `pretrained`"
        )
    if pretrained is None or not (pretrained in tags or os.path.isfile(pretrained)):
        raise UserError(
            f"model.pretrained: {pretrained!r} is neither a file nor a tag of {config.name}; "
            f"its tags: {', '.join(tags) or '(none)'}"
        )


def load_encoder(config: ModelConfig) -> Encoder:
    """Load the pretrained model that an experiment names, in float32.

    Raises UserError for an unknown model or tag (the message lists the known ones), for a
    description or a checkpoint that cannot be used (it names the file, and the field or the
    tensors), for weights that cannot be fetched, and for weights that are not finite.
    """
    check_names(config)
    if config.name == TINY_MODEL or config.name.startswith(_SCHEMES):
        folder = model_folder(config, with_weights=True)
        description = read_description(folder / CONFIG_FILE)
        fetched = config.name.startswith("hf-hub:")
        check_tokenizer(folder, description.model, str(description.path), fetched=fetched)
        encoder = load_folder(folder)
    else:
        named = open_clip_package().get_model_config(config.name)
        check_package(named, f"model.name: {config.name}")
        is_file = config.pretrained is not None and os.path.isfile(config.pretrained)
        encoder = _load_file(config, str(config.pretrained)) if is_file else _load_tag(config)
    _check_finite(encoder.model, config)
    return encoder


def model_folder(config: ModelConfig, *, with_weights: bool) -> Path:
    """The folder of a model that brings its own weights: on this machine, or fetched from the hub.

    Raises UserError if there is no such model.
    """
    if config.name.startswith("hf-hub:"):
        return fetched_folder(config.name, with_weights=with_weights)
    folder = Path(model_source(config).removeprefix("local-dir:"))
    check_folder(folder)
    return folder


def _load_file(config: ModelConfig, path: str) -> Encoder:
    """A model that open_clip knows by name, with the weights of a file."""
    beside, activation = checked_file(config, path)
    if activation.warning:
        warnings.warn(activation.warning, stacklevel=3)
    options = activation.options
    model = described_model(config.name, **options, **_preprocess_option(beside))
    if path.endswith(ARCHIVE):
        load_archive(model, path, config.name)
    else:
        load_values(model, read_values(path))
    return _encoder_of(model, _named_config(config.name, options))


def _preprocess_option(beside: Beside) -> dict[str, Any]:
    """How images are normalised, if a description beside the checkpoint says it."""
    options = {key: beside.preprocess[key] for key in beside.preprocess if key != "size"}
    return {"force_preprocess_cfg": options} if options else {}


def _load_tag(config: ModelConfig) -> Encoder:
    """A model that open_clip knows by name and tag. Its weights are fetched unless they are cached.

    Raises UserError if they cannot be fetched or loaded.
    """
    options = tag_options(config)
    with reached_soon():
        fetch_tag(config.name, str(config.pretrained))
        try:
            model = open_clip_package().create_model(
                config.name, config.pretrained, **options, require_pretrained=True
            )
        except (RuntimeError, OSError, ValueError, ImportError) as error:
            raise UserError(
                f"model {config.name} ({config.pretrained}) cannot be loaded "
                f"({described(error):.200}): delete its files in the cache of this machine and try "
                f"again, or give a checkpoint file as `pretrained`"
            ) from error
    return _encoder_of(model, _named_config(config.name, options))


def _named_config(name: str, options: Mapping[str, bool]) -> JsonObject:
    """open_clip's description of a model, with the activation that it was built with."""
    config: JsonObject = dict(open_clip_package().get_model_config(name))
    if options["force_quick_gelu"]:
        config["quick_gelu"] = True
    return config


def load_folder(folder: str | Path) -> Encoder:
    """Load the folder of an open_clip model, such as one with the files of `encoder_files`.

    Raises UserError for a description or weights that cannot be used.
    """
    folder, source = Path(folder), f"local-dir:{folder}"
    description = read_description(folder / CONFIG_FILE)
    path = folder_weights(folder)
    model = described_outline(source, description)
    check_tensors(describe(path), model, path, source, str(description.path))
    model = described_model(source)
    load_values(model, read_values(path))
    return _encoder_of(model, dict(description.model))


def described_outline(source: str, description: Description) -> nn.Module:
    """An outline of a model in a folder, which has made features of nothing.

    Raises UserError if open_clip cannot build or use what the description says.
    """
    text = description.model["text_cfg"]
    check_package(description.model, str(description.path), tokenizer=False)
    try:
        with reached_soon() if "hf_model_name" in text else nullcontext():
            model: Any = outline(source)
        side = _image_size(model.visual.preprocess_cfg)
        with torch.no_grad(), torch.device("meta"):
            shapes = [tower_features(model.visual(torch.empty(1, 3, side, side))).shape]
            if "hf_model_name" not in text:
                words = torch.zeros(1, text.get("context_length", 77), dtype=torch.int64)
                shapes.append(model.encode_text(words).shape)
        if any(tuple(shape) != (1, description.model["embed_dim"]) for shape in shapes):
            raise ValueError(f"its towers give {shapes} for one image and one text")
    except Exception as error:  # open_clip asserts, and torch raises, whatever they find
        raise UserError(
            f"{description.path}: open_clip cannot build the model that model_cfg describes "
            f"({described(error).partition(chr(10))[0]:.200}): correct it, or copy the file again "
            f"from where the model comes from"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _check_finite(model: nn.Module, config: ModelConfig) -> None:
    """Raise UserError that names the weights with NaN or infinite values.

    What is not stored with a model may be infinite, as attention masks are, but not NaN.
    """
    stored = model.state_dict()
    bad = not_finite(stored)
    for name, buffer in sorted(model.named_buffers()):
        if name not in stored and bool(buffer.isnan().any()):
            bad.append(name)
    if bad:
        raise UserError(
            f"model {config.name} ({config.pretrained or 'its own weights'}) has NaN or infinite "
            f"values in {listed(bad)}: use a checkpoint whose weights are finite in float32"
        )


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the image tower, from the model's description alone.

    Raises UserError for an unknown model, and for a description that cannot be used.
    """
    check_names(config)
    if config.name == TINY_MODEL or config.name.startswith(_SCHEMES):
        folder = model_folder(config, with_weights=False)
        description = read_description(folder / CONFIG_FILE)
        model = described_outline(f"local-dir:{folder}", description)
    else:
        named = open_clip_package().get_model_config(config.name)
        check_package(named, f"model.name: {config.name}", tokenizer=False)
        model = outline(config.name)
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


def encoder_files(
    encoder: Encoder, source: ModelConfig, target: Path | None = None
) -> dict[str, bytes]:
    """The files of an open_clip folder, by name; weights in float32.

    Names that share a tensor share it in the file, too: the metadata names those left out.

    target: the folder where the files will lie, with its full path; None if it is not on this
    machine. Raises UserError that names tensors that overlap without being equal.
    """
    config = json.loads(json.dumps(encoder.config))
    words, files = stored_tokenizer(config["text_cfg"], model_source(source), target)
    config["text_cfg"] |= words
    document = {"model_cfg": config, "preprocess_cfg": dict(encoder.preprocess.config)}
    files[CONFIG_FILE] = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    tensors, ties = tied_apart(encoder.model.state_dict())
    values = {n: t.float().contiguous() for n, t in tensors.items()}
    files[WEIGHTS_FILE] = save(values, metadata=ties or None)
    return files
