"""`raytvb rm` and `raytvb gc` remove what no experiment of a store uses, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_store import ONLINE, TASKS, UNFINISHED, copied, finished_part, small_experiment

from raytvb.bases.builder import BasisBuilder
from raytvb.bases.spectrum import describe_spectrum, spectrum_of
from raytvb.cli.cleaning import remove_unused
from raytvb.cli.main import main
from raytvb.evaluation.rows import Row, write_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.inventory import verify_store
from raytvb.experiment.metrics import StoreMetrics
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_experiments import record_experiment, stored_experiment
from raytvb.experiment.unused import find_unused, unused_of_tasks
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.verify import ORPHANED

FIRST, SECOND, THIRD = TASKS
ROW = Row("full", "test", 1, 0, FIRST, 0.5, 10, 20)


@pytest.fixture
def copy(small: Experiment, tmp_path: Path) -> Store:
    """A small store that the test may change."""
    return copied(small.store, tmp_path / "store")


def changed(store: Store, tasks: tuple[str, ...] = (FIRST, SECOND), **fields: Any) -> Experiment:
    """The experiment of the store with other tasks and sections."""
    identity = stored_experiment(store)
    assert identity is not None
    return parse_experiment({**identity, "store": store.url, "tasks": list(tasks), **fields})


def shrink(store: Store, **fields: Any) -> Experiment:
    """Take two of the four tasks out of the experiment of a store, as a run does."""
    experiment = changed(store, **fields)
    record_experiment(store, experiment, grows=True)
    return experiment


def reasons(store: Store) -> dict[str, str]:
    return {thing.prefix: thing.reason for thing in find_unused(store).things}


# What is unused -----------------------------------------------------------------------------------


def test_a_store_whose_experiment_stays_has_nothing_unused(
    small: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bases of a run without the unfinished task are used, too."""
    assert find_unused(Store(small.store)).things == ()
    assert main(["gc", small.store]) == 0
    printed = capsys.readouterr().out
    assert printed == "nothing to do: the experiments of this store use everything in it\n"


def test_what_a_smaller_experiment_leaves_behind(copy: Store) -> None:
    shrink(copy)
    made_of = f"it was made of prepared/{THIRD}, which is removed"
    gone, other = f"no present experiment lists {THIRD}", "no present experiment has this basis"
    assert reasons(copy) == {
        "basis/svd-m1": made_of,
        f"basis/{ONLINE}": made_of,
        "basis/svd-m2": other,
        "basis/svd-m2-online": other,
        "online/svd-m2-online": other,
        f"prepared/{THIRD}": gone,
        f"vectors/{THIRD}": gone,
        f"vectors/{UNFINISHED}/checkpoint": f"no present experiment lists {UNFINISHED}",
        f"masks/{THIRD}": gone,
        f"heads/{THIRD}": gone,
    }


def test_what_another_experiment_of_the_store_uses_stays(copy: Store) -> None:
    """Both experiments are present; the name tells them apart."""
    other = changed(copy, name="other")
    record_experiment(copy, other, grows=True)
    assert reasons(copy) == {}


def test_heads_and_images_of_untrained_tasks_stay(copy: Store) -> None:
    for split in ("val", "test"):
        records.commit(copy, f"splits/{split}/{THIRD}", identity={})
    shrink(copy, evaluate={"control": THIRD})
    found = reasons(copy)
    assert f"vectors/{THIRD}" in found and f"masks/{THIRD}" in found
    assert not {f"heads/{THIRD}", f"splits/val/{THIRD}", f"splits/test/{THIRD}"} & found.keys()


def test_twins_and_overlap_that_no_experiment_asks_for(copy: Store) -> None:
    experiment = changed(copy, (*TASKS, UNFINISHED), talos={"mask": "shared"}, basis={})
    record_experiment(copy, experiment, grows=True)
    found = reasons(copy)
    assert found[f"prepared/{FIRST}"] == "no present experiment prepares vectors for its bases"
    assert found["overlap"] == "in no present experiment tasks have masks of their own"
    assert not any(prefix.startswith(("vectors/", "masks/")) for prefix in found)


def test_results_that_no_experiment_can_have(copy: Store) -> None:
    stays = {
        *("models", "full", "zero-shot", "svd-m1", "svd-m1-sum", f"online/{ONLINE}"),
        *("random-own-m1", "random-lstsq-m1-2", "additions/svd-m1", f"negation-full/{FIRST}"),
        "anything-else",
    }
    goes = {
        *("svd-m2", "svd-m2-sum", "svd-m1-ties", "full-ties", "random-own-m2", "online/svd-m2-x"),
        *("online/svd-m2-online", "additions/svd-m2", f"negation-full/{THIRD}"),
        *(f"negation-svd-m2/{FIRST}", f"unseen/{THIRD}", "disentanglement/full/a+b"),
    }
    for name in stays | goes:
        write_rows(copy, name, [ROW], {})
    for name in ("svd-m1", "svd-m2", "svd-m2/round-1"):
        records.commit(copy, f"search/{name}", identity={})
    shrink(copy)
    found = reasons(copy)
    assert {name for name in stays | goes if f"evals/{name}" in found} == goes
    assert "search/svd-m2" in found and "search/svd-m1" not in found
    assert "search/svd-m2/round-1" not in found  # it goes with its candidate


def test_shared_masks_that_nothing_was_trained_on(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    fields = {"store": store.url, "tasks": [FIRST, SECOND], "talos": {"mask": "shared"}}
    record_experiment(store, parse_experiment(fields), grows=True)
    for number, name in enumerate(("shared", "shared-2", "shared-3", "shared-10")):
        records.commit(store, f"masks/{name}", identity={}, parents={"mask": str(number)})
    records.commit(store, f"vectors/{FIRST}", identity={}, parents={"mask": "1"})
    records.commit(store, f"vectors/{THIRD}", identity={}, parents={"mask": "2"})
    assert set(reasons(store)) == {f"vectors/{THIRD}", "masks/shared", "masks/shared-3"}
    dense = parse_experiment({**fields, "talos": {"density": 1.0}})
    record_experiment(store, dense, grows=True)
    assert "masks/shared-10" in reasons(store)


def test_an_experiment_of_another_version_keeps_what_it_names(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(copy)
    identity: JsonObject = {"tasks": [{"name": THIRD}], "basis": {"method": ["from-the-future"]}}
    records.commit(copy, "experiments/later", identity=identity)
    checkpoint = f"vectors/{UNFINISHED}/checkpoint"
    assert set(reasons(copy)) == {checkpoint}
    assert main(["gc", copy.url, "--yes"]) == 0
    assert "cannot read the experiment later, so bases and results stay" in capsys.readouterr().out
    assert not copy.exists(f"{checkpoint}/record.json") and copy.exists("basis/svd-m2/record.json")
    assert main(["rm", copy.url, "--task", THIRD, "--yes"]) == 1
    assert f"{THIRD} is used by the experiment later" in capsys.readouterr().err


def test_a_store_without_an_experiment_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records.commit(Store(str(tmp_path)), "vectors/a", identity={})
    assert main(["gc", str(tmp_path), "--yes"]) == 1
    assert "names no experiment, so nothing tells what is used" in capsys.readouterr().err


# gc -----------------------------------------------------------------------------------------------


def test_gc_frees_what_it_says_and_leaves_a_whole_store(
    small: Experiment, store_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, store = Store(small.store), Store(store_url)
    for key in source.keys():
        store.write(key, source.read(key))
    experiment = shrink(store)
    before = store.sizes()
    size = find_unused(store).size
    assert main(["gc", store.url, "--yes"]) == 0
    printed = capsys.readouterr().out
    assert f"{size:,} bytes freed" in printed and f"no present experiment lists {THIRD}" in printed
    after = store.sizes()
    lost = {key: before[key] for key in before.keys() - after.keys() if not key.startswith("gram/")}
    assert sum(lost.values()) == size > 10_000_000
    assert not [key for key in after if THIRD in key or UNFINISHED in key]
    assert set(GramState.read(store).tasks) <= {FIRST, SECOND}
    assert verify_store(store).messages() == []
    assert main(["gc", store.url]) == 0
    assert capsys.readouterr().out.startswith("nothing to do")
    builder = BasisBuilder(experiment)  # online bases start anew
    assert not builder.add(experiment.task_names).failed
    assert set(builder.write_bases().names) == {"svd-m1", ONLINE}
    assert verify_store(store).messages() == [] and find_unused(store).things == ()
    out = str(tmp_path / "merged")
    merge = ["merge", store.url, "--add", FIRST, "--coefficient", "0.5", "--out", out]
    assert main([*merge, "--basis", "svd-m1"]) == 0


def test_gc_asks_and_names_the_option_if_nobody_answers(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(copy)
    before = copy.keys()
    assert main(["gc", copy.url]) == 1
    assert "nothing was done. Say `--yes` to agree to this:\nRemove 10 things" in (
        capsys.readouterr().err
    )
    assert copy.keys() == before


def test_gc_as_json_lists_and_removes_only_with_consent(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    shrink(copy)
    before = copy.keys()
    for options, removed in (([], False), (["--yes"], True)):
        assert main(["gc", copy.url, "--json", *options]) == 0
        fields = json.loads(capsys.readouterr().out)
        assert fields["removed"] is removed and len(fields["unused"]) == 10
        assert fields["bytes"] == sum(thing["bytes"] for thing in fields["unused"])
        assert (copy.keys() == before) is not removed


@pytest.mark.parametrize("done", [0, 1, 3, 10, 17, 25])
def test_gc_that_is_stopped_leaves_orphans_at_most(
    copy: Store, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(copy)
    with_results(copy)
    left = [done]
    delete = Store.delete

    def stopping(store: Store, key: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StoreError("stopped")
        delete(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", stopping)
        with pytest.raises(StoreError):
            remove_unused(copy, find_unused(copy))
    assert {problem.kind for problem in verify_store(copy).problems} <= {ORPHANED}
    remove_unused(copy, find_unused(copy))
    assert {problem.kind for problem in verify_store(copy).problems} <= {ORPHANED}
    assert find_unused(copy).things == ()


def with_results(store: Store) -> None:
    """What a search and a report on all tasks leave: the choice, a candidate, rows, and a page."""
    names = ["svd-m1", "svd-m2"]
    for name in names:
        records.commit(store, f"search/{name}", identity={})
        write_rows(store, name, [ROW], {})
    table = {"results.parquet": b"1"}
    records.commit(store, "search", identity={"candidates": [*names]}, files=table)
    parents = {f"evals/{name}": "" for name in names}
    records.commit(store, "report", identity={}, files={"index.html": b"1"}, parents=parents)


def test_a_choice_among_removed_bases_goes_with_its_report(copy: Store) -> None:
    with_results(copy)
    shrink(copy)
    unused = find_unused(copy)
    assert {"report", "search", "search/svd-m2", "evals/svd-m2"} <= unused.prefixes
    remove_unused(copy, unused)
    assert copy.keys("search") == ["search/svd-m1/record.json"] and copy.keys("report") == []
    assert verify_store(copy).messages() == []


def test_a_report_stays_without_mention_of_removed_results(copy: Store) -> None:
    for name in ("full", "svd-m2"):
        write_rows(copy, name, [ROW], {})
    records.commit(copy, "search", identity={"candidates": ["full"]})
    records.commit(copy, "search/full", identity={})
    parents = {"evals/full": "a", "evals/svd-m2": "b"}
    records.commit(copy, "report", identity={}, files={"index.html": b"1"}, parents=parents)
    shrink(copy)
    assert main(["gc", copy.url, "--yes"]) == 0
    record = records.find(copy, "report")
    assert record is not None and record.parents == {"evals/full": "a"}
    assert verify_store(copy).messages() == []


# rm -----------------------------------------------------------------------------------------------


def test_rm_refuses_a_task_in_use_and_an_unknown_one(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copy.keys()
    assert main(["rm", copy.url, "--task", FIRST, "--yes"]) == 1
    assert capsys.readouterr().err == (
        f"error: {FIRST} is used by the experiment experiment: take it out of the file and run "
        f"that first\n"
    )
    assert main(["rm", copy.url, "--task", "glyphs/clock-blurr", "--yes"]) == 1
    printed = capsys.readouterr().err
    assert "has nothing of the task glyphs/clock-blurr; do you mean glyphs/clock-blur" in printed
    assert copy.keys() == before


def test_rm_removes_a_task_and_what_was_made_of_it(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(copy, f"negation-full/{THIRD}", [ROW], {})
    dashed = [task.replace("/", "-") for task in (FIRST, THIRD)]
    write_rows(copy, f"disentanglement/full/{'+'.join(dashed)}", [ROW], {})
    shrink(copy)
    expected = {
        *(f"{folder}/{THIRD}" for folder in ("vectors", "prepared", "masks", "heads")),
        *("basis/svd-m1", f"basis/{ONLINE}", "basis/svd-m2", "basis/svd-m2-online"),
        *(f"evals/negation-full/{THIRD}", f"evals/disentanglement/full/{'+'.join(dashed)}"),
    }
    assert unused_of_tasks(copy, [THIRD]).prefixes == expected
    assert main(["rm", copy.url, "--task", THIRD]) == 1
    assert "Say `--yes` to agree" in capsys.readouterr().err
    assert copy.exists(f"vectors/{THIRD}/record.json")
    assert main(["rm", copy.url, "--task", THIRD, "--task", UNFINISHED, "--yes"]) == 0
    assert "bytes freed" in capsys.readouterr().out
    assert not [key for key in copy.keys() if THIRD in key or UNFINISHED in key]
    assert verify_store(copy).messages() == []


# ls, verify and spectrum of a store that grew -----------------------------------------------------


def marks(store: Store, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["ls", store.url, "--json"]) == 0
    things = json.loads(capsys.readouterr().out)["things"]
    return {thing["what"]: thing["mark"] for thing in things if thing["mark"]}


def test_ls_marks_what_is_unused_and_what_is_stale(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert marks(copy, capsys) == {}
    longer = changed(copy, (FIRST, SECOND, UNFINISHED), finetune={"epochs": 2, "batch_size": 256})
    record_experiment(copy, longer, grows=True)
    unused = (f"vectors/{THIRD}", f"masks/{THIRD}", "basis/svd-m1", f"basis/{ONLINE}")
    found = marks(copy, capsys)
    assert {name for name, mark in found.items() if mark == "unused"} >= {*unused}
    assert {name for name, mark in found.items() if mark == "stale"} == {
        f"vectors/{FIRST}",
        f"vectors/{SECOND}",
    }
    assert main(["ls", copy.url]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[0] == "base" and "unused, kept" in printed
    assert f"missing: {UNFINISHED}: no vector yet" in printed and "history" not in printed


def test_ls_marks_bases_of_other_vectors(copy: Store, capsys: pytest.CaptureFixture[str]) -> None:
    key = f"prepared/{FIRST}"
    record = records.find(copy, key)
    assert record is not None
    name = next(iter(record.files))
    data = copy.read(f"{key}/{name}") + b" "
    records.commit(copy, key, identity=record.identity, parents=record.parents, files={name: data})
    found = marks(copy, capsys)
    assert found == dict.fromkeys(
        ("basis/svd-m1", "basis/svd-m2", f"basis/{ONLINE}", "basis/svd-m2-online"), "stale"
    )


def test_ls_names_the_vectors_of_another_store(
    small: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "own"))
    experiment = finished_part(small_experiment(store.url))
    experiment = experiment.model_copy(update={"vectors": small.store})
    record_experiment(store, experiment, grows=True)
    assert main(["ls", store.url]) == 0
    printed = capsys.readouterr().out
    for task in TASKS:
        assert f"{small.store}/vectors/{task}" in "".join(printed.split())


def test_verify_expects_no_vectors_of_another_store(copy: Store) -> None:
    experiment = stored_experiment(copy)
    assert experiment is not None
    metrics = StoreMetrics(vectors="s3://bucket/other", dated=True)
    files = {"experiment.yaml": copy.read("experiment.yaml")}
    records.commit(copy, "", identity=experiment, metrics=metrics, files=files)
    record = records.find(copy, "basis/svd-m1")
    assert record is not None
    parents = {f"s3://bucket/other/{name}": sha for name, sha in record.parents.items()}
    copy.delete(f"vectors/{FIRST}")
    records.commit(copy, "basis/svd-m1", identity={}, written=record.files, parents=parents)
    assert verify_store(copy).messages() == []


def test_a_checkpoint_of_a_vector_that_is_made_again_has_not_outlived(copy: Store) -> None:
    vector = records.find(copy, f"vectors/{FIRST}")
    assert vector is not None
    key, identity = f"vectors/{FIRST}/checkpoint", vector.identity
    records.commit(copy, key, identity=identity)
    assert [p.kind for p in verify_store(copy).problems] == [ORPHANED]
    records.commit(copy, key, identity={**identity, "mask": "of another one"})
    assert verify_store(copy).problems == []
    records.commit(copy, key, identity={**identity, "finetune": {"epochs": 2}})
    assert verify_store(copy).problems == []


def test_several_shared_masks_are_no_masks_of_the_tasks_own(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("gram", "masks/shared", "masks/shared-2"):
        records.commit(store, name, identity={})
    assert verify_store(store).problems == []


def test_the_spectrum_is_of_the_present_vectors(copy: Store) -> None:
    """The Gram matrix of the small store lacks a vector; a run adds it again."""
    whole = changed(copy, TASKS)
    builder = BasisBuilder(whole)
    builder.add(TASKS)
    spectrum = spectrum_of(copy)
    assert set(spectrum.tasks) == {*TASKS}
    note = f"1 of 4 task vectors are not in it yet: {UNFINISHED}"
    assert spectrum.notes == (note,)
    assert describe_spectrum(spectrum) == f"note: {note}\ntask vectors so far: 3"
    shrink(copy)
    spectrum = spectrum_of(copy, "svd", 1)
    assert set(spectrum.tasks) == {FIRST, SECOND} and "notes" not in spectrum.to_json()
    assert spectrum.fit is not None and set(spectrum.fit.per_task) == {FIRST, SECOND}
