"""Damaged files are never used: whoever reads a file for work gets an error that names it, or makes
the file anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from readers import Readers, nothing_is_made, one_of_each_kind, places, used
from small_store import copied
from vector_files import flip

from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment
from raytvb.storage.gram_rows import OWNER, ROWS
from raytvb.storage.store import Store
from raytvb.storage.verify import unclaimed, verify_records

PLACES = 200
"""In how many places a bit is flipped."""

SHORTER: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "last-byte": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "other": lambda data: bytes(len(data)),
}


def copy_of(experiment: Experiment, folder: Path) -> Readers:
    store = copied(experiment.store, folder)
    return Readers(store, experiment.model_copy(update={"store": store.url}))


def searched(finished: tuple[Path, Store]) -> Experiment:
    return load_experiment(finished[0])


def check_flips(readers: Readers, keys: list[str]) -> list[str]:
    """Flip bits in these files. Returns a line for each flip that somebody does not notice."""
    store, unnoticed = readers.store, list[str]()
    for key in keys:
        reader, size = readers.of(key), store.size(key)
        if reader is not None:
            reader()  # the whole file can be read
        with nothing_is_made():
            for place, bit in places(key, size, PLACES):
                flip(store, key, place, bit)
                if reader is not None:
                    problem = used(reader, store.where(key))
                    if problem is not None:
                        unnoticed.append(f"{key} byte {place} bit {bit}: {problem}")
                if not noticed(readers, key):
                    unnoticed.append(f"{key} byte {place} bit {bit}: not verified")
                flip(store, key, place, bit)
    return unnoticed


def noticed(readers: Readers, key: str) -> bool:
    """Whether `verify` finds one problem, and names the file."""
    if key == OWNER or key.startswith(ROWS):
        findings = unclaimed(readers.store, [key])
    else:
        findings, _ = verify_records(readers.store, [readers.record_keys[key]])
    (line,) = findings.messages() or [""]
    return key in line


def test_a_flipped_bit_is_never_used(small: Experiment, tmp_path: Path) -> None:
    readers = copy_of(small, tmp_path)
    assert check_flips(readers, one_of_each_kind(readers.store)) == []


@pytest.mark.ray
def test_a_flipped_bit_of_a_search_is_never_used(
    finished: tuple[Path, Store], small: Experiment, tmp_path: Path
) -> None:
    """The kinds of files that only a whole run has."""
    readers = copy_of(searched(finished), tmp_path)
    known = {folder.partition("/")[0] for folder in Store(small.store).keys()} - {"evals"}
    keys = [k for k in one_of_each_kind(readers.store) if k.partition("/")[0] not in known]
    assert {k.partition("/")[0] for k in keys} == {"evals", "report", "search"}
    assert check_flips(readers, keys) == []


@pytest.mark.slow
def test_a_flipped_bit_of_any_file_is_never_used(small: Experiment, tmp_path: Path) -> None:
    readers = copy_of(small, tmp_path)
    assert check_flips(readers, readers.store.keys()) == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_flipped_bit_of_any_file_of_a_run_is_never_used(
    finished: tuple[Path, Store], tmp_path: Path
) -> None:
    readers = copy_of(searched(finished), tmp_path)
    assert check_flips(readers, readers.store.keys()) == []


@pytest.mark.parametrize("damage", SHORTER)
def test_a_file_with_other_bytes_is_never_used(
    small: Experiment, tmp_path: Path, damage: str
) -> None:
    readers = copy_of(small, tmp_path)
    assert check_replaced(readers, SHORTER[damage]) == []


@pytest.mark.ray
@pytest.mark.parametrize("damage", SHORTER)
def test_a_file_of_a_run_with_other_bytes_is_never_used(
    finished: tuple[Path, Store], tmp_path: Path, damage: str
) -> None:
    readers = copy_of(searched(finished), tmp_path)
    assert check_replaced(readers, SHORTER[damage]) == []


def check_replaced(readers: Readers, damage: Callable[[bytes], bytes]) -> list[str]:
    """Replace the bytes of every file. Returns a line for each that somebody does not notice."""
    store, unnoticed = readers.store, list[str]()
    for key in store.keys():
        data = store.read(key)
        store.write(key, damage(data))
        reader = readers.of(key)
        with nothing_is_made():
            problem = None if reader is None else used(reader, store.where(key))
        if problem is not None:
            unnoticed.append(f"{key}: {problem}")
        if not noticed(readers, key):
            unnoticed.append(f"{key}: not verified")
        store.write(key, data)
    return unnoticed


def test_a_missing_file_is_never_passed_over(small: Experiment, tmp_path: Path) -> None:
    """A file that a record lists. What has no record has not been made."""
    readers = copy_of(small, tmp_path)
    store, unnoticed = readers.store, list[str]()
    for key, record in readers.record_keys.items():
        reader = readers.of(key)
        if key == record or reader is None:
            continue
        path, away = store.path(key), f"{store.path(key)}.away"
        os.rename(path, away)
        with nothing_is_made():
            problem = used(reader, store.where(key))
        if problem is not None:
            unnoticed.append(f"{key}: {problem}")
        os.rename(away, path)
    assert unnoticed == []
