"""`raytvb verify` names what is missing, truncated, altered and orphaned. `--repair` removes that
and nothing else, and then a run makes it anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from experiments import TASKS
from small_store import ONLINE, UNFINISHED, copied, make_bases
from small_store import TASKS as FINISHED
from vector_files import flip

from raytvb.cli.main import cli, main
from raytvb.data.split_cache import cached_split
from raytvb.evaluation.rows import has_rows, read_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.inventory import verify_store
from raytvb.experiment.layout import BASE
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.twins import make_twin
from raytvb.models.heads import load_head
from raytvb.models.model_folder import CONFIG_FILE
from raytvb.models.pretrained_model import load_base, store_base
from raytvb.storage import records
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_rows import OWNER, ROWS
from raytvb.storage.gram_state import GramState
from raytvb.storage.records import RECORD, prefix_of
from raytvb.storage.store import Store
from raytvb.storage.verify import ALTERED, MISSING, ORPHANED, TRUNCATED, repair

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "flipped": lambda data: data[:-2] + bytes([data[-2] ^ 4]) + data[-1:],
}
KINDS = {"emptied": TRUNCATED, "cut": TRUNCATED, "longer": ALTERED, "flipped": ALTERED}


@pytest.fixture
def copy(small: Experiment, tmp_path: Path) -> Experiment:
    """A small store that the test may damage."""
    store = copied(small.store, tmp_path / "store")
    return small.model_copy(update={"store": store.url})


@pytest.fixture
def copy_of_run(finished: tuple[Path, Store], tmp_path: Path) -> Store:
    """A store of a finished run that the test may damage."""
    return copied(finished[1].url, tmp_path / "store")


def found(store: Store) -> dict[str, str]:
    """The kinds of all problems, by file."""
    problems = verify_store(store).problems
    assert len({problem.key for problem in problems}) == len(problems)
    return {problem.key: problem.kind for problem in problems}


def has_own_checksum(key: str) -> bool:
    return key.rpartition("/")[2] == RECORD or key == OWNER or key.startswith(f"{ROWS}/")


def damage_all(store: Store, keys: list[str], damage: Callable[[bytes], bytes]) -> None:
    for key in keys:
        store.write(key, damage(store.read(key)))


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_file_is_named_by_kind(copy: Experiment, damage: str) -> None:
    check_damaged_files(Store(copy.store), damage)


@pytest.mark.ray
@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damaged_file_of_a_run_is_named_by_kind(copy_of_run: Store, damage: str) -> None:
    check_damaged_files(copy_of_run, damage)


def check_damaged_files(store: Store, damage: str) -> None:
    """Damage all files with a record at once; then all those that hold their own checksum."""
    keys = store.keys()
    listed = [key for key in keys if not has_own_checksum(key)]
    before = {key: store.read(key) for key in listed}
    assert found(store) == {} and len(listed) > 20
    damage_all(store, listed, DAMAGE[damage])
    assert found(store) == dict.fromkeys(listed, KINDS[damage])
    for key, data in before.items():
        store.write(key, data)
    others = [key for key in keys if has_own_checksum(key)]
    damage_all(store, others, DAMAGE[damage])
    # Nothing says any more to which thing files in a folder of their own belong.
    below = [key for key in listed if key.startswith(f"online/{ONLINE}/0")]
    assert found(store) == dict.fromkeys(others, ALTERED) | dict.fromkeys(below, ORPHANED)


def test_every_missing_file_is_named(copy: Experiment) -> None:
    check_missing_files(Store(copy.store))


@pytest.mark.ray
def test_every_missing_file_of_a_run_is_named(copy_of_run: Store) -> None:
    check_missing_files(copy_of_run)


def check_missing_files(store: Store) -> None:
    listed = [key for key in store.keys() if not has_own_checksum(key)]
    for key in listed:
        store.delete(key)
    assert found(store) == dict.fromkeys(listed, MISSING)


def test_a_thing_without_its_record_is_named(copy: Experiment) -> None:
    check_things_without_record(Store(copy.store))


@pytest.mark.slow
@pytest.mark.ray
def test_a_thing_of_a_run_without_its_record_is_named(copy_of_run: Store) -> None:
    check_things_without_record(copy_of_run)


UNNOTICED = ("timings", "experiments/")
"""Things without a file that nothing else depends on."""


def check_things_without_record(store: Store) -> None:
    """Delete one record at a time: its files are orphans now."""
    for prefix, record in records.find_all(store).items():
        key = records.record_key(prefix)
        data = store.read(key)
        store.delete(key)
        problems = found(store)
        for name in record.files:
            assert problems.pop(records.file_key(prefix, name)) == ORPHANED
        assert problems.keys() <= {key}
        assert record.files or problems or prefix.startswith(UNNOTICED)
        store.write(key, data)


MADE_WHEN_NEEDED = ("splits/", "timings", "failed/", "experiments/")
"""Things that nothing else in a store depends on."""


def test_a_thing_that_is_gone_is_named(copy: Experiment) -> None:
    """Only a cache, a checkpoint and what comes last may be gone unnoticed."""
    unnoticed = things_gone_unnoticed(Store(copy.store))
    # This store has neither a search nor a report.
    last = {"evals/full", "evals/disentanglement", "basis/svd-m1", "basis/svd-m2"}
    last |= {f"basis/svd-m{size}-online" for size in (1, 2)}
    checkpoint = f"vectors/{UNFINISHED}/checkpoint"
    assert unnoticed == last | {checkpoint}


@pytest.mark.slow
@pytest.mark.ray
def test_a_thing_of_a_run_that_is_gone_is_named(
    finished: tuple[Path, Store], copy_of_run: Store
) -> None:
    assert things_gone_unnoticed(copy_of_run) == {"report", "heads/glyphs/clean"}


def things_gone_unnoticed(store: Store) -> set[str]:
    """The things without which, one at a time, `verify` finds nothing missing."""
    unnoticed = set()
    for prefix in records.find_all(store):
        if prefix.startswith(MADE_WHEN_NEEDED):
            continue
        keys = [key for key in store.keys() if prefix_of(key) == prefix]
        before = {key: store.read(key) for key in keys}
        for key in keys:
            store.delete(key)
        if found(store).get(records.record_key(prefix)) != MISSING:
            unnoticed.add(prefix)
        for key, data in before.items():
            store.write(key, data)
    return unnoticed


def test_a_damaged_record_is_not_missing_as_well(copy: Experiment) -> None:
    store = Store(copy.store)
    store.write("gram/record.json", b"{}")
    assert found(store) == {"gram/record.json": ALTERED}


def test_a_record_of_a_newer_version_is_not_missing(copy: Experiment) -> None:
    store = Store(copy.store)
    fields = store.read_json("gram/record.json")
    store.write_json("gram/record.json", {**fields, "format": 99})
    findings = verify_store(store)
    assert findings.problems == [] and len(findings.newer) == 1


# Repair -------------------------------------------------------------------------------------------


def test_repair_asks_and_removes_nothing_on_a_no(copy: Experiment) -> None:
    store = Store(copy.store)
    flip(store, "overlap/overlap.safetensors", -1)
    before = store.keys()
    answer = CliRunner().invoke(cli, ["verify", store.url, "--repair"], input="n\n")
    assert answer.exit_code != 0 and store.keys() == before
    assert "overlap/overlap.safetensors: altered" in answer.output and "[y/N]" in answer.output
    answer = CliRunner().invoke(cli, ["verify", store.url, "--repair"], input="y\n")
    assert answer.exit_code == 0
    assert set(before) - set(store.keys()) == {"overlap/overlap.safetensors", "overlap/record.json"}


def test_what_verify_prints_for_people_and_programs(
    copy: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(copy.store)
    assert main(["verify", store.url]) == 0
    count, _, rest = capsys.readouterr().out.partition(" ")
    assert rest == "files match their records\n" and int(count) == len(store.keys())
    assert main(["verify", store.url, "--json"]) == 0
    whole = {"checked": int(count), "problems": [], "without_checksum": [], "newer": []}
    assert json.loads(capsys.readouterr().out) == whole
    store.delete("overlap/overlap.safetensors")
    store.write("masks/strange.bin", b"1")
    for arguments in ([], ["--json"]):
        assert main(["verify", store.url, *arguments]) == 1
    printed = capsys.readouterr()
    assert "masks/strange.bin: orphaned: its folder has no record" in printed.err
    assert "overlap/overlap.safetensors: missing: its record lists it" in printed.err
    assert f"`raytvb verify {store.url} --repair` removes what is damaged" in printed.err
    problems = json.loads(printed.out)["problems"]
    assert [(problem["file"], problem["kind"]) for problem in problems] == [
        ("masks/strange.bin", ORPHANED),
        ("overlap/overlap.safetensors", MISSING),
    ]


def last_online_folder(store: Store) -> str:
    """The folder with the vectors of the online basis."""
    return str(store.read_json(f"online/{ONLINE}/{RECORD}")["metrics"]["folder"])


def online_table(store: Store, count: int) -> str:
    """The key of the small matrices of the online basis after some tasks."""
    (key,) = (key for key in store.keys(f"online/{ONLINE}") if f"after-{count:06d}" in key)
    return key


def test_repair_removes_a_thing_with_all_its_files_and_nothing_else(copy: Experiment) -> None:
    store = Store(copy.store)
    before = set(store.keys())
    flip(store, f"{last_online_folder(store)}/basis-00001-of-00001.safetensors", -1)
    flip(store, f"{ROWS}/000001.safetensors", -1)
    store.write("vectors/stray.bin", b"")
    removed = repair(store, verify_store(store).problems)
    expected = {key for key in before if key.startswith(f"online/{ONLINE}/")}
    assert before - set(store.keys()) == expected | {f"{ROWS}/000001.safetensors"}
    assert len(removed) == len(set(removed)) and "vectors/stray.bin" in removed
    assert removed.index(f"online/{ONLINE}/{RECORD}") == min(
        removed.index(key) for key in removed if key.startswith(f"online/{ONLINE}/")
    )


def test_repaired_things_are_made_anew_by_their_makers(
    copy: Experiment, small: Experiment, suite_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a run made without Ray can make here. Vectors get the same bits again."""
    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    store, whole = Store(copy.store), Store(small.store)
    first, second, third = copy.task_names[:3]
    preprocess = load_base(whole.url, fingerprint_of(small)).preprocess
    damaged = (
        "base/model.safetensors",
        f"heads/{second}/head.safetensors",
        f"vectors/{third}/vector.safetensors",
        f"vectors/{UNFINISHED}/checkpoint/step-0000003.safetensors",
        f"prepared/{first}/vector.safetensors",
        f"splits/val/{first}/labels.safetensors",
        "basis/svd-m1/coefficients.safetensors",
        online_table(store, 2),
        "evals/full/rows.parquet",
        f"{ROWS}/000001.safetensors",
    )
    for key in damaged:
        flip(store, key, store.size(key) // 2)
    assert found(store) == dict.fromkeys(damaged, ALTERED)
    assert main(["verify", store.url, "--repair", "--yes"]) == 0
    fingerprint = store_base(copy).parents["fingerprint"]
    encoder = load_base(store.url, fingerprint)
    load_head(TaskStore(copy, copy.tasks[1]), encoder)
    finetune_task(copy, fingerprint, copy.tasks[2])
    make_twin(copy, copy.tasks[0])
    assert CheckpointFolder(TaskStore(copy, copy.tasks[-1])).load() is None
    cached_split(store, copy.tasks[0], "val", preprocess)
    make_bases(copy)
    assert not has_rows(store, "full")  # so that the next run measures it again
    assert found(store) == {}
    for key in damaged:
        if key.startswith(("base", "heads", "vectors", "prepared", "splits", "basis")):
            assert "/checkpoint/" in key or store.read(key) == whole.read(key)
    with pytest.raises(FileNotFoundError):
        read_rows(store, "full")


def fingerprint_of(experiment: Experiment) -> str:
    record = records.find(Store(experiment.store), "base")
    assert record is not None
    return record.parents["fingerprint"]


def test_the_writer_of_the_gram_matrix_replaces_what_is_damaged(copy: Experiment) -> None:
    """It needs no repair: the vectors are in the store, and are added again."""
    store = Store(copy.store)
    (key,) = (key for key in store.keys("gram") if key.count("/") == 1 and "-" in key)
    for damaged in (key, OWNER):
        flip(store, damaged, store.size(damaged) // 2)
    with pytest.raises(DamagedError, match=key):
        GramState.read(store)
    make_bases(copy)
    assert found(store) == {} and set(GramState.read(store).tasks) == set(FINISHED)


ONE_OF_EACH = (
    "experiment.yaml",
    f"heads/{TASKS[0]}/record.json",
    "search/svd-m1/round-1/record.json",
    "search/results.parquet",
    "evals/full/rows.parquet",
    "report/summary.json",
    "timings/record.json",
)
"""Files of a run that cost little to make again."""

COSTLY = (
    ("masks/shared/record.json", f"splits/test/{TASKS[1]}/labels.safetensors"),
    ("base/open_clip_config.json", "basis/svd-m2/basis.safetensors.index.json"),
    (f"vectors/{TASKS[1]}/vector.safetensors", "gram/record.json", "record.json"),
)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_makes_whole_what_was_repaired(
    finished: tuple[Path, Store], copy_of_run: Store
) -> None:
    check_made_whole(finished, copy_of_run, ONE_OF_EACH)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("keys", COSTLY)
def test_a_run_makes_whole_all_that_can_be_repaired(
    finished: tuple[Path, Store], copy_of_run: Store, keys: tuple[str, ...]
) -> None:
    check_made_whole(finished, copy_of_run, keys)


def check_made_whole(finished: tuple[Path, Store], store: Store, keys: tuple[str, ...]) -> None:
    """Damage, repair, run: everything is as in the store of the fixture. Cut files are costly to
    tell from whole ones by their size, so bits are flipped.
    """
    file, whole = finished
    for key in keys:
        flip(store, key, store.size(key) // 2)
    problems = found(store)
    assert {key: problems.get(key) for key in keys} == dict.fromkeys(keys, ALTERED)
    assert main(["verify", store.url, "--repair", "--yes"]) == 0
    assert main(["run", str(file), "--store", store.url]) == 0
    assert main(["verify", store.url]) == 0
    differing = []
    for key in sorted({*whole.keys(), *store.keys()}):
        made_of_time = key.startswith(("timings", "report", "gram")) or key.endswith(RECORD)
        if not made_of_time and whole.find(key) != store.find(key):
            differing.append(key)
    split = [key for key in differing if key.startswith("splits/")]  # a cache, not needed now
    own_path = [f"{BASE}/{CONFIG_FILE}"]  # it has the full path of the tokenizer's file
    assert [key for key in differing if key not in own_path] == split


@pytest.mark.ray
def test_a_run_restores_what_vectors_were_trained_with(
    finished: tuple[Path, Store], copy_of_run: Store
) -> None:
    """Without its mask a vector cannot be read, even if nothing else is left to do."""
    file, whole = finished
    for folder in ("heads", "masks"):
        shutil.rmtree(copy_of_run.path(folder))
    assert set(found(copy_of_run)) == {
        *(f"heads/{task}/{RECORD}" for task in TASKS),
        f"masks/shared/{RECORD}",
    }
    assert main(["run", str(file), "--store", copy_of_run.url]) == 0
    assert found(copy_of_run) == {}
    for key in copy_of_run.keys("masks"):
        assert key.endswith(RECORD) or copy_of_run.read(key) == whole.read(key)


@pytest.mark.ray
def test_verify_on_ray_finds_the_same(
    copy_of_run: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy_of_run, "search/record.json", 40)
    copy_of_run.delete("evals/full/rows.parquet")
    copy_of_run.delete("masks/shared/record.json")
    copy_of_run.write("basis/stray", b"1")
    assert main(["verify", copy_of_run.url, "--json"]) == 1
    here = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("raytvb.cli.store_commands.LARGE", 0)
    assert main(["verify", copy_of_run.url, "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == here
    assert len(here["problems"]) == 5
