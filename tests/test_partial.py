"""A task that fails does not stop the others, and a later run does only what is missing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from experiments import TASKS, write_experiment, write_images

import raytvb
from raytvb.cli.main import main
from raytvb.storage.store import Store

pytestmark = pytest.mark.ray
SOURCE = "glyphs/clock-blur"


def tasks_with(data: Path) -> list[Any]:
    """Two tasks of the suite, and `own` with images in a folder."""
    return [TASKS[0], {"name": "own", "data": str(data)}, TASKS[1]]


def write_own(data: Path) -> None:
    for split, count in (("train", 160), ("test", 60)):
        write_images(data / split, SOURCE, split, count)


def untouched(store: Store, *folders: str) -> dict[str, tuple[int, bytes]]:
    """Modification times and bytes of all files in some folders of a local store."""
    files = {}
    for folder in folders:
        for key in store.keys(folder):
            path = Path(store.path(key))
            files[key] = (path.stat().st_mtime_ns, path.read_bytes())
    return files


@pytest.mark.slow
def test_a_run_without_one_folder_and_a_run_with_it(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, data = Store(str(tmp_path / "store")), tmp_path / "own"
    file = str(
        write_experiment(
            tmp_path,
            store.url,
            tasks=tasks_with(data),
            basis={"method": ["ae-anchored", "svd"], "online": True},
            search={"sizes": [1, 2]},
            evaluate={"control": "none"},
        )
    )
    assert main(["run", file]) == 3
    shown = capsys.readouterr()
    reason = f"own: data: there is nothing under {data}"
    assert f"left out: {reason}" in shown.err
    assert "note: no basis of size 2: there are too few vectors" in shown.err
    assert "incomplete: all the rest is done, with 2 of 3 tasks. Missing:" in shown.err
    assert "built from 2 of 3 tasks; missing:" in shown.out and reason in shown.out
    assert "Traceback" not in shown.err
    summary = store.read_json("report/summary.json")
    assert summary["tasks"] == [TASKS[0], TASKS[1]]
    assert [part["name"] for part in summary["missing"]] == ["own"]
    assert "built from 2 of 3 tasks" in store.read("report/index.html").decode()
    assert set(summary["addition"]["svd-m1"]["per_task"]) == {TASKS[0], TASKS[1]}
    made = untouched(store, "vectors", "masks", "base")
    assert len([key for key in made if key.endswith("vector.safetensors")]) == 2
    for command in ("report", "evaluate", "finetune"):
        assert main([command, file]) == 3
        assert reason in capsys.readouterr().err
    assert main(["verify", store.url]) == 0
    assert main(["ls", store.url]) == 0
    assert reason in capsys.readouterr().out

    write_own(data)
    assert main(["run", file]) == 0
    shown = capsys.readouterr()
    assert "finetune 1/1  own: loss" in shown.err and "mask 1/" not in shown.err
    assert "% of its own entries of lowest sensitivity" in shown.err  # the mask was made without it
    assert "missing" not in shown.out and "left out" not in shown.err
    after = untouched(store, "vectors", "masks", "base")
    assert {key: after[key] for key in made} == made
    summary = store.read_json("report/summary.json")
    assert "missing" not in summary and store.keys("failed") == []
    for name in ("svd-m1", "svd-m2", "ae-anchored-m1", "svd-m1-online"):
        metrics = store.read_json(f"basis/{name}/record.json")["metrics"]
        assert metrics["tasks"] == [TASKS[0], "own", TASKS[1]]
    assert set(summary["addition"]["svd-m1-online"]["per_task"]) == {TASKS[0], "own", TASKS[1]}
    assert summary["online"]["svd-m1-online"]["tasks"] == [TASKS[0], TASKS[1], "own"]
    assert main(["verify", store.url]) == 0

    finished = untouched(store, "vectors", "masks", "base", "basis", "online", "search", "evals")
    assert main(["run", file]) == 0
    again = untouched(store, "vectors", "masks", "base", "basis", "online", "search", "evals")
    assert again == finished


@pytest.mark.slow
def test_a_control_and_an_unseen_task_that_are_missing(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    file = str(
        write_experiment(
            tmp_path,
            store.url,
            tasks=[TASKS[0], TASKS[1]],
            evaluate={
                "control": {"name": "pets", "data": str(tmp_path / "pets")},
                "unseen": [{"name": "birds", "data": str(tmp_path / "birds")}, TASKS[2]],
            },
        )
    )
    assert main(["run", file]) == 3
    shown = capsys.readouterr()
    assert "all the rest is done, with 2 of 2 tasks" in shown.err
    assert "(negation is not measured)" in shown.err
    assert "(this unseen task is not measured)" in shown.err
    summary = store.read_json("report/summary.json")
    assert [part["name"] for part in summary["missing"]] == ["pets", "birds"]
    assert summary["negation"] == {} and list(summary["unseen"]) == [TASKS[2]]
    before = untouched(store, "vectors", "masks", "basis", "search")
    for name in ("pets", "birds"):
        write_own(tmp_path / name)
    assert main(["run", file]) == 0
    assert untouched(store, "vectors", "masks", "basis", "search") == before
    summary = store.read_json("report/summary.json")
    assert set(summary["negation"]) == {TASKS[0], TASKS[1]}
    assert set(summary["unseen"]) == {"birds", TASKS[2]}


@pytest.mark.parametrize(
    "talos", [{"mask": "per-task"}, pytest.param({"density": 1.0}, marks=pytest.mark.slow)]
)
def test_two_missing_of_three_stop_after_the_fine_tunes(
    ray_cluster: None, tmp_path: Path, talos: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With a vector each of its own. Once a second task is there, bases are built from the two."""
    store, data = Store(str(tmp_path / "store")), tmp_path / "data"
    tasks = [TASKS[0], *({"name": name, "data": str(data / name)} for name in ("a", "b"))]
    file = str(
        write_experiment(
            tmp_path,
            store.url,
            tasks=tasks,
            talos={"images": 32, "rounds": 1, **talos},
            evaluate={"control": "none"},
        )
    )
    assert main(["run", file]) == 3
    shown = capsys.readouterr().err
    assert "only 1 of 3 tasks can be used, and bases need two" in shown
    assert not store.keys("basis") and not store.keys("search") and not store.keys("report")
    made = untouched(store, "vectors", "masks")
    write_own(data / "b")
    assert main(["plan", file]) == 3
    planned = capsys.readouterr().err
    assert "a run would leave these out:\n  a: data: there is nothing under" in planned
    assert main(["finetune", file]) == 3
    assert "finetune 1/1  b: loss" in capsys.readouterr().err
    assert main(["basis", file]) == 3
    assert "built from 2 of 3 tasks; missing: a: data:" in capsys.readouterr().err
    after = untouched(store, "vectors", "masks")
    assert {key: after[key] for key in made} == made
    metrics = store.read_json("basis/svd-m1/record.json")["metrics"]
    assert metrics["tasks"] == [TASKS[0], "b"]


def test_a_loss_that_is_not_finite_and_an_experiment_that_mends_it(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate grows with the steps, and only `own` has so many that its weights blow up."""
    store, data = Store(str(tmp_path / "store")), tmp_path / "own"
    write_own(data)

    def experiment(epochs: int) -> str:
        tasks = tasks_with(data)
        tasks[1]["epochs"] = epochs
        return str(
            write_experiment(
                tmp_path,
                store.url,
                tasks=tasks,
                talos={"density": 1.0},
                finetune={
                    "epochs": 1,
                    "batch_size": 256,
                    "lr": 1e4,
                    "warmup": 1_000_000,
                    "weight_decay": 30,
                },
                basis={"method": "svd"},
            )
        )

    file = experiment(epochs=80)
    assert main(["finetune", file]) == 3
    message = capsys.readouterr().err
    assert re.search(r"own: finetune: the (loss|gradient's norm) is (nan|inf) at step", message)
    made = untouched(store, "vectors")
    assert main(["basis", file]) == 3
    assert main(["finetune", experiment(epochs=1)]) == 0
    after = untouched(store, "vectors")
    assert {key: after[key] for key in made} == made
    assert main(["basis", experiment(epochs=80)]) == 3  # its vector is of another length
    assert "finetune.epochs: stored 1.0, asked for 80.0" in capsys.readouterr().err
    assert main(["basis", experiment(epochs=1)]) == 0
    metrics = store.read_json("basis/svd-m1/record.json")["metrics"]
    assert metrics["tasks"] == [TASKS[0], "own", TASKS[1]] and store.keys("failed") == []


def test_no_task_left_is_an_error(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    tasks = [{"name": name, "data": str(tmp_path / name)} for name in ("a", "b")]
    file = str(write_experiment(tmp_path, store.url, tasks=tasks))
    assert main(["run", file]) == 1
    message = capsys.readouterr().err
    assert "finetune failed for 2 of its parts" in message
    assert all(f"{name}: there is nothing under" in message for name in "ab")
    assert main(["plan", file]) == 1
    assert "no task can be used" in capsys.readouterr().err
    assert main(["basis", file]) == 1
    assert "2 of 2 task vectors are missing (a, b): run `raytvb finetune` first" in (
        capsys.readouterr().err
    )


def test_the_library_raises_after_everything_else(ray_cluster: None, tmp_path: Path) -> None:
    tasks = tasks_with(tmp_path / "own")
    file = write_experiment(tmp_path, str(tmp_path / "store"), tasks=tasks, talos={"density": 1.0})
    with pytest.raises(raytvb.PartialRunError) as caught:
        raytvb.run(raytvb.load_experiment(file), ["finetune", "basis"])
    (part,) = caught.value.failed
    assert (part.name, part.stage, part.attempts) == ("own", "data", 1)
    assert Store(str(tmp_path / "store")).exists("basis/svd-m1/record.json")
