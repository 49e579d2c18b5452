"""What a file is, from its first bytes, where it was given as a checkpoint."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path

from raytvb.errors import UserError

SAFETENSORS, TORCH, LEGACY, NUMPY = "safetensors", "torch", "legacy torch", "numpy"

_HEAD = 512
_INFLATED = 4
"""A compressed archive may be at most this many times as large as its file."""

_LONGEST_INDEX = 16_000_000
"""Bytes of the index of a PyTorch archive. That of the largest models has about 0.5 MB."""

_MOST_TENSORS = 20_000
"""Tensors in a PyTorch archive. The largest models have 1,500, and an optimizer twice as many."""

SAVE = "save the model's state_dict alone, best as safetensors"
"""The way out for files with other things than weights."""

_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS instead of the file itself",
        "fetch the file with `git lfs pull`",
    ),
    (b"\x89HDF", "an HDF5 file, as Keras writes", "convert it to safetensors"),
    (b"GGUF", "a GGUF file of quantised weights", "use the unquantised weights"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"BZh", "compressed with bzip2", "unpack it first"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstandard", "unpack it first"),
    (b"\x93NUMPY", "a single NumPy array", "give the `.npz` archive of the whole model"),
    (b"\x89PNG", "an image", "give the file of the weights"),
    (b"\xff\xd8\xff", "an image", "give the file of the weights"),
    (b"PAR1", "a Parquet file", "give the file of the weights"),
)


def unusable(path: str, what: str, remedy: str) -> UserError:
    """The error for a file that cannot be used as pretrained weights."""
    return UserError(f"{path} cannot be read as a checkpoint: {what}; {remedy}")


def file_kind(path: str) -> str:
    """SAFETENSORS, TORCH, LEGACY or NUMPY. The name of the file does not matter.

    Raises UserError for a file that cannot be opened, and for one of another kind.
    """
    head, size = _head(path)
    if size == 0:
        raise unusable(path, "it is empty", "copy it again")
    for start, what, remedy in _STARTS:
        if head.startswith(start):
            raise unusable(path, f"it is {what}", remedy)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return SAFETENSORS
    if head[:4] == b"PK\x03\x04":
        return _archive_kind(path, size)
    if head[:1] == b"\x80":
        return LEGACY
    raise _no_weights(path, head, size)


def _head(path: str) -> tuple[bytes, int]:
    """The first bytes of a file, and its size."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise unusable(
                path,
                "it is a folder",
                "give a file in it, or the folder as `name: local-dir:PATH` without `pretrained`",
            )
        if not stat.S_ISREG(status.st_mode):
            raise unusable(path, "it is a pipe or a device", "give a file")
        with open(path, "rb") as file:
            return file.read(_HEAD), status.st_size
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise unusable(
            path, f"it cannot be opened ({reason.lower()})", "check its path and its permissions"
        ) from error


def _no_weights(path: str, head: bytes, size: int) -> UserError:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return unusable(
            path,
            "it is a web page, such as the answer to a failed download",
            "download the file itself",
        )
    if text[:1] in (b"{", b"["):
        return unusable(path, "it is JSON", "give the file of the weights")
    if not head.strip(b"\0"):
        return unusable(path, f"its {size:,} bytes begin with zeros", "copy it again")
    return unusable(
        path,
        f"its {size:,} bytes are neither safetensors nor a file of torch.save",
        f"copy it again, or {SAVE}",
    )


def _archive_kind(path: str, size: int) -> str:
    """The kind of a zip archive. Raises UserError if it holds no weights, or far too much."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise unusable(path, "its end is missing or damaged", "copy it again") from error
    if sum(entry.file_size for entry in entries) > _INFLATED * size + 1_000_000:
        raise unusable(
            path, "it is compressed to a small part of its size", f"unpack it, and {SAVE}"
        )
    names = [entry.filename for entry in entries]
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY
    _check_torch_archive(path, entries)
    return TORCH


def _check_torch_archive(path: str, entries: list[zipfile.ZipInfo]) -> None:
    places = {Path(entry.filename).name: entry for entry in entries}
    if "constants.pkl" in places:
        raise unusable(
            path,
            "it is a TorchScript archive, a program that is not run here",
            "for OpenAI's own CLIP files give the tag `pretrained: openai`, which has the same "
            "weights; for others, save the `state_dict()` of what `torch.jit.load` returns as "
            "safetensors",
        )
    if "data.pkl" not in places:
        raise unusable(
            path,
            "it is a zip archive without the `data.pkl` of torch.save",
            "unpack it, and give the file of the weights",
        )
    if places["data.pkl"].file_size > _LONGEST_INDEX or len(entries) > _MOST_TENSORS:
        raise unusable(path, f"it holds {len(entries):,} objects, far more than a model", SAVE)


def record_sizes(path: str) -> list[int]:
    """Bytes of every storage in an archive of torch.save."""
    with zipfile.ZipFile(path) as archive:
        return [entry.file_size for entry in _records(archive)]


def _records(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [entry for entry in archive.infolist() if "/data/" in f"/{entry.filename}"]


def check_sums(path: str) -> None:
    """Raise UserError if the values in an archive of torch.save differ from their checksums.

    torch does not compare them. It can also write archives without any, in which none fits.
    """
    good, bad = 0, 0
    with zipfile.ZipFile(path) as archive:
        for entry in _records(archive):
            try:
                with archive.open(entry) as file:
                    while file.read(2**20):
                        pass
                good += 1
            except (zipfile.BadZipFile, OSError, EOFError, zlib.error):
                bad += 1
    if good and bad:
        raise unusable(path, "its values differ from their checksums", "copy it again")


def is_compressed(path: str) -> bool:
    """Whether an archive has compressed entries, which cannot be mapped into memory."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
