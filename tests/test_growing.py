"""Stores that grow: tasks that come later, are made again, or leave.

What is built from vectors is compared with what a store gives that had all of them from the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from committed_vectors import commit, experiment, filled
from safetensors.torch import load
from torch import Tensor

from raytvb.bases.builder import BasisBuilder
from raytvb.bases.online import read_tables
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.changes import changes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import basis_prefix, vector_prefix
from raytvb.experiment.present_versions import present_versions
from raytvb.experiment.stored import existing_basis, load_gram
from raytvb.storage import records
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store

METHODS = ["ae", "ae-anchored", "svd", "pca", "greedy"]


def built(asked: Experiment) -> BasisBuilder:
    """What a run does after its fine-tunes."""
    builder = BasisBuilder(asked)
    assert not builder.add(asked.task_names).failed
    builder.write_bases()
    return builder


def grown_one_by_one(folder: Path, first: int, last: int, **fields: Any) -> Experiment:
    """A store that `first` tasks were put into, then one after the other up to `last`."""
    for count in range(first, last + 1):
        asked = experiment(str(folder), count, **fields)
        for index in range(count):
            if not Store(asked.store).exists(
                f"{vector_prefix(asked.task_names[index])}/record.json"
            ):
                commit(asked, index)
        built(asked)
    return asked


def tables_of(asked: Experiment, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """B, W and the vectors S (M, K) of a stored basis."""
    version = existing_basis(Store(asked.store), name)
    rows = torch.cat([part for _, part in version.vectors().blocks()], dim=1)
    return (*version.coefficients(), rows)


def check_same(left: Experiment, right: Experiment) -> None:
    """Vectors, Gram matrix and all bases have the same bits."""
    stores = Store(left.store), Store(right.store)
    one, other = (load_gram(s, asked) for s, asked in zip(stores, (left, right), strict=True))
    assert one is not None and other is not None and torch.equal(one, other)
    for spec in basis_specs(right):
        for one, other in zip(tables_of(left, spec.name), tables_of(right, spec.name), strict=True):
            assert torch.equal(one, other), spec.name
        metrics = [store.read_json(f"basis/{spec.name}/record.json")["metrics"] for store in stores]
        assert metrics[0] == metrics[1]


@pytest.mark.parametrize("buffer", [1, 2, 3])
def test_a_store_that_grew_equals_one_that_had_all_tasks(tmp_path: Path, buffer: int) -> None:
    fields = {"basis": {"method": METHODS, "online": True, "buffer": buffer}}
    grown = grown_one_by_one(tmp_path / "grown", 3, 9, **fields)
    fresh, _ = filled(tmp_path / "fresh", 9, **fields)
    built(fresh)
    check_same(grown, fresh)
    for name in ("svd-m2-online", "ae-anchored-m2-online"):
        records_of = [records.find(Store(e.store), f"online/{name}") for e in (grown, fresh)]
        left, right = (
            read_tables(Store(e.store), f"online/{name}", record, 9)
            for e, record in zip((grown, fresh), records_of, strict=True)
            if record is not None
        )
        assert all(torch.equal(left[table], right[table]) for table in left)
        bounds = [record.metrics["bounds"] for record in records_of if record is not None]
        assert bounds[0] == bounds[1]


def test_an_online_basis_after_fifty_single_additions(tmp_path: Path) -> None:
    fields = {"basis": {"method": ["svd", "ae-anchored"], "online": True}, "search": {"sizes": [4]}}
    grown = grown_one_by_one(tmp_path / "grown", 8, 58, **fields)
    fresh, V = filled(tmp_path / "fresh", 58, **fields)
    built(fresh)
    for name in ("svd-m4-online", "ae-anchored-m4-online"):
        left, right = tables_of(grown, name), tables_of(fresh, name)
        assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))
        torch.testing.assert_close(left[2].T.double(), V @ left[0], rtol=1e-4, atol=1e-4)


def test_one_more_task_is_one_row_and_reads_no_old_vector_for_the_online_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"basis": {"method": "svd", "online": True}}
    asked, _ = filled(tmp_path, 8, **fields)
    built(asked)
    before = load(Store(asked.store).read(gram_files(asked)[0]))["gram"]
    more = experiment(asked.store, 9, **fields)
    commit(more, 8)
    builder = BasisBuilder(more)
    shards: Any = builder._shards
    read: list[tuple[str, int]] = []
    for method in ("rows", "atoms_gram"):
        plain = getattr(shards, method)

        def counted(*args: Any, plain: Any = plain, method: str = method) -> Any:
            versions = args[0] if method == "rows" else args[1]
            read.append((method, len(versions) if method == "atoms_gram" else args[1]))
            return plain(*args)

        monkeypatch.setattr(shards, method, counted)
    builder.add(more.task_names)
    builder.write_bases()
    assert read == [("rows", 1)] + [("atoms_gram", 1)] * 2  # of the sizes 2 and T/2
    state = GramState.read(Store(more.store))
    assert torch.equal(state.ordered(asked.task_names), before)


def gram_files(asked: Experiment) -> list[str]:
    return [key for key in Store(asked.store).keys("gram") if key.count("/") == 1 and "-" in key]


def test_a_vector_that_is_made_again_makes_stale_what_was_built_from_it(tmp_path: Path) -> None:
    asked, _ = filled(tmp_path / "one", 5, basis={"method": METHODS, "online": True})
    built(asked)
    assert all(changes_of(asked).bases.values())
    commit(asked, 2, seed=71)
    assert not any(changes_of(asked).bases.values())
    assert present_versions(asked).bases == {} and load_gram(Store(asked.store), asked) is None
    built(asked)
    fresh = experiment(str(tmp_path / "two"), 5, basis={"method": METHODS, "online": True})
    for index in range(5):
        commit(fresh, index, seed=71 if index == 2 else None)
    built(fresh)
    check_same(asked, fresh)


def test_a_task_that_leaves_stays_in_the_store_and_in_the_gram_matrix(tmp_path: Path) -> None:
    fields = {"basis": {"method": METHODS, "online": True}}
    asked, _ = filled(tmp_path / "one", 6, **fields)
    built(asked)
    names = asked.task_names
    less = experiment(asked.store, [n for n in names if n != names[1]], **fields)
    changes = changes_of(less)
    assert changes.unused == (names[1],) and not changes.grows
    built(less)
    assert set(GramState.read(Store(asked.store)).tasks) == set(names)
    fresh = experiment(str(tmp_path / "two"), less.task_names, **fields)
    for position, index in enumerate((0, 2, 3, 4, 5)):
        commit(fresh, position, seed=index)
    built(fresh)
    check_same(less, fresh)
    built(asked)  # it comes back without a new row
    assert changes_of(asked).bases and all(changes_of(asked).bases.values())


def test_two_runs_that_add_different_tasks_at_the_same_time_both_land(tmp_path: Path) -> None:
    fields = {"basis": {"method": ["svd", "ae"], "online": True}}
    asked, _ = filled(tmp_path / "one", 5, **fields)
    built(asked)
    names = experiment(asked.store, 8).task_names
    left = experiment(asked.store, [*names[:5], names[5], names[7]], **fields)
    right = experiment(asked.store, [*names[:5], names[6]], **fields)
    for index, task in ((5, left), (6, left), (5, right)):
        commit(
            task,
            index,
            seed={left.task_names[5]: 5, left.task_names[6]: 7}.get(task.task_names[index], 6),
        )
    one, other = BasisBuilder(left), BasisBuilder(right)
    one.add([names[5]])
    other.add([names[6]])
    one.add([names[7]])
    other.add(right.task_names)
    one.add(left.task_names)
    state = GramState.read(Store(asked.store))
    assert sorted(state.tasks) == sorted(names) and len(state.tasks) == 8
    other.write_bases()
    one.write_bases()  # the last one has the bases, which say what they cover
    metrics = Store(asked.store).read_json("basis/svd-m2/record.json")["metrics"]
    assert metrics["tasks"] == list(left.task_names)
    fresh = experiment(str(tmp_path / "two"), 8, **fields)
    for index in range(8):
        commit(fresh, index)
    every = experiment(asked.store, 8, **fields)
    built(fresh)
    built(every)
    check_same_offline(every, fresh)


def check_same_offline(left: Experiment, right: Experiment) -> None:
    for spec in basis_specs(right):
        if not spec.online:
            pairs = zip(tables_of(left, spec.name), tables_of(right, spec.name), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), spec.name


def test_a_basis_that_is_replaced_is_whole_for_whoever_reads_it(tmp_path: Path) -> None:
    """The old files stay until the new record is there; a reader of the old version gets an error
    afterwards, and never rows of both."""
    asked, _ = filled(tmp_path, 5, basis={"method": "svd"})
    built(asked)
    store = Store(asked.store)
    old = existing_basis(store, "svd-m2")
    expected = tables_of(asked, "svd-m2")
    more = experiment(asked.store, 6, basis={"method": "svd"})
    commit(more, 5)
    builder = BasisBuilder(more)
    builder.add(more.task_names)
    assert existing_basis(store, "svd-m2").checksum == old.checksum
    opened = old.vectors()
    builder.write_bases()
    assert existing_basis(store, "svd-m2").checksum != old.checksum
    with pytest.raises(DamagedError, match="it is missing"):
        old.coefficients()
    with pytest.raises(DamagedError, match="it is missing"):
        list(opened.blocks())
    assert len(expected[0]) == 5 and len(tables_of(more, "svd-m2")[0]) == 6
    assert basis_prefix("svd-m2") == old.prefix
