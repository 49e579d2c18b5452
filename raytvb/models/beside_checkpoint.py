"""What the files beside a checkpoint say about its model: the activation, the normalisation.

Weights do not tell which activation they were trained with. With the other one a model still works,
but it loses points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytvb.errors import UserError, shortened
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.model_folder import CONFIG_FILE, read_description, read_json, same
from raytvb.models.open_clip_package import open_clip_package

_HUGGING_FACE = "config.json"

_IRRELEVANT = {
    *("patch_dropout", "timm_model_pretrained", "timm_drop", "timm_drop_path", "output_tokens"),
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "hf_model_pretrained"),
}
"""Fields that change nothing about the features of a finished model, or only its tokenizer."""


@dataclass(frozen=True)
class Beside:
    """What lies beside a checkpoint."""

    quick_gelu: bool | None = None
    """Whether the activation is QuickGELU; None if nothing says it."""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    """open_clip's `preprocess_cfg`; empty if nothing says it."""
    source: str = ""
    """The file that says it."""
    is_said: bool = False
    """Whether the file names the activation. If an open_clip description does not, it is GELU."""


def read_beside(config: ModelConfig, path: str) -> Beside:
    """What the files beside a checkpoint say: beside the given path, else beside what it links to.

    A cache of the hub has links under the right names to files that lie elsewhere. Raises UserError
    for a description that is broken, or that is one of another model than `config.name`.
    """
    given, target = Path(path).absolute().parent, Path(path).resolve().parent
    for folder in dict.fromkeys((given, target)):
        if any((folder / name).is_file() for name in (CONFIG_FILE, _HUGGING_FACE)):
            return _read_in(config, folder)
    return Beside()


def _read_in(config: ModelConfig, folder: Path) -> Beside:
    """What the descriptions in a folder say."""
    if (folder / CONFIG_FILE).is_file():
        description = read_description(folder / CONFIG_FILE)
        differences = list(_differences(config.name, description.model))
        if differences:
            raise UserError(
                f"model.name: {description.path} beside the checkpoint describes another model "
                f"than {config.name}: {'; '.join(differences[:5])}; give the right name, or use "
                f"`name: local-dir:{folder}` without `pretrained`, or move the checkpoint to a "
                f"folder of its own"
            )
        quick = bool(description.model.get("quick_gelu", False))
        is_said = "quick_gelu" in description.model
        return Beside(quick, description.preprocess, str(description.path), is_said)
    act = _hidden_act(folder / _HUGGING_FACE)
    return Beside(act, {}, str(folder / _HUGGING_FACE), act is not None)


def _hidden_act(path: Path) -> bool | None:
    """Whether Hugging Face's description names QuickGELU; None if it names no activation of ours.

    Such a file may belong to anything, so it is no error if it is not understood.
    """
    try:
        document = read_json(path)
    except UserError:
        return None
    names = set()
    for section in ("vision_config", "text_config", "vision_config_dict", "text_config_dict"):
        part = document.get(section) if isinstance(document, dict) else None
        if isinstance(part, dict) and isinstance(part.get("hidden_act"), str):
            names.add(part["hidden_act"])
    known = {"quick_gelu": True, "gelu": False}
    return known.get(names.pop()) if len(names) == 1 else None


def _differences(name: str, described: Mapping[str, Any]) -> Iterator[str]:
    """What a description says otherwise than open_clip's own one of `name`, one text each."""
    named = open_clip_package().get_model_config(name)
    sections = ({"embed_dim": ""}, *(_whole(model) for model in (named, described)))
    for key in sections[0]:
        if named[key] != described[key]:
            yield f"{key} is {described[key]} instead of {named[key]}"
    if bool(named.get("quick_gelu")) and not described.get("quick_gelu"):
        yield "it has no quick_gelu: true"
    for key, value in sections[1].items():
        if not same(value, sections[2].get(key)):
            yield f"{key} is {shortened(sections[2].get(key))} instead of {shortened(value)}"


def _whole(model: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of both towers, with open_clip's defaults for those that are left out."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    values: dict[str, Any] = {}
    for section, contract in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        for key, value in dataclasses.asdict(contract(**model[section])).items():
            if key not in _IRRELEVANT:
                values[f"{section}.{key}"] = value
    return values


@dataclass(frozen=True)
class Activation:
    """The activation that a model is built with."""

    is_quick: bool
    """Whether it is QuickGELU."""
    warning: str = ""
    """What the user should know; '' if something says which activation is right."""

    @property
    def options(self) -> dict[str, bool]:
        """The options with which open_clip builds the model."""
        return {"force_quick_gelu": self.is_quick}


def activation_of(config: ModelConfig, path: str, beside: Beside, *, is_openai: bool) -> Activation:
    """The activation for a checkpoint: from what lies beside it, else from the model's name.

    is_openai: whether the file has what only OpenAI's own files have. Raises UserError if what lies
    beside the checkpoint contradicts the name.
    """
    named = open_clip_package().get_model_config(config.name)
    has_quick = bool(named.get("quick_gelu", False))
    if has_quick and beside.quick_gelu is False:
        raise UserError(
            f"model.name: {config.name} has the activation QuickGELU, but {beside.source} beside "
            f"the checkpoint says GELU: give {config.name.removesuffix('-quickgelu')} as the name, "
            f"or correct that file"
        )
    if beside.quick_gelu or (is_openai and not beside.is_said):
        return Activation(True)
    if beside.quick_gelu is None and not has_quick and not _activation_is_fixed(named):
        return Activation(False, _unknown_activation(config.name, path))
    return Activation(has_quick)


def _activation_is_fixed(model: Mapping[str, Any]) -> bool:
    """Whether both towers come from other libraries, which take no notice of QuickGELU."""
    return "timm_model_name" in model["vision_cfg"]


def _unknown_activation(name: str, path: str) -> str:
    other = f"{name}-quickgelu"
    if other in open_clip_package().list_models():
        remedy = f"give `name: {other}`"
    else:
        remedy = f"put its {CONFIG_FILE} with `quick_gelu: true` beside it"
    return (
        f"nothing beside {path} says which activation its weights were trained with, so that of "
        f"{name} is used, which is GELU; if it is QuickGELU, as for the weights of OpenAI and DFN, "
        f"{remedy}"
    )
