"""Recognises whose names the tensors of a checkpoint have, and which open_clip models they fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raytvb.models.open_clip_package import open_clip_package

_OWN = ("visual.", "text.", "transformer.resblocks.", "token_embedding.", "positional_embedding")
"""How open_clip's names begin."""

_TAGS = (
    "for weights that open_clip knows give its tag, as in `name: ViT-B-32-quickgelu` with "
    "`pretrained: openai`; else use the file in open_clip's own format, which repositories often "
    "have as open_clip_model.safetensors or open_clip_pytorch_model.bin"
)


@dataclass(frozen=True)
class Naming:
    """The names of another library."""

    pattern: str
    """A regular expression that one of the names begins with."""
    owner: str
    remedy: str


_NAMINGS = (
    Naming(
        r"(vision_model|text_model)\.(encoder|embeddings)\.", "Hugging Face's CLIP or SigLIP", _TAGS
    ),
    Naming(r".*\.?lora_[AB]\b", "an adapter (LoRA)", "merge the adapter into its model first"),
    Naming(
        r".*\.(SCB|quant_state|qweight|absmax)", "quantised weights", "use the unquantised ones"
    ),
    Naming(r"visual_encoder\.|text_decoder\.bert", "BLIP", "BLIP has no counterpart in open_clip"),
    Naming(
        r"(blocks\.\d+\.|patch_embed\.|cls_token$|stages\.\d+\.)",
        "an image tower of timm or DINO",
        "an image tower alone has no text tower; use a whole model of open_clip",
    ),
    Naming(
        r"(encoder\.layers\.encoder_layer_|conv_proj\.|layer1\.\d+\.|features\.\d+\.)",
        "a classifier of torchvision",
        "a classifier has no text tower; use a whole model of open_clip",
    ),
    Naming(
        r"(conv1|class_embedding|ln_pre|transformer\.resblocks|proj)\b.*",
        "one tower of a CLIP model",
        "save the state_dict of the whole model",
    ),
    Naming(
        r"(down_blocks|up_blocks|model\.diffusion_model|first_stage_model)\.",
        "a diffusion model",
        "use a model of open_clip",
    ),
    Naming(
        r"(bert|roberta|embeddings\.word_embeddings|model\.layers\.\d+|layers\.\d+\.self_attn)",
        "a language model",
        "use a model of open_clip",
    ),
)


def other_naming(names: Iterable[str]) -> Naming | None:
    """The library whose names these are; None for names of open_clip, and for unknown ones."""
    every = sorted(names)
    if any(name.startswith("visual.") for name in every):
        return None
    for naming in _NAMINGS:
        if any(re.match(naming.pattern, name) for name in every):
            return naming
    return None


def likely_models(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the open_clip models that have these sizes, if they can be told."""
    sizes = _sizes_of_tensors(tensors)
    if sizes is None:
        return []
    package = open_clip_package()
    found = []
    for name in package.list_models():
        if _sizes_of_config(package.get_model_config(name)) == sizes:
            found.append(name)
    return found


def _shape(tensors: Mapping[str, Tensor], *names: str) -> tuple[int, ...]:
    for name in names:
        if name in tensors:
            return tuple(tensors[name].shape)
    return ()


def _layers(tensors: Mapping[str, Tensor], *prefixes: str) -> int:
    pattern = re.compile("|".join(rf"{re.escape(prefix)}(\d+)\." for prefix in prefixes))
    matches = filter(None, map(pattern.match, tensors))
    return len({match.group(match.lastindex or 0) for match in matches})


def _sizes_of_tensors(tensors: Mapping[str, Tensor]) -> tuple[Any, ...] | None:
    """Width, patch, layers, image and embedding of the image tower, then those of the text tower.

    None for a model that has no vision transformer of open_clip or Hugging Face.
    """
    patch = _shape(tensors, "visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
    places = _shape(
        tensors,
        "visual.positional_embedding",
        "vision_model.embeddings.position_embedding.weight",
    )
    words = _shape(
        tensors,
        *("token_embedding.weight", "text.token_embedding.weight"),
        "text_model.embeddings.token_embedding.weight",
    )
    texts = _shape(
        tensors,
        *("positional_embedding", "text.positional_embedding"),
        "text_model.embeddings.position_embedding.weight",
    )
    hugging, own = _shape(tensors, "visual_projection.weight"), _shape(tensors, "visual.proj")
    if len(patch) != 4 or not (len(places) == len(words) == len(texts) == 2):
        return None
    layers = _layers(tensors, "visual.transformer.resblocks.", "vision_model.encoder.layers.")
    text_layers = _layers(
        tensors,
        *("transformer.resblocks.", "text.transformer.resblocks."),
        "text_model.encoder.layers.",
    )
    embedding = own[-1] if own else (hugging or (0,))[0]
    image = (patch[0], patch[3], layers, places[0] - 1, embedding)
    return (*image, words[1], text_layers, words[0], texts[0])


def _sizes_of_config(config: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The same of a model's configuration."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in config:
        return None
    side, patch, layers = vision["image_size"], vision.get("patch_size", 16), vision["layers"]
    if not isinstance(layers, int):
        return None
    image = (vision["width"], patch, layers, (side // patch) ** 2, config["embed_dim"])
    return (
        *image,
        *(text.get("width", 512), text.get("layers", 12)),
        *(text.get("vocab_size", 49408), text.get("context_length", 77)),
    )
