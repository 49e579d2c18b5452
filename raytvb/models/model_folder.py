"""The folder of an open_clip model: its description, weights and tokenizer, read with care."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytvb.errors import UserError, listed
from raytvb.models.model_fields import check_description

CONFIG_FILE = "open_clip_config.json"

_LONGEST = 1_000_000
"""Bytes of a description. Those of open_clip's models have less than 2,000."""

_WEIGHTS = (".safetensors", ".bin", ".pth")
"""Ends of the names under which open_clip looks for weights in a folder."""

_PREFERRED = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "model.safetensors"),
    *("pytorch_model.bin", "pytorch_model.pth", "model.pth"),
)
"""Names that open_clip prefers, the first of them first."""


@dataclass(frozen=True)
class Description:
    """A checked `open_clip_config.json`."""

    path: Path
    model: Mapping[str, Any]
    """`model_cfg`: the architecture, for open_clip."""
    preprocess: Mapping[str, Any]
    """`preprocess_cfg`: how images are resized and normalised; empty if nothing is said."""


def read_description(path: Path) -> Description:
    """The description of a model. Raises UserError that names the file, and the wrong field."""
    document = read_json(path)
    check_description(document, str(path))
    return Description(path, document["model_cfg"], document.get("preprocess_cfg") or {})


def read_json(path: Path) -> Any:
    """A small JSON file. Raises UserError that names the file and what is wrong with it."""
    try:
        if path.stat().st_size > _LONGEST:
            raise _no_json(path, "it has over 1 MB")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({(error.strerror or str(error)).lower()}): check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise _no_json(path, "it is no text in UTF-8") from error
    except RecursionError as error:
        raise _no_json(path, "it is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise _no_json(path, f"line {error.lineno}, column {error.colno}") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise _no_json(path, "a number in it is too long") from error


def _no_json(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is not valid JSON ({reason}): correct it, or copy it again from where the model "
        f"comes from"
    )


def check_folder(folder: Path) -> None:
    """Raise UserError unless the folder is there and has a description."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(
            f"model.name: the folder {folder} {what}: give the folder of an open_clip model as "
            f"local-dir:PATH"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"model.name: the folder {folder} has no {CONFIG_FILE}, so it is no open_clip model: "
            f"add that file, or give the weights as `pretrained` with the `name` of a model that "
            f"open_clip knows"
        )


def folder_weights(folder: Path) -> str:
    """The file of the weights that open_clip takes from a folder.

    Raises UserError if there is none, or several of which open_clip prefers none.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS)
    preferred = [name for name in _PREFERRED if name in names]
    if preferred:
        return str(folder / preferred[0])
    if len(names) == 1:
        return str(folder / names[0])
    if names:
        raise UserError(
            f"model.name: the folder {folder} has several files of weights ({listed(names, 5)}): "
            f"leave the right one there, or name it {_PREFERRED[0]}"
        )
    raise UserError(
        f"model.name: the folder {folder} has no weights: add them as {_PREFERRED[0]}, or as "
        f"{_PREFERRED[2]} if torch.save wrote them"
    )


def same(one: object, other: object) -> bool:
    """Whether two values of descriptions say the same: 4 and 4.0 do, and a list and a tuple."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
