"""The chaos benchmark: that it sees what it looks for, and a small real run of it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load, save

from raytvb.bases.builder import BasisBuilder
from raytvb.bench.chaos_compare import compare
from raytvb.bench.chaos_experiment import chaos_experiment, draw_tasks
from raytvb.bench.chaos_kills import Kill
from raytvb.bench.chaos_processes import Family
from raytvb.bench.chaos_requests import (
    RequestLog,
    actor_recoveries,
    find_cuts,
    restarted,
    training_recoveries,
)
from raytvb.cli.main import main
from raytvb.experiment.config import Experiment
from raytvb.experiment.metrics import VectorMetrics
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import add_scores, commit_shared_mask, score_task, select_round
from raytvb.models.pretrained_model import store_base
from raytvb.storage import records
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.store import Store

TASKS = 3


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The experiment of the benchmark, run up to the bases in this process."""
    folder = tmp_path_factory.mktemp("quiet")
    draw_tasks(folder / "images", TASKS)
    experiment = chaos_experiment(str(folder / "store"), folder / "images", TASKS, 6, 60.0)
    fingerprint = store_base(experiment).parents["fingerprint"]
    scores = [score_task(experiment, fingerprint, task, 1, None) for task in experiment.tasks]
    total = add_scores(add_scores(scores[0], scores[1]), scores[2])
    commit_shared_mask(experiment, fingerprint, select_round(experiment, total, None, 1))
    for task in experiment.tasks:
        finetune_task(experiment, fingerprint, task)
    builder = BasisBuilder(experiment)
    builder.add(experiment.task_names)
    builder.write_bases()
    return experiment


@pytest.fixture
def disturbed(quiet: Experiment, tmp_path: Path) -> Store:
    """A copy of the quiet run's store, for a test to change."""
    shutil.copytree(quiet.store, tmp_path / "store")
    return Store(str(tmp_path / "store"))


# The comparison -----------------------------------------------------------------------------------


def test_the_same_results_are_sound(quiet: Experiment, disturbed: Store) -> None:
    found = compare(quiet, Store(quiet.store), disturbed)
    assert (found.lost, found.duplicated, found.differing) == ((), (), ())


def test_a_vector_without_a_record_is_lost(quiet: Experiment, disturbed: Store) -> None:
    disturbed.delete("vectors/task-0001/record.json")
    found = compare(quiet, Store(quiet.store), disturbed)
    assert found.lost == ("task-0001",) and not found.duplicated
    assert found.differing == ("vectors/task-0001/vector.safetensors",)


def test_a_damaged_vector_is_lost(quiet: Experiment, disturbed: Store) -> None:
    key = "vectors/task-0002/vector.safetensors"
    data = bytearray(disturbed.read(key))
    data[-1] ^= 1
    disturbed.write(key, bytes(data))
    found = compare(quiet, Store(quiet.store), disturbed)
    assert (found.lost, found.differing) == (("task-0002",), (key,))


def test_another_mask_or_basis_differs(quiet: Experiment, disturbed: Store) -> None:
    names = [key for key in disturbed.keys("basis") if key.endswith("coefficients.safetensors")]
    for key in (names[0], "masks/shared/mask.safetensors"):
        prefix, _, name = key.rpartition("/")
        record = records.find(disturbed, prefix)
        assert record is not None
        tables = load(disturbed.read(key))
        others = {n: info for n, info in record.files.items() if n != name}
        records.commit(
            disturbed,
            prefix,
            identity=record.identity,
            files={name: save(tables, {"made": "otherwise"})},
            written=others,
            parents=record.parents,
        )
    found = compare(quiet, Store(quiet.store), disturbed)
    assert found.differing == ("masks/shared/mask.safetensors", names[0])
    assert not found.lost


def test_a_vector_that_is_counted_twice_is_seen(quiet: Experiment, disturbed: Store) -> None:
    state = GramState.read(disturbed)
    again = torch.cat([state.gram[:1], state.gram[:1, :1]], dim=1)
    state.extend([(state.tasks[0], state.checksums[state.tasks[0]])], again)
    GramWriter(disturbed).save(state)
    found = compare(quiet, Store(quiet.store), disturbed)
    assert found.duplicated == (f"gram: {state.tasks[0]}",) and not found.lost


def test_another_gram_matrix_differs(quiet: Experiment, disturbed: Store) -> None:
    state = GramState.read(disturbed)
    state.gram[0, 0] *= 1 + 2**-50
    GramWriter(disturbed).save(state)
    assert compare(quiet, Store(quiet.store), disturbed).differing == ("gram",)


# What the requests tell ---------------------------------------------------------------------------


class Clock:
    """Sets the time of events by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("raytvb.bench.chaos_requests.time", clock)
    return clock


def replay(log: RequestLog, clock: Clock, *requests: tuple[float, str, str, int, str]) -> None:
    for clock.now, method, key, status, fault in requests:
        log.answered(method, f"/bucket/run/{key}?x-id=1", status, fault)


METRICS = VectorMetrics(
    steps=100, final_loss=1.0, seconds=10.0, images=1, skipped=0, classes_without_images=0, norm=1.0
)
BEGIN = "vectors/a%2Fb/checkpoint/record.json"
SAVED = "vectors/a%2Fb/checkpoint/step-0000030.safetensors"
DONE = "vectors/a%2Fb/record.json"


def test_a_training_that_was_killed_loses_the_time_since_its_checkpoint(clock: Clock) -> None:
    log = RequestLog("bucket/run")
    replay(
        log,
        clock,
        (0.0, "GET", BEGIN, 404, ""),
        (3.0, "PUT", SAVED, 200, ""),
        (3.1, "PUT", BEGIN, 200, ""),
        (9.0, "GET", BEGIN, 200, "short body"),  # the client does not get it, and asks again
        (9.5, "GET", BEGIN, 200, ""),
        (16.5, "PUT", DONE, 200, "lost answer"),  # it took effect
        (16.6, "GET", "vectors/a%2Fb/vector.safetensors", 200, ""),
    )
    kills = [Kill("node", 2.0), Kill("actor", 3.5), Kill("worker", 4.1), Kill("driver", 8.0)]
    assert restarted(log.events) == ["a/b"]
    (cut,) = find_cuts(log.events, kills, {"a/b": METRICS})
    assert (cut.task, cut.kill, cut.time) == ("a/b", kills[2], 4.1)
    assert cut.steps == pytest.approx(10)  # a second, at ten steps a second
    assert list(training_recoveries(log.events, [cut], kills)) == [("worker", 9.5 - 4.1)]


def test_a_training_that_was_not_killed_or_had_ended_is_seen(clock: Clock) -> None:
    log = RequestLog("bucket/run")
    replay(
        log,
        clock,
        (0.0, "GET", BEGIN, 404, ""),
        (2.0, "GET", BEGIN, 404, ""),  # nothing was killed
        (12.0, "PUT", DONE, 500, ""),
        (12.1, "PUT", DONE, 200, ""),
        (14.0, "GET", BEGIN, 404, ""),  # it was finished
        (24.0, "PUT", DONE, 200, ""),
    )
    kill = Kill("driver", 13.0)
    first, second = find_cuts(log.events, [kill], {"a/b": METRICS})
    assert first.kill is None and first.steps == pytest.approx(20)
    assert (second.kill, second.steps) == (kill, 100)


def test_a_training_may_outlive_its_driver_for_a_moment(clock: Clock) -> None:
    log = RequestLog("bucket/run")
    replay(
        log,
        clock,
        (0.0, "GET", BEGIN, 404, ""),
        (2.0, "PUT", SAVED, 200, ""),
        (2.1, "PUT", BEGIN, 200, ""),
        (20.0, "GET", BEGIN, 200, ""),
        (27.0, "PUT", DONE, 200, ""),
    )
    kills = [Kill("driver", 1.5), Kill("node", 8.0)]
    (cut,) = find_cuts(log.events, kills, {"a/b": METRICS})
    assert (cut.kill, cut.time, cut.steps) == (kills[0], 2.1, 0)
    assert list(training_recoveries(log.events, [cut], kills)) == [("driver", 18.5)]


def test_an_actor_has_recovered_when_the_next_one_takes_over(clock: Clock) -> None:
    log = RequestLog("bucket/run")
    replay(
        log,
        clock,
        (1.0, "PUT", "gram/owner.json", 200, ""),
        (7.0, "PUT", "gram/owner.json", 200, "reset"),
        (7.5, "PUT", "gram/record.json", 200, ""),
    )
    kills = [Kill("actor", 3.0), Kill("worker", 4.0), Kill("actor", 9.0)]
    assert actor_recoveries(log.claims, kills) == [4.0]


# Processes ----------------------------------------------------------------------------------------

ORPHANS = """
import subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = "import subprocess, sys, time; subprocess.Popen(%r); time.sleep(600)" % (sleep,)
subprocess.Popen([sys.executable, "-c", child])
time.sleep(600)
"""


def test_a_family_is_killed_with_those_whose_parents_have_died() -> None:
    family = Family(subprocess.Popen([sys.executable, "-c", ORPHANS]))
    first = psutil.Process(family.process.pid)
    deadline = time.monotonic() + 60
    while len(members := first.children(recursive=True)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family.refresh()
    child = first.children()[0]
    child.kill()
    (orphan,) = (member for member in members if member != child)
    assert orphan.is_running()
    family.kill()
    assert not orphan.is_running() and not first.is_running()


# The whole ----------------------------------------------------------------------------------------


def ours() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_a_small_run_survives_kills_and_a_failing_store(capsys: pytest.CaptureFixture[str]) -> None:
    before, variables = ours(), dict(os.environ)
    options = "--tasks 4 --steps 60 --every 5 --minutes 0.4 --failing 0.05 --seed 1 --json"
    assert main(["bench", "chaos", *options.split()]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["lost"], found["duplicated"], found["differing"]) == (0, 0, 0)
    assert sum(found["kills"].values()) >= 2
    assert found["steps"] == 4 * 60
    assert sum(found["failing_requests"].values()) > 0.01 * found["requests"]
    assert "the quiet run took" in captured.err
    assert not ours() - before
    assert dict(os.environ) == variables
