"""Ctrl-C, SIGTERM and SIGKILL: exit codes, messages, what is left behind, and what is not lost."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from experiments import write_experiment
from processes import (
    nothing_is_left_of,
    start_python,
    titles,
    titles_of,
    wait_until,
    wait_while_running,
)

from raytvb.cli.signals import STOPPED
from raytvb.experiment.metrics import CheckpointMetrics
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.interruption import noted_interruption
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.storage import records
from raytvb.storage.store import Store

LONG = {"finetune": {"epochs": 200, "batch_size": 64}}
CHECKPOINT_S = 20.0
"""Longer than the end of a command takes on a busy machine."""


def lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip()]


def ends_in_order(process: subprocess.Popen[bytes], errors: Path, patience_s: float = 40) -> bool:
    """Whether a process ends with exit code 130 and one line about it, and leaves nothing."""
    assert process.wait(patience_s) == 130
    text = lines(errors)
    assert text[-1] == STOPPED and text.count(STOPPED) == 1
    assert "Traceback" not in errors.read_text() and "*** SIG" not in errors.read_text()
    return nothing_is_left_of(process)


def saved_steps(store: Store, file: Path) -> dict[str, int]:
    """The steps in the checkpoints of a store, by task."""
    experiment, steps = load_experiment(file), {}
    for task in experiment.tasks:
        folder = TaskStore(experiment, task).checkpoint_prefix
        record = records.find(store, folder)
        if record is not None:
            steps[task.name] = record.metrics_as(CheckpointMetrics, folder).step
    return steps


@contextmanager
def fine_tuning(
    folder: Path, cache: str, **resources: float
) -> Iterator[tuple[subprocess.Popen[bytes], Path, Store, Path]]:
    """A command that fine-tunes two tasks at once, once both have saved a first checkpoint."""
    store, errors = Store(str(folder / "store")), folder / "errors"
    settings = {"checkpoint_s": CHECKPOINT_S, **resources}
    file = write_experiment(folder, store.url, resources=settings, **LONG)
    command = ["-m", "raytvb", "finetune", str(file), "--num-cpus", "2"]
    process = start_python(command, errors, RAYTVB_CACHE=cache)
    try:
        wait_while_running(process, lambda: len(saved_steps(store, file)) == 2, "two checkpoints")
        yield process, errors, store, file
    finally:
        process.kill()
        process.wait()
        assert nothing_is_left_of(process)


@pytest.mark.slow
@pytest.mark.ray
def test_an_interrupted_fine_tune_goes_on_from_the_step_at_which_it_was_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suite_cache: str,
) -> None:
    """SIGTERM reaches only the command, as `kill` and Kubernetes send it."""
    with fine_tuning(tmp_path, suite_cache) as (process, errors, store, file):
        before, sent = saved_steps(store, file), time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert ends_in_order(process, errors)
        assert time.monotonic() - sent < CHECKPOINT_S, "the checkpoints may be those of the clock"
    after = saved_steps(store, file)
    assert after.keys() == before.keys() and all(after[task] > before[task] for task in before)
    experiment = load_experiment(file, {"resources": {"checkpoint_s": 1e-9}})
    (task,) = (task for task in experiment.tasks if task.name == min(after))
    fingerprint = store.read_json("base/record.json")["parents"]["fingerprint"]
    steps: list[int] = []

    def stops(folder: CheckpointFolder, checkpoint: Checkpoint) -> None:
        steps.append(checkpoint.step)
        raise RuntimeError("enough")

    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    monkeypatch.setattr(CheckpointFolder, "save", stops)
    with pytest.raises(RuntimeError, match="enough"):
        finetune_task(experiment, fingerprint, task)
    assert steps == [after[task.name] + 1]


@pytest.mark.slow
@pytest.mark.ray
def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path, suite_cache: str) -> None:
    """The first repetition, very soon, is the same signal again."""
    with fine_tuning(tmp_path, suite_cache) as (process, errors, _, _):
        os.killpg(process.pid, signal.SIGINT)
        for gap in (0.05, 0.5):
            time.sleep(gap)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        assert ends_in_order(process, errors, patience_s=3)


@pytest.mark.slow
@pytest.mark.ray
def test_sigkill_leaves_nothing(tmp_path: Path, suite_cache: str) -> None:
    with fine_tuning(tmp_path, suite_cache) as (process, _, _, _):
        assert {"ray::DashboardAgent", "ray::finetune_task"} <= set(titles(process))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert nothing_is_left_of(process)


@pytest.mark.slow
@pytest.mark.ray
def test_a_signal_while_ray_starts(tmp_path: Path, suite_cache: str) -> None:
    title = "ray::DashboardAgent"
    file, errors = write_experiment(tmp_path, str(tmp_path / "store")), tmp_path / "errors"
    command = ["-m", "raytvb", "run", str(file), "--num-cpus", "2"]
    process = start_python(command, errors, RAYTVB_CACHE=suite_cache)
    try:
        wait_while_running(process, lambda: title in titles(process), title)
        os.kill(process.pid, signal.SIGTERM)
        assert ends_in_order(process, errors)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.ray
def test_sigterm_in_the_evaluation(
    finished: tuple[Path, Store], tmp_path: Path, suite_cache: str
) -> None:
    _, reference = finished
    store, errors = Store(str(tmp_path / "store")), tmp_path / "errors"
    for key in reference.keys():
        if not key.startswith(("evals/", "report/")):
            reference.download(key, store.path(key))
    file = write_experiment(tmp_path, store.url)
    command = ["-m", "raytvb", "run", str(file), "--num-cpus", "2"]
    process = start_python(command, errors, RAYTVB_CACHE=suite_cache)

    def has_begun() -> bool:
        return any(key.endswith("/record.json") for key in store.keys("evals"))

    try:
        wait_while_running(process, has_begun, "an evaluation")
        os.kill(process.pid, signal.SIGTERM)
        assert ends_in_order(process, errors)
        assert not store.exists("report/summary.json")
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_ray(tmp_path: Path, number: signal.Signals) -> None:
    """The command waits for a storage that takes requests and never answers."""
    errors = tmp_path / "errors"
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        variables = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        process = start_python(["-m", "raytvb", "verify", "s3://bucket/store"], errors, **variables)
        try:
            server.settimeout(60)
            connection, _ = server.accept()
            os.kill(process.pid, number)
            assert ends_in_order(process, errors)
            connection.close()
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.ray
def test_a_driver_that_dies_leaves_no_actor_on_a_cluster(
    tmp_path: Path, suite_cache: str, ray_cluster: None
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    store, errors = Store(str(tmp_path / "store")), tmp_path / "errors"
    head: Any = cluster.head_node
    raylet = head.all_processes["raylet"][0].process
    file = write_experiment(tmp_path, store.url, **LONG)

    def workers() -> set[str]:
        children = psutil.Process(raylet.pid).children(recursive=True)
        return {"ray::BasisBuilder", "ray::finetune_task"} & set(titles_of(children))

    try:
        process = start_python(
            ["-m", "raytvb", "run", str(file)],
            errors,
            RAYTVB_CACHE=suite_cache,
            RAY_ADDRESS=cluster.address,
            RAY_AUTH_MODE="token",
        )
        wait_while_running(process, lambda: len(workers()) == 2, "an actor and a task")
        process.kill()
        process.wait()
        wait_until(lambda: not workers(), "workers are left", patience_s=20)
    finally:
        cluster.shutdown()


def test_an_interruption_is_noted_and_the_handler_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with noted_interruption() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is before
