"""SigLIP's archives of NumPy arrays, which big_vision writes and open_clip converts."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable
from typing import Any

from torch import nn

from raytvb.errors import UserError, listed
from raytvb.models.file_kinds import NUMPY, file_kind, unusable

ARCHIVE = ".npz"
"""How the names of such archives end."""

_FLOATS = "<f4", "<f2", "<f8"
_LONGEST_HEADER = 10_000


def load_archive(model: nn.Module, path: str, name: str) -> None:
    """Copy the weights of an archive of big_vision into the model `name` of open_clip.

    Raises UserError if the file is no such archive, or one of another model. Arrays of Python
    objects, which would be unpickled, are refused.
    """
    if file_kind(path) != NUMPY:
        raise unusable(path, "its name ends in .npz, but it is no archive of NumPy", "rename it")
    towers: Any = model
    if not hasattr(model, "text") or not hasattr(towers.visual, "trunk"):
        raise unusable(
            path,
            f"an archive of NumPy holds a model of SigLIP, and {name} is none",
            "give the name of a SigLIP model, or a checkpoint as safetensors",
        )
    names = _array_names(path)
    root = "params/" if "params/b" in names else ""
    if f"{root}img/embedding/kernel" not in names:
        raise unusable(
            path,
            f"its arrays are not those of SigLIP: {listed(sorted(names), 3)}",
            "give a checkpoint as safetensors",
        )
    _check_blocks(names, f"{root}img/Transformer/", len(towers.visual.trunk.blocks), path, name)
    blocks = len(towers.text.transformer.resblocks)
    _check_blocks(names, f"{root}txt/Encoder_0/", blocks, path, name)
    from open_clip.convert import load_big_vision_weights

    try:
        load_big_vision_weights(model, path)
    # open_clip looks up every name, and torch compares every shape; NumPy checks the archive.
    except Exception as error:
        raise unusable(
            path,
            f"an array is missing, damaged or of another shape than in {name}",
            "copy it again, or give the name of the model that it belongs to",
        ) from error


def _array_names(path: str) -> set[str]:
    """Names of the arrays. Raises UserError unless all are floating-point numbers."""
    import numpy as np

    names, others = set(), []
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0
                    if version != (1, 0):
                        read = np.lib.format.read_array_header_2_0
                    dtype = read(file, max_header_size=_LONGEST_HEADER)[2]
                names.add(entry.removesuffix(".npy"))
                if dtype.str not in _FLOATS:
                    others.append(f"{entry.removesuffix('.npy')} ({dtype})")
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise unusable(path, "an array in it is damaged", "copy it again") from error
    if others:
        raise unusable(
            path,
            f"these arrays are no floating-point numbers: {listed(others, 3)}",
            "only arrays of numbers are read, as big_vision writes them",
        )
    return names


def _check_blocks(names: Iterable[str], prefix: str, blocks: int, path: str, model: str) -> None:
    """Raise UserError for an archive with more blocks than the model: they would be ignored."""
    pattern = re.compile(rf"{re.escape(prefix)}encoderblock_(\d+)/")
    found = {match.group(1) for match in map(pattern.match, names) if match}
    if found and len(found) != blocks:
        raise UserError(
            f"model.pretrained: {path} is not a checkpoint of {model}: it has {len(found)} blocks "
            f"in {prefix} and the model has {blocks}; give the name of the model that it belongs to"
        )
