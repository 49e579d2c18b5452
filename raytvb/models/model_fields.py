"""Checks the description of a model, `open_clip_config.json`, before anything is built from it.

open_clip builds whatever it is told to, and says little where it cannot. So each field is compared
with the type that open_clip gives it, and with a bound, so that no description fills the memory.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from raytvb.errors import UserError, listed, shortened

_MOST: dict[str, float] = {
    **{"layers": 200, "width": 65_536, "embed_dim": 65_536, "heads": 4096, "head_width": 65_536},
    **{"image_size": 4096, "patch_size": 4096, "context_length": 8192, "vocab_size": 10_000_000},
    **{"mlp_ratio": 64, "patch_dropout": 0.99, "eos_id": 10_000_000, "pad_id": 10_000_000},
}
"""The largest values of fields; more than the largest models have."""

_MOST_PATCHES = 65_536
"""Patches of an image."""

_FROM_ZERO = ("patch_dropout", "eos_id", "pad_id", "timm_drop", "timm_drop_path", "ls_init_value")
_BELOW_ZERO = ("init_logit_scale", "init_logit_bias")

_CHOICES = {
    "vision_cfg.pool_type": ("tok", "avg"),
    "vision_cfg.block_type": ("default", "custom"),
    "text_cfg.block_type": ("default", "custom"),
    "vision_cfg.pos_embed_type": ("learnable", "sin_cos_2d"),
    "text_cfg.pool_type": ("first", "last", "argmax", "eos"),
    "text_cfg.proj_type": ("linear", "none"),
}

_PREPROCESS: dict[str, tuple[str, ...]] = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
}


class FieldError(Exception):
    """A field that cannot be used."""

    def __init__(self, field: str, problem: str) -> None:
        """problem: what was found, and what is allowed."""
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


def check_description(document: object, where: str) -> None:
    """Raise UserError unless a whole `open_clip_config.json` is usable; `where` names the file."""
    try:
        whole = _section(document, "")
        if "model_cfg" not in whole:
            raise FieldError("model_cfg", "is missing; it describes the model")
        _check_model(_section(whole["model_cfg"], "model_cfg"))
        if whole.get("preprocess_cfg") is not None:
            _check_preprocess(_section(whole["preprocess_cfg"], "preprocess_cfg"))
    except FieldError as error:
        name = error.field or "the document"
        raise UserError(
            f"{where}: {name} {error.problem}; correct the file, or copy it again from where the "
            f"model comes from"
        ) from None


def _section(value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(field, f"is {shortened(value)} instead of an object with fields")
    return value


def _check_model(model: Mapping[str, Any]) -> None:
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    known = {"custom_text", *inspect.signature(CustomTextCLIP).parameters}
    if "multimodal_cfg" in model:
        known |= set(inspect.signature(CoCa).parameters)
        if model.get("custom_text") is not True:
            raise FieldError("model_cfg.custom_text", "must be true where there is multimodal_cfg")
    _check_known(model, known - {"cast_dtype", "output_dict"}, "model_cfg")
    for name in ("embed_dim", "vision_cfg", "text_cfg"):
        if name not in model:
            raise FieldError(f"model_cfg.{name}", "is missing")
    _check_number(model["embed_dim"], "embed_dim", "model_cfg.embed_dim", whole=True)
    for name in ("quick_gelu", "custom_text", "nonscalar_logit_scale"):
        if not isinstance(model.get(name, False), bool):
            raise _other(f"model_cfg.{name}", model[name], "true or false")
    for name in _BELOW_ZERO:
        if model.get(name) is not None:
            _check_number(model[name], name, f"model_cfg.{name}", whole=False)
    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    for name, contract in towers.items():
        if name in model:
            _check_tower(_section(model[name], f"model_cfg.{name}"), contract, name)
    _check_patches(model["vision_cfg"])
    _check_heads(model)


def _check_tower(tower: Mapping[str, Any], contract: Any, section: str) -> None:
    """Compare each field of a tower with the type in open_clip's own dataclass."""
    hints = typing.get_type_hints(contract)
    other_library = "timm_model_name" in tower or isinstance(tower.get("layers"), list)
    _check_known(tower, set(hints), f"model_cfg.{section}")
    for name, value in tower.items():
        field = f"model_cfg.{section}.{name}"
        choices = _CHOICES.get(f"{section}.{name}")
        is_absent = value is None and (getattr(contract, name) is None or other_library)
        if choices and value not in choices and not is_absent:
            raise _other(field, value, " or ".join(choices))
        if not is_absent:
            _check_value(value, hints[name], name, field)
    if tower.get("timm_model_name") is not None:
        _check_timm(tower["timm_model_name"], f"model_cfg.{section}.timm_model_name")


def _check_timm(name: str, field: str) -> None:
    """Raise FieldError unless timm knows the model by itself, without a hub."""
    import timm

    if not timm.is_model(name):
        raise FieldError(
            field, f"is {shortened(name)}, which timm {timm.__version__} does not know"
        )


def _check_value(value: object, hint: Any, name: str, field: str) -> None:
    kinds = set(_kinds(hint))
    if isinstance(value, list) and dict not in kinds:
        if tuple not in kinds:
            raise _other(field, value, "a single value")
        if len(value) not in ((4,) if name == "layers" else (2,)):
            raise FieldError(field, f"is {shortened(value)}: it has {len(value)} numbers")
        for item in value:
            _check_number(item, name, field, whole=True)
        if name == "image_size" and value[0] != value[1]:
            raise FieldError(field, f"is {shortened(value)}; only square images are supported")
    elif bool in kinds:
        if not isinstance(value, bool):
            raise _other(field, value, "true or false")
    elif float in kinds or int in kinds:
        _check_number(value, name, field, whole=float not in kinds and name != "mlp_ratio")
    elif str in kinds:
        if not isinstance(value, str):
            raise _other(field, value, "text")
    elif dict in kinds:
        _check_options(_section(value, field), name, field)


def _kinds(hint: Any) -> Iterator[type]:
    """The plain types in a type hint: those of `Optional[int]` are int and NoneType."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _kinds(part)
    else:
        yield origin or hint


def _check_options(options: Mapping[str, Any], name: str, field: str) -> None:
    if name == "act_kwargs":
        _check_known(options, {"approximate"}, field)
        if options.get("approximate", "none") not in ("none", "tanh"):
            raise _other(f"{field}.approximate", options["approximate"], "none or tanh")
    elif name == "norm_kwargs":
        _check_known(options, {"eps"}, field)
        if "eps" in options:
            _check_number(options["eps"], "mlp_ratio", f"{field}.eps", whole=False)


def _check_number(value: object, name: str, field: str, *, whole: bool) -> None:
    what = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise _other(field, value, what)
    assert isinstance(value, int | float)
    most = _MOST.get(name, 1_000_000)
    least = -most if name in _BELOW_ZERO else 0
    above = value >= least if name in (*_FROM_ZERO, *_BELOW_ZERO) else value > least
    if not (above and value <= most) or not math.isfinite(value):
        border = "from" if least or name in _FROM_ZERO else "above"
        raise _other(field, value, f"{what} {border} {least:,} up to {most:,}")


def _check_known(section: Mapping[str, Any], known: set[str], field: str) -> None:
    unknown = sorted(map(str, section.keys() - known))
    if unknown:
        raise FieldError(
            field,
            f"has the unknown field {listed(unknown, 3)}; open_clip knows "
            f"{listed(sorted(known), 40)}",
        )


def _check_patches(vision: Mapping[str, Any]) -> None:
    """Raise FieldError for more patches than any model has, and for images below one patch."""
    side, patch = vision.get("image_size", 224), vision.get("patch_size") or 16
    side = side[0] if isinstance(side, list) else side
    patch = patch[0] if isinstance(patch, list) else patch
    has_patches = "timm_model_name" not in vision and not isinstance(vision.get("layers"), list)
    if has_patches and not 1 <= (side // patch) ** 2 <= _MOST_PATCHES:
        raise FieldError(
            "model_cfg.vision_cfg.patch_size",
            f"is {patch} for images of {side} pixels: {(side // patch) ** 2:,} patches; "
            f"there must be 1 to {_MOST_PATCHES:,}",
        )


def _check_heads(model: Mapping[str, Any]) -> None:
    """Raise FieldError for a width that the attention heads do not divide."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    if "timm_model_name" not in vision and not isinstance(vision.get("layers"), list):
        width, head = vision.get("width", 768), vision.get("head_width", 64)
        if width % head:
            raise FieldError(
                "model_cfg.vision_cfg.width", f"is {width}, not a multiple of head_width {head}"
            )
    if "hf_model_name" not in text:
        width, heads = text.get("width", 512), text.get("heads", 8)
        if width % heads:
            raise FieldError(
                "model_cfg.text_cfg.width", f"is {width}, not a multiple of its {heads} heads"
            )


def _check_preprocess(options: Mapping[str, Any]) -> None:
    known = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise FieldError(
            "preprocess_cfg",
            f"has the unknown field {listed(unknown, 3)}; open_clip knows {listed(sorted(known))}",
        )
    color = options.get("fill_color")
    if color is not None and (color not in range(256) or isinstance(color, bool)):
        raise _other("preprocess_cfg.fill_color", color, "a whole number from 0 to 255")
    for name in ("mean", "std"):
        if options.get(name) is not None:
            _check_channels(options[name], name)
    for name, choices in _PREPROCESS.items():
        if options.get(name) is not None and options[name] not in choices:
            raise _other(f"preprocess_cfg.{name}", options[name], " or ".join(choices))
    if options.get("size") is not None:
        sides = options["size"] if isinstance(options["size"], list) else [options["size"]] * 2
        for side in sides:
            _check_number(side, "image_size", "preprocess_cfg.size", whole=True)
        if not sides or min(sides) != max(sides):
            raise _other("preprocess_cfg.size", options["size"], "the side of a square image")


def _check_channels(values: object, name: str) -> None:
    field = f"preprocess_cfg.{name}"
    good = isinstance(values, list) and len(values) == 3
    for value in values if isinstance(values, list) else ():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and is_number and (0 if name == "mean" else 0.001) <= value <= 1
    if not good:
        kind = "numbers" if name == "mean" else "numbers above 0"
        allowed = f"three {kind} up to 1, for red, green and blue of pixels from 0 to 1"
        raise _other(field, values, allowed)


def _other(field: str, value: object, allowed: str) -> FieldError:
    return FieldError(field, f"is {shortened(value)}; it must be {allowed}")
