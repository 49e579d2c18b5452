"""Checks of checkpoint files: every tensor is compared with the open_clip model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from raytvb.errors import UserError, listed
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.beside_checkpoint import Activation, Beside, activation_of, read_beside
from raytvb.models.big_vision import ARCHIVE
from raytvb.models.model_names import likely_models, other_naming
from raytvb.models.open_clip_package import described_model, open_clip_package
from raytvb.models.weight_files import OPENAI_NUMBERS, describe

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]

_NAMED = 5
"""A line names at most this many tensors."""


def check_checkpoint(config: ModelConfig, path: str) -> None:
    """Check the tensors of a checkpoint file against the model, without reading their values.

    Raises UserError for a file that is no checkpoint, and for tensors that are missing, unknown or
    of another shape. The check of open_clip itself is not enough: it first resizes position
    embeddings, so it would accept those of another model.
    """
    check_tensors(describe(path), outline(config.name), path, config.name)


def checked_file(config: ModelConfig, path: str) -> tuple[Beside, Activation]:
    """What lies beside a checkpoint that fits the model, and the activation for it.

    An archive of NumPy is not compared here, but where it is read. Raises UserError as
    `check_checkpoint`, and for what contradicts the name of the model.
    """
    beside, is_openai = read_beside(config, path), False
    if not path.endswith(ARCHIVE):
        tensors = describe(path)
        check_tensors(tensors, outline(config.name), path, config.name)
        is_openai = all(name in tensors for name in OPENAI_NUMBERS)
    return beside, activation_of(config, path, beside, is_openai=is_openai)


def activation_warnings(config: ModelConfig) -> list[str]:
    """A warning if nothing says with which activation a checkpoint file was trained.

    Reads no values, so it is quick for files of any size. Raises UserError as `checked_file`.
    """
    path = config.pretrained
    if path is None or not os.path.isfile(path):
        return []
    warning = checked_file(config, path)[1].warning
    return [warning] if warning else []


def outline(source: str, **options: Any) -> nn.Module:
    """A model without values, on the device "meta", in eval mode.

    source: open_clip's name of it. Takes next to no memory, whatever the size of the model.
    """
    described = json.dumps(open_clip_package().get_model_config(source), sort_keys=True)
    return _outline(source, described, tuple(sorted(options.items())))


@lru_cache(maxsize=4)
def _outline(source: str, described: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """As `outline`. described: so that another description of the same name is another model."""
    with torch.device("meta"):
        model: nn.Module = described_model(source, device="meta", **dict(options))
    return model.eval()


def check_tensors(
    tensors: Mapping[str, Tensor], model: nn.Module, path: str, name: str, description: str = ""
) -> None:
    """Raise UserError that says in which names and shapes the tensors of a file differ.

    model: an outline of the model `name`. description: the file that describes the model; '' if
    open_clip knows it by name. The message names the library whose names these are, or the models
    that have these shapes, if they are known.
    """
    problem = f"model.pretrained: {path} is not a checkpoint of {name}"
    if description:
        problem = f"model.name: {path} does not fit {description}"
    _check_naming(tensors, problem)
    try:
        shapes = {n: tuple(t.shape) for n, t in converted(tensors, model).items()}
    except Exception as error:  # open_clip's conversion of MobileCLIP raises errors of many kinds
        raise UserError(
            f"{problem}: its tensors have names of MobileCLIP that open_clip cannot convert; use a "
            f"checkpoint in open_clip's own format"
        ) from error
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    lines = differences(shapes, expected)
    if lines:
        hint = _hint(tensors, path, name, description)
        raise UserError("\n  ".join([f"{problem}: {hint}", *lines]))


def _check_naming(tensors: Mapping[str, Tensor], problem: str) -> None:
    """Raise UserError, which begins with the problem, for names of another library."""
    naming = other_naming(tensors)
    if naming is not None:
        likely = likely_models(tensors)
        sizes = f", in the sizes of {listed(likely, 3)}" if likely else ""
        raise UserError(
            f"{problem}: its tensors have the names of {naming.owner}{sizes}, such as "
            f"{min(tensors):.80}; {naming.remedy}"
        )


def _hint(tensors: Mapping[str, Tensor], path: str, name: str, description: str) -> str:
    """What the file may be instead, and what to do."""
    likely = likely_models(tensors)
    if "-of-0" in path:
        return "it is one of several parts; join them into one file"
    if likely and name not in likely and not description:
        return f"its sizes are those of {listed(likely, 3)}; give that as `model.name`"
    if likely and description:
        return f"its sizes are those of {listed(likely, 3)}; correct the description"
    if description:
        return "correct the description, or use the weights that belong to it"
    return "use the checkpoint of this model, or the name of the model that it belongs to"


def converted(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors by the names that open_clip's model has for them.

    open_clip converts checkpoints of MobileCLIP, and older ones of models with a text tower of its
    own. Numbers that only describe OpenAI's models, and positions that need not be stored, are left
    out.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state: dict[str, Tensor] = dict(tensors)
    for name in OPENAI_NUMBERS:
        state.pop(name, None)
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = dict(convert_to_custom_text_state_dict(state))
    own = model.state_dict()
    for name in [name for name in state if name.endswith("position_ids") and name not in own]:
        del state[name]
    return state


def load_values(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a checked file into the model, in the model's own dtypes.

    A logit bias that the file lacks is zero, as in open_clip.
    """
    state = converted(tensors, model)
    own = model.state_dict()
    for name, tensor in own.items():
        if name == "logit_bias" and name not in state:
            state[name] = torch.zeros_like(tensor)
        if state[name].shape != tensor.shape:  # one number, as () or as (1,)
            state[name] = state[name].reshape(tensor.shape)
    model.load_state_dict(state)


def differences(shapes: Shapes, expected: Shapes) -> list[str]:
    """Differences between a file's tensors and the model's, one line for each kind."""
    resized = []
    for name, shape in sorted(shapes.items()):
        if name in expected and _differ(shape, expected[name]):
            resized.append(f"{name:.80} {shape} instead of {expected[name]}")
    missing = sorted(expected.keys() - shapes.keys() - {"logit_bias"})
    unknown = sorted(shapes.keys() - expected.keys())
    lines = []
    for title, items in (
        ("missing", missing),
        ("not in the model", unknown),
        ("of another shape", resized),
    ):
        if items:
            lines.append(f"{title}: {_some(items)}")
    return lines


def _some(items: Sequence[str]) -> str:
    more = f", … and {len(items) - _NAMED:,} more" if len(items) > _NAMED else ""
    return ", ".join(f"{item:.160}" for item in items[:_NAMED]) + more


def _differ(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether shapes differ. () and (1,) count as equal, since files store scalars either way."""
    return shape != expected and not prod(shape) == prod(expected) == 1
