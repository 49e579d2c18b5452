"""The search as a user sees it: the files that it stores, its choice, and that a kill changes
nothing.
"""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import pytest
from experiments import TASKS, copy_store, write_experiment

from raytvb.cli.main import main
from raytvb.evaluation.evaluators import evaluation_split
from raytvb.evaluation.precision import compare_precisions
from raytvb.experiment.metrics import PrecisionMetrics
from raytvb.experiment.parsing import load_experiment
from raytvb.maths.counts import Count, wilson
from raytvb.maths.subsets import task_subsets
from raytvb.search.results import Choice, MeasuredOutcome, parse_outcome
from raytvb.storage import records
from raytvb.storage.store import Store

pytestmark = pytest.mark.ray

BASES = {f"{m}-m{s}" for m in ("ae-anchored", "svd") for s in (1, 2)}
REST = {
    "zero-shot",
    "full",
    "ae-anchored-m1-sum",
    "ae-anchored-m2-sum",
    *(f"random-{k}-m{s}" for k in ("own", "lstsq") for s in (1, 2)),
}


def table(store: Store, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(store.read(key))).to_pylist()
    return rows


def outcome_of(store: Store, name: str) -> MeasuredOutcome:
    record = records.find(store, f"search/{name}")
    assert record is not None
    outcome = parse_outcome(record.metrics, name)
    assert isinstance(outcome, MeasuredOutcome)
    return outcome


def choice_of(store: Store) -> Choice:
    record = records.find(store, "search")
    assert record is not None
    return record.metrics_as(Choice, "search")


def test_the_tables_say_what_was_tried_and_what_came_of_it(finished: tuple[Path, Store]) -> None:
    _, store = finished
    choice = choice_of(store)
    results = {r["candidate"]: r for r in table(store, "search/results.parquet")}
    assert set(results) == BASES | REST and choice.candidates == len(results)
    assert [n for n, r in results.items() if r["chosen"]] == [choice.name]
    assert {n for n, r in results.items() if r["front"]} == set(choice.front)
    assert results[choice.name or ""]["objective"] == max(results[n]["objective"] for n in BASES)
    assert not any(
        r["stopped"] for r in results.values()
    )  # two methods of one size are too few to end one of them
    tried = table(store, "search/tried.parquet")
    assert sum(r["images"] for r in results.values()) == choice.images
    assert results["zero-shot"]["images"] == 96 * len(
        TASKS
    )  # each is measured once, whichever subsets it is part of
    assert len(tried) == choice.evaluations
    for row in tried:
        assert (row["low"], row["high"]) == pytest.approx(
            wilson(Count(row["correct"], row["total"]))
        )
        assert row["low"] <= row["correct"] / row["total"] <= row["high"]
    # 96 images a task and split; every subset of a size on the images of its tasks
    passes = {s: s * len(subsets) for s, subsets in task_subsets(len(TASKS), 0).items()}
    assert {(r["share"], r["total"] / passes[r["size"]]) for r in tried} <= {
        (0.25, 24.0),
        (1.0, 96.0),
    }
    for name, row in results.items():
        last = [t for t in tried if t["candidate"] == name and t["share"] == row["share"] == 1.0]
        for size in {t["size"] for t in last}:
            alpha = row[f"coefficient_{size}"]
            assert row[f"accuracy_{size}"] == next(
                t["accuracy"] for t in last if t["size"] == size and t["coefficient"] == alpha
            )


def test_the_front_is_what_nothing_smaller_beats(finished: tuple[Path, Store]) -> None:
    _, store = finished
    front = [outcome_of(store, name) for name in choice_of(store).front]
    objectives = [row.objective for row in front]
    full = outcome_of(store, "full").objective
    assert len(objectives) == len(front) and full is not None and max(objectives) >= full
    sizes = [row.stored_bytes for row in front]
    assert sizes == sorted(sizes)
    rows = list(zip(sizes, objectives, strict=True))
    for (smaller, less), (larger, more) in itertools.pairwise(rows):
        assert smaller == larger or less < more


def test_tune_leaves_nothing_in_the_store(finished: tuple[Path, Store]) -> None:
    """Tune pickles its state, and nothing in a store is ever unpickled."""
    _, store = finished
    names = {key.rpartition("/")[2] for key in store.keys("search")}
    assert names == {"record.json", "results.parquet", "tried.parquet"}


def test_test_images_are_read_once_for_what_went_through(finished: tuple[Path, Store]) -> None:
    _, store = finished
    summary = store.read_json("report/summary.json")
    tested = set(summary["addition"]) | set(summary["random_subset"])
    assert tested == (BASES | REST) - {"zero-shot"}
    rows = {key.removeprefix("evals/") for key in store.keys("evals") if key.endswith(".parquet")}
    assert {name.split("/")[0] for name in rows if name.count("/") == 1} == tested | {"models"}
    assert "after this choice" in summary["provenance"]["test"]


def test_bf16_is_used_where_it_keeps_the_answers(
    finished: tuple[Path, Store], monkeypatch: pytest.MonkeyPatch, suite_cache: str
) -> None:
    """A search in this process, on the images that the finished run stored."""
    file, store = finished
    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    fingerprint = store.read_json("base/record.json")["parents"]["fingerprint"]

    def compared(precision: str) -> PrecisionMetrics:
        experiment = load_experiment(file, {"evaluate": {"precision": precision}})
        arrays = {
            t.name: evaluation_split(experiment, fingerprint, t, "val")[1] for t in experiment.tasks
        }
        return compare_precisions(experiment, fingerprint, arrays)

    assert compared("fp32") == compared("auto") == PrecisionMetrics(use="fp32", device="cpu")
    found = compared("bf16")
    assert found.images == 96 * len(TASKS)
    assert found.worst_task is not None and found.agreement is not None
    assert 0.9 < found.worst_task <= found.agreement <= 1
    assert found.use == ("bf16" if found.agreement >= 0.995 else "fp32")
    monkeypatch.setattr("raytvb.evaluation.precision.KEPT_ANSWERS", 1.01)
    assert compared("bf16").use == "fp32"


@pytest.mark.slow
def test_more_may_be_asked_of_a_finished_store_and_a_kill_changes_no_choice(
    finished: tuple[Path, Store],
    tmp_path: Path,
    suite_cache: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another search with more methods and operations on the same vectors. It runs once without
    interruption, and once it is killed on the way.
    """
    more: dict[str, Any] = {
        "basis": {"method": ["ae-anchored", "svd", "kmeans"]},
        "search": {
            "sizes": [1, 2],
            "tolerance": 0.9,
            "coefficients": {"vector": "per-basis", "trials": 4},
        },
        "evaluate": {
            "control": "none",
            "unseen": {"tasks": ["glyphs/hebrew-fog"], "steps": 10},
            "additions": [list(TASKS[:2])],
            "disentanglement": {"points": 2},
        },
    }
    whole, store = (
        copy_store(finished[1], tmp_path / n, "report/", "evals/", "search/")
        for n in ("whole", "killed")
    )
    for stage in ("basis", "search"):
        assert main([stage, str(write_experiment(tmp_path / "whole-file", whole.url, **more))]) == 0
    file = write_experiment(tmp_path / "killed-file", store.url, **more)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAYTVB_CACHE": suite_cache
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "raytvb", "run", str(file), "--num-cpus", "2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    moment, deadline = "search/kmeans-m1/round-1/record.json", time.monotonic() + 240
    while not store.exists(moment):
        assert process.poll() is None and time.monotonic() < deadline, f"{moment} never appeared"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not store.exists("search/random-own-m1/round-2/record.json"), (
        "it was killed too late to prove anything"
    )
    assert main(["run", str(file)]) == 0, capsys.readouterr().err
    assert (
        whole.read_json("search/record.json")["metrics"]
        == store.read_json("search/record.json")["metrics"]
    )
    for key in ("search/results.parquet", "search/tried.parquet"):
        assert table(whole, key) == table(store, key)
    summary = store.read_json("report/summary.json")
    results = {r["candidate"]: r for r in table(store, "search/results.parquet")}
    methods = more["basis"]["method"]
    for size in (1, 2):
        group = {f"{m}-m{size}": outcome_of(store, f"{m}-m{size}") for m in methods}
        first = {n: o.objectives[0] for n, o in group.items()}
        stopped = {n for n, o in group.items() if o.stopped}
        assert stopped == {n for n, value in first.items() if value < median(first.values())}
        assert len(stopped) <= 1
        assert all(results[n]["share"] == (0.25 if n in stopped else 1.0) for n in group)
        assert stopped & set(summary["addition"]) == (
            stopped if size == 2 else set()
        )  # 2 is half of three tasks
    chosen = summary["chosen"]
    assert chosen["size"] == 1 and summary["search"]["best"] != chosen["name"]  # the smallest
    weighted = summary["addition"]["full"]["weighted"]
    assert weighted["kind"] == "per-basis" and len(weighted["weights"]) == len(TASKS)
    assert weighted["validation_accuracy"] >= outcome_of(store, "full").accuracy[len(TASKS)] - 1e-9
    unseen = summary["unseen"]["glyphs/hebrew-fog"]
    assert (unseen["basis"]["coefficients"], unseen["full"]["coefficients"]) == (1, len(TASKS))
    (group,) = summary["additions"]
    assert set(group["models"]) == {"full", chosen["name"]}
    assert set(group["models"]["full"]["per_task"]) == set(TASKS[:2])
    (pair,) = summary["disentanglement"]
    for model in pair["models"].values():
        assert len(model["error"]) == 2 and all(0 <= e <= 2 for row in model["error"] for e in row)
    assert main(["verify", store.url]) == 0


@pytest.mark.slow
def test_where_nothing_helps_the_result_says_so(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The coefficients are so large that every addition is worse than the pretrained model."""
    store = copy_store(finished[1], tmp_path / "store", "report/", "search/", "evals/")
    file = write_experiment(
        tmp_path,
        store.url,
        search={
            "sizes": [1],
            "merges": ["ties"],
            "coefficients": {"low": 3.9, "high": 4.0, "strategy": "grid", "points": 2},
        },
        evaluate={"control": "none"},
    )
    assert main(["run", str(file)]) == 0, capsys.readouterr().err
    out = capsys.readouterr()
    assert "no basis is better on validation data than the pretrained model" in out.out + out.err
    summary = json.loads(store.read("report/summary.json"))
    assert summary["chosen"]["name"] is None and "pretrained model" in summary["chosen"]["reason"]
    assert "no basis is better" in store.read("report/index.html").decode()
    assert {"full-ties", "svd-m1-ties"} <= set(summary["addition"])
    assert {
        t["coefficient"] for t in table(store, "search/tried.parquet") if t["candidate"] == "full"
    } == {3.9, 4.0}
    assert main(["merge", store.url, "--add", TASKS[0], "--out", str(tmp_path / "merged")]) == 0
    assert "full" in capsys.readouterr().out
