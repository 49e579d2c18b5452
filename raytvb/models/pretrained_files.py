"""Checks of checkpoint files: every tensor is compared with the open_clip model."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TypeAlias

from torch import nn

from raytvb.errors import UserError
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.open_clip_package import open_clip_package, tag_options

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


def check_checkpoint(config: ModelConfig, path: str) -> None:
    """Check the tensors of a checkpoint file against the model.

    Raises UserError that lists every tensor that is missing, unknown or of another shape. The check
    of open_clip itself is not enough: it first resizes position embeddings, so it would accept
    those of another model.
    """
    if path.endswith((".npz", ".npy")):
        return  # open_clip converts these from another framework, name by name
    model, shapes = _read(config, path)
    if "positional_embedding" in shapes and not hasattr(model, "positional_embedding"):
        return  # older files have other names for the text tower; open_clip renames them
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    lines = _differences(shapes, expected)
    if lines:
        raise UserError(
            f"model.pretrained: {path} is not a checkpoint of {config.name}\n  "
            + "\n  ".join(lines)
        )


def _read(config: ModelConfig, path: str) -> tuple[nn.Module, Shapes]:
    """The model without weights, and the shapes of the file's tensors by open_clip's names.

    Raises UserError if the file cannot be read as a checkpoint.
    """
    from open_clip.factory import convert_state_dict, load_state_dict

    try:
        state = load_state_dict(path)
        model: nn.Module = open_clip_package().create_model(
            config.name, load_weights=False, **tag_options(config)
        )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in convert_state_dict(model, state).items():
            shapes[name] = tuple(tensor.shape)
    # For other files, unpickling, safetensors and conversion raise many kinds of errors.
    except Exception as error:
        kind = type(error).__name__
        reason = f"{kind}: {error}".splitlines()[0]
        if kind == "UnpicklingError":
            reason = "it holds other Python objects"
        raise UserError(
            f"model.pretrained: {path} cannot be read as a checkpoint: {reason}. Save the model's "
            f"state_dict alone, best as safetensors; nothing else is unpickled"
        ) from error
    return model, shapes


def _differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """Differences between a file's tensors and the model's, one line for each kind."""
    optional = {"logit_bias"}
    resized = []
    for name, shape in sorted(shapes.items()):
        if name.endswith("position_ids"):
            optional.add(name)
        if name in expected and _differ(shape, expected[name]):
            resized.append(f"{name} {shape} instead of {expected[name]}")
    missing = sorted(expected.keys() - shapes.keys() - optional)
    unknown = sorted(shapes.keys() - expected.keys() - optional)
    lines = []
    for title, items in (
        ("missing", missing),
        ("not in the model", unknown),
        ("of another shape", resized),
    ):
        if items:
            lines.append(f"{title}: {', '.join(items)}")
    return lines


def _differ(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether shapes differ. () and (1,) count as equal, since files store scalars either way."""
    return shape != expected and not prod(shape) == prod(expected) == 1
