"""The benchmark of a store that grows: a small real run of it, and what it compares."""

import json
from pathlib import Path

import pytest
from committed_vectors import commit, experiment

from raytvb.bases.builder import BasisBuilder
from raytvb.bench.growth_compare import Contents, identical
from raytvb.cli.main import main
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import vector_prefix
from raytvb.storage.store import Store


@pytest.mark.ray
@pytest.mark.slow
def test_growth_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "growth", "--tasks", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    reference, ours, start = found["reference"], found["ours"], found["start_seconds"]
    assert (found["benchmark"], found["tasks"], reference["fine_tunes"]) == ("growth", 3, 3)
    assert (ours["fine_tunes"], ours["gram_rows"], ours["changed_vectors"]) == (1, 1, 0)
    assert found["ratio"] == pytest.approx(reference["seconds"] / ours["seconds"])
    rest = ours["seconds"] - start - ours["fine_tune_seconds"]
    assert found["rest"] == pytest.approx(rest)
    assert found["share"] == pytest.approx(rest / (reference["seconds"] - start))
    assert set(reference["stages"]) == set(ours["stages"]) == {"finetune", "basis"}
    assert set(found["identical"].values()) == {True} and len(found["identical"]) == 6


def built(folder: Path, count: int) -> Experiment:
    """Bases of the first vectors; commits those that are missing, and a model."""
    asked = experiment(str(folder), count, basis={"method": ["svd"], "online": True})
    store = Store(asked.store)
    store.write("base/model.safetensors", b"model")
    for index, task in enumerate(asked.task_names):
        if not store.exists(f"{vector_prefix(task)}/record.json"):
            commit(asked, index)
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    builder.write_bases()
    return asked


def differing(asked: Experiment, folder: Path, before: Contents) -> set[str]:
    found = identical(asked, folder, before, Contents.of(asked))
    return {name for name, same in found if not same}


def test_a_store_that_only_grew_is_identical(tmp_path: Path) -> None:
    before = Contents.of(built(tmp_path / "store", 4))
    more = built(tmp_path / "store", 5)
    assert differing(more, tmp_path / "fresh", before) == set()
    assert len(before.vector_records()) == 4


def test_what_an_addition_changed_is_seen(tmp_path: Path) -> None:
    before = Contents.of(built(tmp_path / "store", 4))
    more = built(tmp_path / "store", 5)
    commit(more, 1, seed=71)
    Store(more.store).write("base/model.safetensors", b"other")
    found = differing(more, tmp_path / "one", before)
    assert found == {"vectors", "base", "offline", "online"}
    commit(built(tmp_path / "store", 5), 0, seed=72)
    assert "gram" in differing(built(tmp_path / "store", 5), tmp_path / "two", before)
