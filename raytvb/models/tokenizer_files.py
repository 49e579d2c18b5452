"""The files of a tokenizer: checked where a model is read, and written where a model is stored.

open_clip opens the BPE file of a description by the path that stands there, and so from the working
folder if the path is relative. It has no way to name a file beside the description. So a folder
that we write has the full path of its own file, and a model with open_clip's own vocabulary has no
file. If such a folder is moved, raytvb finds the file beside the description; open_clip needs
`get_tokenizer("local-dir:DIR", bpe_path="DIR/FILE")`.
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytvb.errors import UserError, described, listed, shortened
from raytvb.models.open_clip_package import open_clip_package

_LONGEST = 32_000_000
"""Bytes of an unpacked vocabulary. open_clip's own has 3 MB."""

_MERGES = slice(1, 49152 - 256 - 2 + 1)
"""The lines of a BPE file that open_clip reads."""

_BYTE_TOKENS, _SPECIAL_TOKENS = 512, 2

_CHOICES = {
    "clean": ("lower", "whitespace", "canonicalize"),
    "reduction_mask": ("", "simple", "random", "shuffle", "syntax"),
}

HUGGING_FACE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    "tokenizer.model",
)
"""Files of Hugging Face's tokenizers."""

_VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
    "tokenizer.model",
)
"""Those of them that hold the words."""


def bpe_file(folder: Path, bpe_path: str) -> Path:
    """The BPE file of a model in a folder. A file beside the description comes first."""
    beside = folder / Path(bpe_path).name
    return beside if beside.is_file() else folder / bpe_path


def check_tokenizer(
    folder: Path, model: Mapping[str, Any], where: str, *, fetched: bool = False
) -> None:
    """Raise UserError if the tokenizer of a model in a folder cannot be used.

    model: the checked `model_cfg` in the file `where`. fetched: whether open_clip has fetched the
    folder from the hub. It fetches Hugging Face's tokenizers by itself, and no BPE files.
    """
    text = model["text_cfg"]
    check_package(model, where)
    if text.get("hf_tokenizer_name"):
        if not fetched and not any((folder / name).is_file() for name in _VOCABULARIES):
            raise UserError(
                f"{where}: hf_tokenizer_name names a tokenizer of Hugging Face, but {folder} has "
                f"no vocabulary: copy the tokenizer's files there ({listed(_VOCABULARIES[:4])}), "
                f"as `tokenizer.save_pretrained({str(folder)!r})` writes them"
            )
        return
    options = text.get("tokenizer_kwargs") or {}
    _check_options(options, f"{where}: model_cfg.text_cfg.tokenizer_kwargs")
    tokens = 49408
    if options.get("bpe_path") is not None:
        path = bpe_file(folder, options["bpe_path"])
        if fetched and not path.is_file():
            raise UserError(
                f"{where}: open_clip does not fetch the BPE file {shortened(options['bpe_path'])} "
                f"from the hub: fetch the whole model with `hf download`, and give its folder as "
                f"local-dir:PATH"
            )
        tokens = _BYTE_TOKENS + len(merges(path, where)) + _SPECIAL_TOKENS
    tokens += len(options.get("additional_special_tokens") or ())
    size = text.get("vocab_size", 49408)
    if "hf_model_name" not in text and tokens > size:
        raise UserError(
            f"{where}: model_cfg.text_cfg.vocab_size is {size:,}, but the tokenizer has {tokens:,} "
            f"tokens: give the model's own BPE file as tokenizer_kwargs.bpe_path"
        )


def _check_options(options: Mapping[str, Any], where: str) -> None:
    known = {"bpe_path", "additional_special_tokens", *_CHOICES}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise UserError(
            f"{where} has the unknown field {listed(unknown, 3)}: open_clip's tokenizer knows "
            f"{listed(sorted(known))}"
        )
    for name, choices in _CHOICES.items():
        if name in options and options[name] not in choices:
            raise UserError(
                f"{where}.{name} is {shortened(options[name])}: it must be one of "
                f"{', '.join(map(repr, choices))}"
            )
    path = options.get("bpe_path")
    if path is not None and (not isinstance(path, str) or not path or "\0" in path):
        raise UserError(
            f"{where}.bpe_path is {shortened(path)}: it must be the name of a BPE file, gzipped, "
            f"in the model's folder"
        )
    special = options.get("additional_special_tokens") or []
    if not isinstance(special, list) or not all(map(_is_token, special)):
        raise UserError(
            f"{where}.additional_special_tokens is {shortened(special)}: it must be a list of texts"
        )


def _is_token(text: object) -> bool:
    """Whether open_clip can look for a special token: it puts the text into a pattern."""
    try:
        return isinstance(text, str) and bool(text) and bool(re.compile(text))
    except re.error:
        return False


def merges(path: Path, where: str) -> list[tuple[str, ...]]:
    """The merges in a BPE file, as open_clip reads them.

    Raises UserError that names the file if it is missing, or is not one; `where` names the file
    that refers to it.
    """
    try:
        with gzip.open(path) as file:
            data = file.read(_LONGEST + 1)
        lines = data.decode("utf-8").split("\n")[_MERGES]
    except FileNotFoundError as error:
        raise UserError(
            f"{where}: tokenizer_kwargs.bpe_path names {path}, which does not exist: put the "
            f"model's BPE file there"
        ) from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _no_bpe(path, where, "it is no gzipped text in UTF-8") from error
    if len(data) > _LONGEST:
        raise _no_bpe(path, where, "it unpacks to over 32 MB")
    found = [tuple(line.split()) for line in lines]
    if not found or any(len(pair) != 2 for pair in found[:-1]) or len(found[-1]) not in (0, 2):
        raise _no_bpe(path, where, "its lines are not pairs of tokens")
    return found


def _no_bpe(path: Path, where: str, reason: str) -> UserError:
    return UserError(
        f"{where}: the BPE file {path} cannot be used, as {reason}: copy it again from where the "
        f"model comes from"
    )


def check_package(model: Mapping[str, Any], where: str, *, tokenizer: bool = True) -> None:
    """Raise UserError if a model needs the package transformers, and it is not installed.

    model: a `model_cfg`. tokenizer: whether its tokenizer is needed, and not only its towers.
    """
    text = model["text_cfg"]
    needs = "hf_model_name" in text or (tokenizer and bool(text.get("hf_tokenizer_name")))
    if needs and importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{where}: its text is read by the package transformers, which is not installed: "
            f"install it (`pip install transformers sentencepiece`), or use another model"
        )


def stored_tokenizer(
    text: Mapping[str, Any], source: str, target: Path | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The tokenizer of a model for another folder: its fields in `text_cfg`, and its files.

    text: the model's `text_cfg`. source: open_clip's name of the model. target: the folder in which
    the files will lie, with its full path; None if it is not on this machine, and then the BPE file
    has a relative path.
    """
    if text.get("hf_tokenizer_name"):
        return {}, _hugging_face_files(source)
    options = dict(text.get("tokenizer_kwargs") or {})
    if options.get("bpe_path") is None:
        return {}, {}
    path = bpe_file(Path(source.removeprefix("local-dir:")), options["bpe_path"])
    if merges(path, str(path)) == merges(Path(_default_bpe()), "open_clip"):
        del options["bpe_path"]
        return {"tokenizer_kwargs": options}, {}
    options["bpe_path"] = path.name if target is None else str(target / path.name)
    return {"tokenizer_kwargs": options}, {path.name: path.read_bytes()}


def _default_bpe() -> str:
    from open_clip.tokenizer import default_bpe

    path: str = default_bpe()
    return path


def _hugging_face_files(source: str) -> dict[str, bytes]:
    """The files of a tokenizer of Hugging Face, which `local-dir:` looks for beside the model."""
    if source.startswith("local-dir:"):
        return _files_in(Path(source.removeprefix("local-dir:")))
    try:
        tokenizer = open_clip_package().get_tokenizer(source)
    except Exception as error:  # of the hub, of the network, of transformers
        raise UserError(
            f"model.name: the tokenizer of {source} cannot be loaded: fetch the model where there "
            f"is a network, and give its folder as local-dir:PATH ({described(error):.200})"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _files_in(Path(folder))


def _files_in(folder: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for name in HUGGING_FACE_FILES:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files
