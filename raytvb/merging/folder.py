"""Writes a merged model as a folder that open_clip loads.

The folder is written beside its place, under a hidden name, and takes its place when it is
complete. So a merge that fails leaves nothing, and an older model in its place is whole until then.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.layout import BASE
from raytvb.models.model_folder import CONFIG_FILE
from raytvb.models.open_clip_models import WEIGHTS_FILE
from raytvb.storage.local_files import TEMPORARY
from raytvb.storage.records import Record, read_file
from raytvb.storage.store import Store


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError unless a model can be written to `folder` without destroying anything.

    overwrite: whether a folder that holds a model, and nothing else, may be replaced.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"the output {folder} is a file: name a folder that does not exist yet")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    if not overwrite:
        raise UserError(
            f"the output {folder} is not empty: name another folder, or replace the model in it "
            f"with --overwrite"
        )
    others = _not_of_a_model(folder, names)
    if others:
        raise UserError(
            f"the output {folder} holds more than a model ({', '.join(others[:3])}), which "
            f"--overwrite would delete: name another folder"
        )


def _not_of_a_model(folder: Path, names: list[str]) -> list[str]:
    """Those of the folder's names that are not files of an open_clip model."""
    known = {CONFIG_FILE, WEIGHTS_FILE}
    # These errors mean that there is no model, or one without a tokenizer of its own.
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        document = json.loads((folder / CONFIG_FILE).read_bytes())
        known.add(Path(_tokenizer_options(document)["bpe_path"]).name)
    others = [name for name in names if name not in known or not (folder / name).is_file()]
    return others if CONFIG_FILE in names else names


def write_folder(store: Store, base: Record, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights, and the configuration and tokenizer of the pretrained model.

    base: the record of the pretrained model in the store. A model in the folder is replaced.
    """
    with _published_folder(folder) as unfinished:
        for name in base.files:
            if name == WEIGHTS_FILE:
                continue
            data = read_file(store, BASE, name, base)
            if name == CONFIG_FILE:
                data = _with_full_path(data, folder)
            (unfinished / name).write_bytes(data)
        save_file(dict(state), unfinished / WEIGHTS_FILE)
        # safetensors writes files that only their owner can read
        (unfinished / WEIGHTS_FILE).chmod(0o644)


@contextmanager
def _published_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place after the block; none after an error."""
    place = folder.resolve()  # the target of a symbolic link, which stays a link
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    unfinished.mkdir()
    try:
        yield unfinished
        _take_place(unfinished, place)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _take_place(unfinished: Path, place: Path) -> None:
    """Rename a folder to `place`. A model that is there is deleted after the new one is there."""
    if place.is_dir() and any(place.iterdir()):
        before = place.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        place.rename(before)
        try:
            unfinished.rename(place)
        except BaseException:
            before.rename(place)
            raise
        shutil.rmtree(before)
    elif place.is_mount():
        _move_files(unfinished, place)
    else:
        unfinished.rename(place)  # in one step, also where there is an empty folder


def _move_files(unfinished: Path, place: Path) -> None:
    """Move files into a folder that cannot be renamed, such as a volume of a container.

    The configuration comes last: before it, there is no model.
    """
    moved: list[Path] = []
    try:
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            moved.append(place / path.name)
            shutil.move(path, moved[-1])
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    unfinished.rmdir()


def _with_full_path(document: bytes, folder: Path) -> bytes:
    """A model's configuration with the full path of its tokenizer file in the folder.

    open_clip would look for a relative path in the working folder. The configuration of a store has
    a relative path, or the full one of the store's own file.
    """
    config = json.loads(document)
    options = _tokenizer_options(config)
    if options.get("bpe_path") is not None:
        options["bpe_path"] = str(folder.resolve() / Path(options["bpe_path"]).name)
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()


def _tokenizer_options(config: dict[str, dict[str, dict[str, dict[str, str]]]]) -> dict[str, str]:
    """The tokenizer's settings in a model's configuration; empty if it has none of its own."""
    return config["model_cfg"].get("text_cfg", {}).get("tokenizer_kwargs", {})
