"""`raytvb ls --history` and the report tell when and why vectors were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_store import ONLINE, TASKS, copied
from test_report import HISTORY, make_summary, rows, words

from raytvb.cli.main import main
from raytvb.evaluation.rows import Row, write_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import basis_prefix
from raytvb.experiment.metrics import Made, VectorMetrics
from raytvb.experiment.stored import existing_basis
from raytvb.report.history import (
    History,
    OnlineArrival,
    OnlineHistory,
    VectorArrival,
    read_history,
)
from raytvb.report.page import LAST_ARRIVALS, render
from raytvb.storage import records
from raytvb.storage.store import Store

FIRST, SECOND, THIRD = TASKS


@pytest.fixture
def copy(small: Experiment, tmp_path: Path) -> Store:
    """A small store that the test may change."""
    return copied(small.store, tmp_path / "store")


def set_history(store: Store, task: str, *history: Made) -> None:
    prefix = f"vectors/{task}"
    record = records.find(store, prefix)
    assert record is not None
    metrics = record.metrics_as(VectorMetrics, prefix).model_copy(update={"history": history})
    records.commit(
        store,
        prefix,
        identity=record.identity,
        parents=record.parents,
        written=record.files,
        metrics=metrics,
    )


def arrived(count: int, task: str, correct: int) -> Row:
    return Row("online", "test", 1, count, task, 0.5, correct, 20)


def test_vectors_are_sorted_by_time_and_those_without_one_come_first(copy: Store) -> None:
    again = "finetune.epochs: stored 1, asked for 2"
    new = Made(time="2026-01-02T00:00:00Z", reason="new")
    set_history(copy, FIRST, new, Made(time="2026-01-04T00:00:00Z", reason=again))
    set_history(copy, SECOND, Made(time="2026-01-03T00:00:00Z", reason="new"))
    set_history(copy, THIRD)
    found = [(each.time, each.task, each.reason) for each in read_history(copy).vectors]
    assert found == [
        (None, THIRD, None),
        ("2026-01-02T00:00:00Z", FIRST, "new"),
        ("2026-01-03T00:00:00Z", SECOND, "new"),
        ("2026-01-04T00:00:00Z", FIRST, again),
    ]


def test_online_bases_have_bounds_and_accuracies(
    copy: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    version = existing_basis(copy, ONLINE)
    parents = {basis_prefix(ONLINE): version.checksum}
    measured = [arrived(1, FIRST, 10), arrived(3, FIRST, 4), arrived(3, SECOND, 8)]
    offline = Row("offline", "test", 1, 1, FIRST, 0.5, 20, 20)
    together = Row("online", "test", 0, 1, FIRST, 0.5, 20, 20)
    write_rows(copy, f"online/{ONLINE}", [*measured, offline, together], {}, parents)
    (basis,) = [each for each in read_history(copy).online if each.name == ONLINE]
    assert [each.count for each in basis.arrivals] == [1, 2, 3]
    assert [each.tasks for each in basis.arrivals] == [(FIRST,), (SECOND,), (THIRD,)]
    assert [each.accuracy for each in basis.arrivals] == [0.5, None, pytest.approx(0.3)]
    for each in basis.arrivals:
        assert each.mean_bound is not None and each.largest_bound is not None
        assert 0 <= each.mean_bound <= each.largest_bound
    assert main(["ls", copy.url, "--history"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["time", "task", "why"] and printed[1].split()[1:] == [
        FIRST,
        "new",
    ]
    start = printed.index(next(line for line in printed if line.strip() == ONLINE))
    first, second, third = (line.split() for line in printed[start + 2 : start + 5])
    assert first == ["1", "0.0000", "0.0000", "50.0", FIRST]
    assert len(second) == 4 and third[3:] == ["30.0", THIRD]
    assert main(["ls", copy.url, "--history", "--json"]) == 0
    assert History.from_json(json.loads(capsys.readouterr().out), "") == read_history(copy)


@pytest.mark.parametrize("damage", ["cut", "other version"])
def test_rows_that_do_not_count_leave_the_accuracy_blank(copy: Store, damage: str) -> None:
    name = f"online/{ONLINE}"
    write_rows(copy, name, [arrived(1, FIRST, 10)], {}, {basis_prefix(ONLINE): "another one"})
    if damage == "cut":
        copy.write(f"evals/{name}/rows.parquet", b"PAR1")
    for basis in read_history(copy).online:
        assert [each.accuracy for each in basis.arrivals] == [None] * 3


def test_a_store_without_vectors_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", str(tmp_path), "--history"]) == 1
    assert "holds no vectors yet" in capsys.readouterr().err


def test_the_page_has_the_last_arrivals() -> None:
    vectors = [VectorArrival(time=None, task="old <i>", reason=None)]
    for number in range(LAST_ARRIVALS):
        time = f"2026-01-01T00:00:{number:02d}Z"
        vectors.append(VectorArrival(time=time, task=f"t{number}", reason="new"))
    arrival = OnlineArrival(
        count=2, tasks=("a", "b"), mean_bound=0.25, largest_bound=None, accuracy=0.5
    )
    online = OnlineHistory(name="svd-m1-online", arrivals=(arrival,))
    history = History(vectors=tuple(vectors), online=(online,))
    page = render(make_summary(), "tiny", HISTORY, history)
    table = rows(page, "History")
    assert table["2026-01-01T00:00:00Z"] == ["t0", "new"] and "–" not in table
    assert rows(page, "svd-m1-online")["2"] == ["a, b", "0.250", "", "50.0"]
    assert "The last 50 of 51 task vectors that were made, in this order." in words(page, "History")
    few = render(make_summary(), "tiny", HISTORY, History(vectors=tuple(vectors[:2])))
    assert rows(few, "History")["–"] == ["old <i>", "–"] and "old &lt;i&gt;" in few
    assert "The task vectors that were made, in this order." in words(few, "History")
    assert "History</h2>" not in render(make_summary(), "tiny", HISTORY)
