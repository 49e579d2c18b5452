"""open_clip models: loading, fingerprint, zero-shot heads, and the image classifier that is fine-tuned.

A model is kept in a store as an ordinary open_clip folder (`open_clip_config.json`, `model.safetensors`), so workers
and users load it with open_clip's own `local-dir:` scheme and need no hub.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raytvb import suite
from raytvb.config import TINY_MODEL, ModelConfig
from raytvb.errors import UserError

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "model.safetensors"
VISUAL = "visual."
Tokenizer = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Preprocess:
    """How pixels become the tower's input: side of the square image in pixels, and mean and deviation per channel."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Mapping[str, Any]

    def normalise(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 to normalised float32 of the same shape."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images.float() / 255.0 - mean) / std


@dataclass(frozen=True)
class Encoder:
    """A loaded open_clip model in eval mode on the CPU, its configuration and preprocessing."""

    model: nn.Module
    config: Mapping[str, Any]
    preprocess: Preprocess

    def visual_state(self) -> dict[str, Tensor]:
        """Parameters of the image tower by their open_clip names (`visual.…`): what a task vector covers."""
        return {n: p.detach() for n, p in self.model.named_parameters() if n.startswith(VISUAL)}

    def fingerprint(self) -> str:
        """sha256 over names, shapes and float32 values of the image tower's parameters."""
        digest = hashlib.sha256()
        for name, value in sorted(self.visual_state().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.float().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _open_clip() -> Any:
    """The open_clip package, imported at first use: the driver and the basis actor save its seconds."""
    import open_clip

    return open_clip


def model_source(config: ModelConfig) -> str:
    """What open_clip calls the model."""
    return f"local-dir:{suite.MODEL_DIR}" if config.name == TINY_MODEL else config.name


def _tag_options(config: ModelConfig) -> dict[str, Any]:
    """open_clip only warns where a tag was trained with QuickGELU and the named model has GELU: use what it had."""
    tag = _open_clip().get_pretrained_cfg(config.name, config.pretrained) if config.pretrained else None
    return {"force_quick_gelu": bool(tag and tag.get("quick_gelu", False))}


def check_names(config: ModelConfig) -> None:
    """Raise UserError for an unknown model or tag, with those that exist."""
    if config.name == TINY_MODEL or config.name.startswith(("local-dir:", "hf-hub:")):
        return
    known = _open_clip().list_models()
    if config.name not in known:
        raise UserError(f"model.name: unknown model {config.name!r}; open_clip has {', '.join(known)}; or use "
                        f"local-dir:PATH, hf-hub:OWNER/NAME or {TINY_MODEL}")
    tags = _open_clip().list_pretrained_tags_by_model(config.name)
    if config.pretrained is None or not (config.pretrained in tags or os.path.isfile(config.pretrained)):
        raise UserError(f"model.pretrained: {config.pretrained!r} is neither a file nor a tag of {config.name}; "
                        f"its tags: {', '.join(tags) or '(none)'}")


def load_encoder(config: ModelConfig) -> Encoder:
    """Load the pretrained model that an experiment names, in float32.

    Raises UserError for an unknown model or tag (with those that exist), a checkpoint file whose tensors are not those
    of the model (with all that differ), and weights that cannot be loaded.
    """
    check_names(config)
    source = model_source(config)
    if config.pretrained is not None and os.path.isfile(config.pretrained):
        _check_checkpoint(config, config.pretrained)
    try:
        model = _open_clip().create_model(source, config.pretrained, **_tag_options(config), require_pretrained=True)
        model_config = dict(_open_clip().get_model_config(source))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"model {config.name} ({config.pretrained or 'its own weights'}) cannot be loaded: "
                        f"{error}") from error
    if _tag_options(config)["force_quick_gelu"]:
        model_config["quick_gelu"] = True
    return _finish(model, model_config)


def _check_checkpoint(config: ModelConfig, path: str) -> None:
    """Raise UserError that lists every tensor of a checkpoint file that the model lacks, needs or has otherwise.

    open_clip's own check comes after it has resized position embeddings, so it would take those of another model.
    """
    if path.endswith((".npz", ".npy")):
        return  # open_clip converts these from another framework, name by name
    from open_clip.factory import convert_state_dict, load_state_dict

    try:
        found = load_state_dict(path)
        model = _open_clip().create_model(config.name, load_weights=False, **_tag_options(config))
        found = {n: tuple(t.shape) for n, t in convert_state_dict(model, found).items()}
    except Exception as error:  # what unpickling, safetensors and conversion raise for other files
        kind = type(error).__name__
        reason = "it holds other Python objects" if kind == "UnpicklingError" else f"{kind}: {error}".splitlines()[0]
        raise UserError(f"model.pretrained: {path} cannot be read as a checkpoint: {reason}. Save the model's "
                        f"state_dict alone, best as safetensors; nothing else is unpickled") from error
    if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
        return  # the text tower is named otherwise in older files; open_clip renames it
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    optional = {"logit_bias"} | {n for n in found if n.endswith("position_ids")}
    scalars = {n for n in found.keys() & expected.keys() if prod(found[n]) == prod(expected[n]) == 1}
    lines = [f"missing: {', '.join(sorted(expected.keys() - found.keys() - optional))}",
             f"not in the model: {', '.join(sorted(found.keys() - expected.keys() - optional))}",
             "of another shape: " + ", ".join(f"{n} {found[n]} instead of {expected[n]}" for n in sorted(
                 found.keys() & expected.keys() - scalars) if found[n] != expected[n])]
    lines = [line for line in lines if not line.endswith(": ")]
    if lines:
        raise UserError(f"model.pretrained: {path} is no checkpoint of {config.name}\n  " + "\n  ".join(lines))


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the image tower, from the model's configuration alone. Raises UserError for an unknown model."""
    check_names(config)
    model = _open_clip().create_model(model_source(config), load_weights=False)
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(VISUAL))


def random_tower(name: str) -> tuple[nn.Module, int]:
    """The image tower of a named model with random weights, and the side of its images in pixels.

    Raises UserError for an unknown name.
    """
    known = _open_clip().list_models()
    if name not in known:
        raise UserError(f"unknown model {name!r}; open_clip has {', '.join(known)}")
    visual = _open_clip().create_model(name, load_weights=False).visual
    return visual, int(visual.preprocess_cfg["size"][0] if isinstance(visual.preprocess_cfg["size"], Sequence)
                       else visual.preprocess_cfg["size"])


def load_folder(folder: str | Path) -> Encoder:
    """Load an open_clip folder that `encoder_files` wrote."""
    model = _open_clip().create_model(f"local-dir:{folder}", require_pretrained=True)
    return _finish(model, _open_clip().get_model_config(f"local-dir:{folder}"))


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
    files[WEIGHTS_FILE] = save({n: t.float().contiguous() for n, t in encoder.model.state_dict().items()})
    return files


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The model's tokenizer; a BPE file named in the configuration is looked for in the model's own folder."""
    source = model_source(config)
    options: dict[str, Any] = {}
    if source.startswith("local-dir:"):
        folder = Path(source.removeprefix("local-dir:"))
        bpe = _open_clip().get_model_config(source).get("text_cfg", {}).get("tokenizer_kwargs", {}).get("bpe_path")
        if bpe is not None:
            beside = folder / Path(bpe).name  # a merged folder has the path of where it was written
            options["bpe_path"] = str(beside if beside.is_file() else folder / bpe)
    return _open_clip().get_tokenizer(source, **options)


@torch.no_grad()
def zero_shot_head(encoder: Encoder, tokenizer: Tokenizer, classes: Sequence[str],
                   templates: Sequence[str]) -> Tensor:
    """Text embeddings of the classes (C, E) float32: mean over templates of unit vectors, made unit length, times the
    logit scale, so that logits are unit image features @ head.T. An underscore in a name is read as a space."""
    model: Any = encoder.model
    words = [c.replace("_", " ") for c in classes]
    total = sum(model.encode_text(tokenizer([t.format(w) for w in words]), normalize=True) for t in templates)
    return nn.functional.normalize(total, dim=-1) * model.logit_scale.exp()


class ImageClassifier(nn.Module):
    """The image tower with a frozen zero-shot head: normalised images (N, 3, H, W) to logits (N, C).

    Its parameters are those of the tower, under their open_clip names (`visual.…`).
    """

    head: Tensor

    def __init__(self, visual: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("head", head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits; the features are made unit length, the logit scale is part of the head."""
        found = self.visual(images)
        features = found[0] if isinstance(found, tuple) else found  # CoCa's tower gives its tokens as well
        return nn.functional.normalize(features, dim=-1) @ self.head.T


def quiet_open_clip() -> None:
    """open_clip logs a page per model on the root logger; keep its errors only."""
    logging.getLogger().setLevel(max(logging.getLogger().level, logging.ERROR))
