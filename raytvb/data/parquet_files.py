"""Which Parquet files are which split, and whether all files of a split are there.

A file is named after its split (`train-00000-of-00002.parquet`), or lies in a folder that is named
after it (`train/0000.parquet`). Names that end in a number are parts of one set. A count in the
names (`-of-00002`) is believed.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from raytvb.data.image_source import USUAL_POOLS
from raytvb.data.pools import keys_by_pool, means_split, splits_hint
from raytvb.errors import UserError, listed
from raytvb.experiment.sections.tasks import TaskConfig

_COUNTED = re.compile(
    r"[-_. ]?(?P<number>\d{1,18})[-_ ]*of[-_ ]*(?P<count>\d{1,18})(?!\d)", re.ASCII | re.IGNORECASE
)
"""A number and a count, anywhere in a name: 00000-of-00002."""

_NUMBERED = re.compile(r"[-_. ]?\(?(?P<number>\d{1,18})\)?$", re.ASCII)

_TAIL = re.compile(
    r"([-_.](?=[0-9]*[a-f])[0-9a-f]{8,}|\.(snappy|gz|gzip|zstd|zst|br|lz4|c000))$", re.I | re.ASCII
)
"""What writers append to names: a hash, or the compression."""

NAMED = 5
"""A message names at most this many files of a kind."""


def parquet_pools(task: TaskConfig, keys: Sequence[str]) -> dict[str, list[str]]:
    """Parquet files by their pool, as `keys_by_pool`.

    Raises UserError if no name is that of a split, but some speak of splits: they would become one
    pool, and test a random part of it.
    """
    pools = keys_by_pool(task, keys, pool_of)
    names = sorted({pool_of(key) for key in keys})
    like_splits = [name for name in names if means_split(name)]
    has_shares = isinstance(task.splits.val, float) or isinstance(task.splits.test, float)
    if tuple(pools) == ("",) and len(names) > 1 and like_splits and not has_shares:
        raise UserError(
            f"task {task.name}: the names of the Parquet files speak of splits "
            f"({listed(names, NAMED)}), but none is called train, val or test: say which they are "
            f"with {splits_hint(like_splits)}"
        )
    return pools


def pool_of(key: str) -> str:
    """The pool of a file: train for `train-00000-of-00002.parquet`, `train.parquet`,
    `train/0000.parquet`, `split=train/part-1.parquet` and `train.parquet/part-1.parquet`.
    """
    folder, name = posixpath.split(key)
    stem = _parsed(_stem(name))[0]
    word = _first_word(stem)
    if word.lower() in USUAL_POOLS:
        return word
    uppers = [_folder_name(upper) for upper in folder.split("/")]
    for upper in reversed(uppers):
        if upper.lower() in USUAL_POOLS:
            return upper
    is_part = not stem or stem.lower().startswith("part")
    return uppers[-1] if is_part and uppers[-1] else stem


def _folder_name(name: str) -> str:
    """The name that a folder has for people: train for `split=train` and `train.parquet`."""
    return _stem(name.rpartition("=")[2])


def _parsed(stem: str) -> tuple[str, int | None, int | None]:
    """What the name of a file without its ending says: the name without numbers, the number and the
    count.
    """
    counted = _COUNTED.search(stem)
    if counted:
        rest = _without_tail(stem[counted.end() :])
        return stem[: counted.start()] + rest, int(counted["number"]), int(counted["count"])
    stem = _without_tail(stem)
    numbered = _NUMBERED.search(stem)
    if numbered:
        return stem[: numbered.start()], int(numbered["number"]), None
    return stem, None, None


def _without_tail(stem: str) -> str:
    while tail := _TAIL.search(stem):
        stem = stem[: tail.start()]
    return stem


def check_files(task: TaskConfig, where: str, pool: str, keys: Sequence[str]) -> list[str]:
    """Check that no file of a pool is missing, and that none may be there twice.

    where: the URL above the keys. Returns warnings, one sentence each. Raises UserError for files
    in several folders, for sets that may overlap (`train.parquet` with `train-00000.parquet`,
    `train_small.parquet` or `train/0.parquet`, but not `train_a.parquet` with `train_b.parquet`),
    and for files that a count in the names asks for and that are not there.
    """
    names = [_name(key, pool) for key in keys]
    place = f"task {task.name}: {where}"
    folders = sorted({name.folder for name in names})
    if pool and len(folders) > 1:
        found = ", ".join(folder or "." for folder in folders[:NAMED])
        raise UserError(
            f"{place} has {pool} files in several folders ({found}); name one of them in `data:`"
        )
    sets: dict[tuple[str, str], list[_Name]] = {}
    for name in names:
        sets.setdefault((name.folder, name.set), []).append(name)
    for files in sets.values():
        _check_set(place, pool, files)
    firsts = [files[0] for files in sets.values()]
    is_whole = any(file.is_by_name and file.set.lower() == pool.lower() for file in firsts)
    origins = {file.is_by_name for file in firsts}
    if len(firsts) > 1 and (is_whole or len(origins) > 1):
        _refuse_overlap(place, pool, firsts)
    return [line for files in sets.values() for line in _gaps(files)]


@dataclass(frozen=True)
class _Name:
    """What the name of a file says."""

    key: str
    folder: str
    """The folder of the configuration: above the pool's own folder, if it has one."""
    set: str
    """The name without the numbers. Files of the same set are parts of one whole."""
    is_by_name: bool
    """Whether the file's own name says the pool; if not, its folder does, or nothing."""
    number: int | None
    count: int | None
    """The number of files in the set, if the name tells it."""


def _name(key: str, pool: str) -> _Name:
    folder, name = posixpath.split(key)
    prefix, number, count = _parsed(_stem(name))
    is_by_name = bool(pool) and _first_word(prefix).lower() == pool.lower()
    uppers = folder.split("/")
    of_pool = [n for n, upper in enumerate(uppers) if _folder_name(upper).lower() == pool.lower()]
    if pool and of_pool and (not is_by_name or of_pool[-1] == len(uppers) - 1):
        above = "/".join(uppers[: of_pool[-1]])
        return _Name(
            key, above, prefix if is_by_name else f"{folder}/{prefix}", is_by_name, number, count
        )
    return _Name(key, folder, prefix, is_by_name, number, count)


def _check_set(place: str, pool: str, files: Sequence[_Name]) -> None:
    """Raise UserError if files of the same set overlap, or if one is missing."""
    kinds = {(file.number is None, file.count): file for file in files}
    if len(kinds) > 1:
        _refuse_overlap(place, pool, list(kinds.values()))
    by_number: dict[int | None, _Name] = {}
    for file in files:
        if file.number in by_number:
            _refuse_overlap(place, pool, [by_number[file.number], file])
        by_number[file.number] = file
    count = files[0].count
    if count is None:
        return
    numbers = {file.number for file in files}
    first = 1 if count in numbers and 0 not in numbers else 0
    wanted = range(first, first + count)
    missing = list(islice((number for number in wanted if number not in numbers), NAMED))
    if missing:
        raise UserError(
            f"{place} has {len(files):,} of the {count:,} files that the name of {files[0].key} "
            f"speaks of: number {', '.join(map(str, missing))} is missing; get all files, or take "
            f"the count out of the names if these are meant to be all"
        )
    if len(numbers) > count:
        surplus = next(file for file in files if file.number not in wanted)
        raise UserError(
            f"{place} has the file {surplus.key}, whose number is not one of the {count:,} that "
            f"its name speaks of: move it away, or rename it"
        )


def _refuse_overlap(place: str, pool: str, files: Iterable[_Name]) -> None:
    names = listed((file.key for file in files), NAMED)
    split = f"the split {pool}" if pool else "the data"
    raise UserError(
        f"{place} has several sets of files of {split}, so images may be there twice: {names}; "
        f"keep one of them there, or name its own folder in `data:`"
    )


def _gaps(files: Sequence[_Name]) -> list[str]:
    """A warning if a number between the first and the last file is missing."""
    numbers = {file.number for file in files if file.number is not None}
    if files[0].count is not None or not numbers:
        return []
    absent = (n for n in range(min(numbers), max(numbers)) if n not in numbers)
    missing = list(islice(absent, NAMED))
    if not missing:
        return []
    return [
        f"the files of {files[0].key} are numbered, and number {', '.join(map(str, missing))} is "
        f"not there"
    ]


def _stem(name: str) -> str:
    return name[: -len(".parquet")] if name.lower().endswith(".parquet") else name


def _first_word(stem: str) -> str:
    return re.split(r"[-_.]", stem)[0]
