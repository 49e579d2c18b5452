"""Tasks whose worker dies every time: how often they are tried, and what users are told."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from experiments import write_experiment
from processes import nothing_is_left_of, start_python
from ray.exceptions import TaskCancelledError

from raytvb.cli.main import main
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment
from raytvb.orchestration.failures import Failure, TransientError, explain
from raytvb.orchestration.ray_tasks import collect, ray_task
from raytvb.orchestration.task_memory import GB, task_memory
from raytvb.storage.store import Store

pytestmark = pytest.mark.ray


def experiment(folder: Path, store: str = "", **resources: float | None) -> Experiment:
    """An experiment that is never run."""
    where = store or str(folder / "store")
    return load_experiment(write_experiment(folder, where, resources=resources))


def failing(error: Exception | None) -> Callable[[Path], None]:
    """A function that notes its call in a file, and raises; None: it ends its process."""

    def fail(calls: Path) -> None:
        with calls.open("a") as file:
            file.write("x")
        if error is not None:
            raise error
        os._exit(7)

    return fail


@pytest.mark.parametrize(
    ("error", "attempts", "words"),
    [
        (None, 3, "its worker died at once: it crashed, or the system killed it"),
        (ConnectionResetError("reset by peer"), 3, "reset by peer"),
        (RuntimeError("a mistake"), 1, "RuntimeError: a mistake"),
    ],
)
def test_a_task_is_tried_as_often_as_allowed(
    ray_cluster: None, tmp_path: Path, error: Exception | None, attempts: int, words: str
) -> None:
    setup, calls = experiment(tmp_path, max_retries=2), tmp_path / "calls"
    task = ray_task(failing(error), setup, gpu=False)
    failed = collect(setup, {task.remote(calls): "one"})
    assert calls.read_text() == attempts * "x"
    assert failed["one"].attempts == attempts
    assert failed["one"].reason.startswith(words) and "\n" not in failed["one"].reason


MEMORY = """
import sys
from pathlib import Path
from raytvb.experiment.parsing import load_experiment
from raytvb.orchestration.connect import connect
from raytvb.orchestration.ray_tasks import collect, ray_task

def work(calls):
    import time
    with calls.open("a") as file:
        file.write("x")
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(60)

experiment, calls = load_experiment(Path(sys.argv[1])), Path(sys.argv[2])
connect(cpus=1, retries=experiment.resources.max_retries, tell=lambda line: None)
failed = collect(experiment, {ray_task(work, experiment).remote(calls): "one"})
print(failed["one"])
"""


@pytest.mark.slow
def test_a_task_that_ray_ends_for_its_memory_is_tried_as_often_as_allowed(tmp_path: Path) -> None:
    """Ray's memory monitor really ends the worker: it takes 1 % of the memory for too much."""
    file = write_experiment(tmp_path, str(tmp_path / "store"), resources={"max_retries": 1})
    output, calls = tmp_path / "output", tmp_path / "calls"
    calls.touch()
    process = start_python(
        ["-c", MEMORY, str(file), str(calls)],
        output,
        RAY_memory_usage_threshold="0.01",
        RAY_memory_monitor_refresh_ms="100",
        RAY_task_oom_retry_delay_base_ms="100",
    )
    try:
        assert process.wait(200) == 0, output.read_text()
    finally:
        process.kill()
    assert nothing_is_left_of(process)
    (line,) = output.read_text().splitlines()
    assert line.startswith("Ray ended its worker because ") and "GB of its node were in use" in line
    assert "raise resources.memory_gb_per_task" in line and line.endswith("(2 attempts)")
    assert len(calls.read_text()) <= 2  # Ray may end the worker before the task's first line


def test_a_cancelled_task_is_explained(ray_cluster: None) -> None:
    reference = ray.remote(num_cpus=3)(lambda: None).remote()  # more than there are
    ray.cancel(reference)
    with pytest.raises(TaskCancelledError) as error:
        ray.get(reference, timeout=30)
    assert explain(error.value) == "it was cancelled, because the run was stopped"


def test_a_failure_says_how_often_it_was_tried() -> None:
    assert str(Failure("no such folder")) == "no such folder"
    assert str(Failure("reset", 3)) == "reset (3 attempts)"
    assert explain(TransientError("reset by peer")) == "reset by peer"


def test_memory_is_estimated_from_the_model_and_never_more_than_a_node_has(
    finished: tuple[Path, Store], tmp_path: Path
) -> None:
    _, store = finished
    setup = experiment(tmp_path, store.url)
    parameters = store.read_json("base/record.json")["metrics"]["parameters"]
    assert task_memory(setup, 0.0) == GB // 2 + 16 * parameters
    assert task_memory(setup, 1.0) == GB // 2 + 8 * parameters
    assert task_memory(setup, 5.0) == 0, "no node has five GPUs"
    assert task_memory(experiment(tmp_path, memory_gb_per_task=3.5), 0.0) == 3.5 * GB
    assert task_memory(experiment(tmp_path), 0.0) == 0, "the store has no model"


def test_no_more_tasks_run_at_once_than_fit_into_memory(ray_cluster: None, tmp_path: Path) -> None:
    total = ray.cluster_resources()["memory"]
    setup = experiment(tmp_path, memory_gb_per_task=0.6 * total / GB)
    folder = tmp_path / "running"
    folder.mkdir()

    def count(number: int) -> int:
        import time

        (folder / str(number)).touch()
        time.sleep(0.5)
        running = len(list(folder.iterdir()))
        (folder / str(number)).unlink()
        return running

    task, counts = ray_task(count, setup, gpu=False), list[int]()
    pending = {task.remote(number): str(number) for number in range(3)}
    assert not collect(setup, pending, lambda name, running: counts.append(running))
    assert counts == [1, 1, 1]


def test_more_memory_than_any_node_has_is_refused(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_experiment(
        tmp_path, str(tmp_path / "store"), resources={"memory_gb_per_task": 1e6}
    )
    assert main(["finetune", str(file)]) == 1
    message = capsys.readouterr().err
    assert "with 1e+06 GB of memory, per task, but no node of the cluster has that" in message
    assert "or resources.memory_gb_per_task, add nodes" in message
