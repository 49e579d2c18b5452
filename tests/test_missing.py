"""What a missing task changes: the experiment, identities, bases and failures in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from committed_vectors import commit, experiment, filled
from vector_files import problems_of

from raytvb.bases.builder import BasisBuilder
from raytvb.errors import FailedPart
from raytvb.experiment.basis_specs import BasisSpec, basis_specs
from raytvb.experiment.changes import Changes, changes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity, vector_identity
from raytvb.experiment.layout import vector_prefix
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.missing import commit_failure, failures, missing_parts, without
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_experiments import record_experiment
from raytvb.experiment.present_versions import present_versions
from raytvb.experiment.stored import load_coefficients
from raytvb.experiment.task_store import TaskStore
from raytvb.maths.online_basis import arrivals, stored_arrivals
from raytvb.orchestration.failures import Failure
from raytvb.orchestration.task_failures import TaskFailures
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.store import Store
from raytvb.storage.vectors import VECTOR

NAMES = ("glyphs/greek-blur", "glyphs/latin-fog", "glyphs/clock-blur", "glyphs/greek-fog")


def asked(store: Path, **fields: Any) -> Experiment:
    return parse_experiment({"store": str(store), "tasks": list(NAMES), **fields})


def test_an_experiment_without_a_task_measures_what_is_left(tmp_path: Path) -> None:
    whole = asked(
        tmp_path,
        search={"sizes": [1, 2, 3]},
        evaluate={
            "additions": [NAMES[:2], NAMES[2:]],
            "disentanglement": {"pairs": [NAMES[:2]]},
            "unseen": ["glyphs/dingbats-photo", "glyphs/latin-blur"],
        },
    )
    left = whole.restricted([*NAMES[1:], "glyphs/latin-blur"])
    assert (left.task_names, left.missing) == (NAMES[1:], NAMES[:1])
    assert left.search.sizes == (1, 2) and left.control is None
    assert left.evaluate.additions == (NAMES[2:],) and left.pairs == ()
    assert [task.name for task in left.unseen] == ["glyphs/latin-blur"]
    everything = [task.name for task in whole.every_task]
    assert whole.restricted(everything) == whole and left != whole
    again = whole.restricted(everything[1:])
    assert again.control == whole.control and again.missing == NAMES[:1]


def test_a_vector_of_the_first_format_lists_the_tasks_of_its_mask(tmp_path: Path) -> None:
    """They do not count. Nor does the seed beside that of the fine-tune."""
    whole = asked(tmp_path)
    task_store = TaskStore(whole, whole.tasks[0])
    assert "mask_tasks" not in task_store.identity
    for tasks in (NAMES, NAMES[:1]):
        identity: JsonObject = {**task_store.identity, "mask_tasks": [*tasks]}
        records.commit(task_store.store, task_store.prefix, identity=identity)
        assert task_store.record() is not None
    records.commit(task_store.store, task_store.prefix, identity={**identity, "seed": 1})
    assert task_store.record() is None
    state = task_store.state()
    assert state.is_outdated and state.differing == ("finetune.seed: stored 1, asked for 0",)
    assert task_store.vector() is not None


def test_a_vector_that_is_not_asked_for_counts_as_missing(tmp_path: Path) -> None:
    whole, store = asked(tmp_path), Store(str(tmp_path))
    for task in whole.tasks:
        identity = vector_identity(whole, task)
        records.commit(store, vector_prefix(task.name), identity=identity)
    assert missing_parts(store, whole) == []
    other = asked(tmp_path, tasks=[{"name": NAMES[0], "lr": 0.25}, *NAMES[1:]])
    (part,) = missing_parts(store, other)
    reason = f"finetune.lr: stored {whole.finetune.lr}, asked for 0.25"
    assert part == FailedPart(
        NAMES[0],
        "",
        f"its vector is not the one that is asked for ({reason}): run `raytvb finetune`",
    )
    assert without(other, [part]).task_names == NAMES[1:]
    assert [part.name for part in missing_parts(store, asked(tmp_path, seed=1))] == [*NAMES]
    fewer = asked(tmp_path, tasks=list(NAMES[2:]))
    assert missing_parts(store, fewer) == []


def test_failures_are_kept_until_they_do_not_count(tmp_path: Path) -> None:
    whole, store = asked(tmp_path), Store(str(tmp_path))
    told: list[str] = []
    known = TaskFailures(store, whole, told.append)
    known.add("data", {NAMES[0]: Failure(f"task {NAMES[0]}: no folder", 1)})
    known.add("images", {NAMES[1]: Failure("no images", 3), "glyphs/clean": Failure("gone")})
    assert told[:2] == [
        f"left out: {NAMES[0]}: data: no folder",
        f"left out: {NAMES[1]}: images: no images (3 attempts)",
    ]
    for task in whole.tasks[:3]:
        records.commit(store, vector_prefix(task.name), identity=vector_identity(whole, task))
    parts = missing_parts(store, whole)
    assert [(part.name, part.stage, part.attempts) for part in parts] == [
        (NAMES[1], "images", 3),  # the first has a vector now, so its failure is over
        (NAMES[3], "", 1),
        ("glyphs/clean", "images", 1),
    ]
    assert "negation is not measured" in parts[-1].reason
    left = without(whole, parts)
    assert left.task_names == (NAMES[0], NAMES[2]) and left.control is None
    known.clear(NAMES, "data")
    assert set(failures(store, whole)) == {NAMES[1], "glyphs/clean"}
    mended = asked(tmp_path, tasks=[NAMES[0], {"name": NAMES[1], "epochs": 2}, *NAMES[2:]])
    assert set(TaskFailures(store, mended, told.append).parts) == {"glyphs/clean"}
    assert store.keys("failed") == ["failed/glyphs/clean/record.json"]


def test_a_task_may_be_mended_renamed_and_left_out(tmp_path: Path) -> None:
    """The other tasks keep their vectors. The one whose data are elsewhere is made again."""
    store = Store(str(tmp_path))
    tasks = [{"name": name, "data": f"/wrong/{name}"} for name in ("a", "b")]
    talos = {"density": 1.0}
    first = asked(tmp_path, tasks=tasks, talos=talos)
    record_experiment(store, first, grows=True)
    identity = vector_identity(first, first.tasks[0])
    records.commit(store, "vectors/a", identity=identity, files={VECTOR: b"x"})

    def changes(*tasks: object) -> Changes:
        experiment = asked(tmp_path, tasks=list(tasks), talos=talos)
        record_experiment(store, experiment, grows=True)
        assert store.exists("vectors/a/record.json")
        return changes_of(experiment)

    mended = changes(tasks[0], {"name": "b", "data": "/right"})
    assert (mended.kept, mended.new, mended.again) == (["a"], ["b"], [])
    assert mended.question() == ""
    moved = changes({"name": "a", "data": "/right"}, tasks[1])
    assert (moved.kept, moved.new, moved.again) == ([], ["b"], ["a"])
    assert moved.states["a"].differing == ("task.data: stored '/wrong/a', asked for '/right'",)
    assert "a: task.data: stored '/wrong/a', asked for '/right'" in moved.question()
    renamed = changes({"name": "c", "data": "/wrong/a"}, tasks[1])
    assert (renamed.new, renamed.unused, renamed.renamed) == (["c", "b"], ("a",), {"c": "a"})
    assert "task c has no vector, but a," in renamed.question()
    left_out = changes(tasks[1])
    assert (left_out.new, left_out.unused, left_out.question()) == (["b"], ("a",), "")


@pytest.mark.parametrize("buffer", [1, 2])
def test_bases_of_fewer_vectors_grow_when_the_last_one_comes(tmp_path: Path, buffer: int) -> None:
    basis = {"method": "svd", "online": True, "buffer": buffer}
    fields: dict[str, Any] = {"basis": basis, "search": {"sizes": [2]}}
    whole = experiment(str(tmp_path / "grown"), 4, **fields)
    names, store = whole.task_names, Store(whole.store)
    for index in (0, 2, 3):
        commit(whole, index)
    builder = BasisBuilder(whole)
    builder.add([names[index] for index in (0, 2, 3)])
    some = whole.restricted([name for name in names if name != names[1]])
    assert set(builder.write_bases(some).names) == {"svd-m2", "svd-m2-online"}
    assert problems_of(store) == []
    record = records.read_record(store, "basis/svd-m2/record.json")
    assert record.identity == basis_identity(some, *specs_of(some, "svd-m2"))
    assert len(record.parents) == 3
    assert BasisBuilder(whole).write_bases(some).names == ()

    commit(whole, 1)
    late = BasisBuilder(whole)
    late.add([names[1]])
    assert set(late.write_bases().names) == {"svd-m2", "svd-m2-online"}
    assert BasisBuilder(whole).write_bases().names == ()
    assert problems_of(store) == []
    fresh, _ = filled(tmp_path / "fresh", 4, **fields)
    builder = BasisBuilder(fresh)
    builder.add(fresh.task_names)
    builder.write_bases()
    for left, right in zip(tables(whole, "svd-m2"), tables(fresh, "svd-m2"), strict=True):
        assert torch.equal(left, right)
    # The online basis has seen the tasks in the order 0, 2, 3, 1. Its columns are in the order of
    # the experiment, and decode every task nearly as well as those of the other order.
    H, W = tables(whole, "svd-m2-online")
    arrived = records.read_record(store, "online/svd-m2-online/record.json").metrics["tasks"]
    assert arrived == [names[0], names[2], names[3], names[1]]
    V = torch.stack([commit(fresh, index) for index in range(4)], dim=1)
    error = float(((V @ H @ W - V) ** 2).sum() / (V**2).sum())
    assert error == pytest.approx(metrics_of(whole, "svd-m2-online").relative_error, rel=1e-4)
    assert error < 1.3 * metrics_of(fresh, "svd-m2-online").relative_error


def specs_of(asked: Experiment, name: str) -> list[BasisSpec]:
    return [spec for spec in basis_specs(asked) if spec.name == name]


def metrics_of(asked: Experiment, name: str) -> BasisMetrics:
    record = records.read_record(Store(asked.store), f"basis/{name}/record.json")
    return record.metrics_as(BasisMetrics, name)


def tables(asked: Experiment, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return load_coefficients(Store(asked.store), name)


def test_a_size_that_only_fewer_tasks_have_stays_with_the_tasks_it_was_made_of(
    tmp_path: Path,
) -> None:
    """T/2 is 1 for two tasks, and 2 for four. Another experiment may use the smaller bases."""
    fields: dict[str, Any] = {"basis": {"method": "svd", "online": True}, "search": {"sizes": [2]}}
    whole, _ = filled(tmp_path, 4, **fields)
    builder = BasisBuilder(whole)
    builder.add(whole.task_names)
    assert builder.write_bases(whole.restricted(whole.task_names[:2])).names == (
        "svd-m1",
        "svd-m1-online",
    )
    assert set(builder.write_bases(whole).names) == {"svd-m2", "svd-m2-online"}
    for name in ("svd-m1", "svd-m1-online"):
        assert metrics_of(whole, name).tasks == whole.task_names[:2]
    assert set(present_versions(whole).bases) == {"svd-m2", "svd-m2-online"}
    some = whole.restricted(whole.task_names[:2])
    assert set(present_versions(some).bases) == {"svd-m1", "svd-m1-online"}
    assert problems_of(Store(whole.store)) == []


def test_a_vector_that_cannot_be_used_any_more_leaves_the_bases(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"basis": {"method": "svd", "online": True}, "search": {"sizes": [2]}}
    whole, _ = filled(tmp_path, 4, **fields)
    builder = BasisBuilder(whole)
    builder.add(whole.task_names)
    builder.write_bases()
    some = whole.restricted(whole.task_names[1:])
    assert set(BasisBuilder(whole).write_bases(some).names) == {"svd-m2", "svd-m2-online"}
    for name in ("svd-m2", "svd-m2-online"):
        assert metrics_of(whole, name).tasks == some.task_names
    assert problems_of(Store(whole.store)) == []
    assert set(BasisBuilder(whole).write_bases().names) == {"svd-m2", "svd-m2-online"}


def test_tables_that_were_not_kept_are_replaced_by_those_before_them() -> None:
    assert stored_arrivals(range(1, 201), 200) == arrivals(200)
    assert arrivals(40)[:3] == [2, 5, 8] and stored_arrivals([1, 2, 4, 6], 40) == [2, 4]
    kept = arrivals(199)
    looks = stored_arrivals([*kept, 200], 200)
    assert looks[-1] == 200 and set(looks) <= {*kept, 200} and len(looks) > 12


def test_failures_of_a_store_that_cannot_be_written_are_still_told(tmp_path: Path) -> None:
    whole = asked(tmp_path)
    (tmp_path / "failed").write_text("a file in the place of the folder")
    known = TaskFailures(Store(str(tmp_path)), whole, lambda line: None)
    known.add("finetune", {NAMES[0]: Failure("killed", 4)})
    assert known.parts == {NAMES[0]: FailedPart(NAMES[0], "finetune", "killed", 4)}
    with pytest.raises(OSError):
        commit_failure(Store(str(tmp_path)), whole.tasks[0], known.parts[NAMES[0]])
