"""Damaged files are never used: whoever reads a file for work gets an error that names it, or makes
the file anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from experiments import TASKS
from readers import Readers, nothing_is_made, one_of_each_kind, places, used
from small_store import copied
from vector_files import flip

from raytvb.cli.main import main
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment
from raytvb.models.pretrained_model import load_base
from raytvb.storage import checked_file
from raytvb.storage.gram_rows import OWNER, ROWS
from raytvb.storage.mirror import mirror
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


# Commands -----------------------------------------------------------------------------------------

OF_MERGES = {
    "base/model.safetensors": ("--basis", "full", "--coefficient", "0.5"),
    "base/open_clip_config.json": ("--basis", "full", "--coefficient", "0.5"),
    "base/bpe_2000.txt.gz": ("--basis", "full", "--coefficient", "0.5"),
    f"vectors/{TASKS[0]}/vector.safetensors": ("--basis", "full", "--coefficient", "0.5"),
    "masks/shared/mask.safetensors": ("--basis", "full", "--coefficient", "0.5"),
    "basis/svd-m1/basis-00001-of-00001.safetensors": ("--basis", "svd-m1"),
    "basis/svd-m1/basis.safetensors.index.json": ("--basis", "svd-m1"),
    "basis/svd-m1/coefficients.safetensors": ("--basis", "svd-m1"),
    "basis/svd-m1/record.json": ("--basis", "svd-m1"),
    "search/svd-m1/record.json": ("--basis", "svd-m1"),
    "search/record.json": (),
}
"""What a merge reads, with the options that make it do so."""

SAID_TO_BE_ABSENT = {
    "basis/svd-m1/record.json": "has no basis 'svd-m1'",
    "search/record.json": "no basis has been chosen yet",
}
"""What a merge says where a record is deleted: it may be that the thing was never made."""

OF_REPORTS = (
    "record.json",
    "gram/record.json",
    "base/record.json",
    "basis/svd-m1/record.json",
    "search/record.json",
    "search/svd-m1/record.json",
    "evals/full/rows.parquet",
    "evals/models/record.json",
)


def as_in_a_new_process() -> None:
    """Forget what this process has read and compared."""
    checked_file._CHECKED.clear()
    load_base.cache_clear()
    mirror.cache_clear()


@pytest.fixture
def copy_of_run(finished: tuple[Path, Store], tmp_path: Path) -> Iterator[Store]:
    yield copied(finished[1].url, tmp_path / "store")
    as_in_a_new_process()


@pytest.mark.ray
def test_a_merge_of_damaged_files_names_them_and_writes_nothing(
    copy_of_run: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnoticed = []
    for key, options in OF_MERGES.items():
        out = tmp_path / "out"
        merge = ["merge", copy_of_run.url, "--add", TASKS[0], *options, "--out", str(out)]
        for damage in (*SHORTER.values(), None):
            data = copy_of_run.read(key)
            if damage is None:
                copy_of_run.delete(key)
            else:
                copy_of_run.write(key, damage(data))
            as_in_a_new_process()
            status = main(merge)
            printed = capsys.readouterr()
            message = printed.err + printed.out
            if damage is None and key in SAID_TO_BE_ABSENT:
                noticed = SAID_TO_BE_ABSENT[key] in message
            else:
                noticed = status == 1 and copy_of_run.where(key) in message and not out.exists()
            if not noticed or "Traceback" in message:
                unnoticed.append(f"{key}: {status} {message}")
            shutil.rmtree(out, ignore_errors=True)
            copy_of_run.write(key, data)
    assert unnoticed == []
    as_in_a_new_process()
    assert main(merge) == 0


@pytest.mark.ray
def test_a_report_of_damaged_files_names_them(
    finished: tuple[Path, Store], copy_of_run: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ["report", str(finished[0]), "--store", copy_of_run.url]
    assert main(report) == 0
    before = copy_of_run.read("report/summary.json")
    for key in OF_REPORTS:
        data = copy_of_run.read(key)
        flip(copy_of_run, key, len(data) // 2)
        capsys.readouterr()
        assert main(report) == 1
        message = capsys.readouterr().err
        assert copy_of_run.where(key) in message and "Traceback" not in message
        assert copy_of_run.read("report/summary.json") == before
        copy_of_run.write(key, data)
    assert main(report) == 0
