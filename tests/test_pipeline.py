"""The system as a user meets it: the command line, real images, real Ray, a local and an S3
store.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from experiments import TASKS, vector_bytes, write_experiment
from PIL import Image
from safetensors.torch import load_file

from raytvb.cli.main import main
from raytvb.cli.printing import print_summary
from raytvb.experiment.metrics import VectorMetrics
from raytvb.experiment.parsing import load_experiment
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import load_mask, score_task, select_round
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.maths.subsets import task_subsets
from raytvb.models.pretrained_model import load_base
from raytvb.report.summary_contracts import read_summary
from raytvb.storage.store import Store

pytestmark = pytest.mark.ray


def test_the_summary_has_what_design_promises(finished: tuple[Path, Store]) -> None:
    _, store = finished
    summary = store.read_json("report/summary.json")
    assert summary["tasks"] == list(TASKS)
    assert (
        set(summary["zero_shot"])
        == set(summary["fine_tuned"])
        == set(summary["negation"])
        == set(TASKS)
    )
    names = {f"{m}-m{s}" for m in ("ae-anchored", "svd") for s in (1, 2)}
    sums = {f"{n}-sum" for n in names if not n.startswith("svd")}
    assert names | sums | {"full"} <= set(summary["addition"])
    assert set(summary["random_subset"]) == {
        f"random-{k}-m{s}" for k in ("own", "lstsq") for s in (1, 2)
    }
    sizes = {str(s) for s in task_subsets(len(TASKS), 0)}
    for name, entry in summary["addition"].items():
        assert set(entry["per_task"]) == set(TASKS)
        assert entry["mean"] == pytest.approx(sum(entry["per_task"].values()) / len(TASKS))
        expected = {str(len(TASKS))} if name.endswith("-sum") else sizes
        assert set(entry["subsets"]) == set(entry["coefficient"]) == expected
        assert entry["subsets"][str(len(TASKS))] == pytest.approx(entry["mean"])
    for method in ("ae-anchored", "svd"):
        errors = [summary["addition"][f"{method}-m{s}"]["relative_error"] for s in (1, 2)]
        assert 1 > errors[0] > errors[1] > 0
    assert summary["chosen"]["name"] in names
    assert set(summary["seconds"]) == {"finetune", "basis", "search", "evaluate"}


def test_anchored_bases_add_all_tasks_as_the_full_vectors_do(finished: tuple[Path, Store]) -> None:
    addition = finished[1].read_json("report/summary.json")["addition"]
    full, anchored = (addition[n]["per_task"] for n in ("full", "ae-anchored-m1"))
    assert anchored == pytest.approx(
        full, abs=0.011
    )  # at most three of 300 images at a rounding edge


def test_equal_directions_get_equal_coefficients_whatever_they_are_called(
    finished: tuple[Path, Store],
) -> None:
    """With M = 1 the plain sum of the basis and the decoded sum of all tasks differ by a factor
    only.
    """
    searched = {
        n: finished[1].read_json(f"search/{n}/record.json")["metrics"]
        for n in ("ae-anchored-m1", "ae-anchored-m1-sum")
    }
    accuracy = [m["accuracy"][str(len(TASKS))] for m in searched.values()]
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.015)
    decoded, plain = (m["coefficient"][str(len(TASKS))] for m in searched.values())
    assert plain > 1.5 * decoded


def test_reported_bytes_are_the_bytes_on_disk(finished: tuple[Path, Store]) -> None:
    _, store = finished
    root = Path(store.url)
    stored = store.read_json("report/summary.json")["stored_bytes"]

    def on_disk(pattern: str) -> int:
        return sum(p.stat().st_size for p in root.glob(pattern))

    assert stored["vectors"] == on_disk("vectors/**/vector.safetensors")
    heads = sum(on_disk(f"heads/{task}/head.safetensors") for task in TASKS)
    assert stored["heads"] == heads < on_disk("heads/**/*.safetensors")  # the control has one, too
    assert stored["masks"] == on_disk("masks/**/*.safetensors")
    assert stored["basis"] == on_disk("basis/**/*.safetensors")
    assert stored["vectors"] <= 0.12 * stored["dense_fp32"]


def test_frozen_entries_stay_out_of_sparse_vectors(finished: tuple[Path, Store]) -> None:
    _, store = finished
    from raytvb.finetuning.masks import load_mask

    mask = load_mask(store, "masks/shared/mask.safetensors")
    for task in TASKS:
        values = load_file(store.path(f"vectors/{task}/vector.safetensors"))
        assert {n: len(v) for n, v in values.items()} == {
            n: int(m.sum()) for n, m in mask.tensors().items()
        }
        assert any(bool(v.any()) for v in values.values())


def test_running_again_does_nothing_twice(
    finished: tuple[Path, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    file, store = finished
    before = {
        k: Path(store.path(k)).stat().st_mtime_ns
        for k in store.keys()
        if not k.startswith(("report/", "timings/"))
    }
    summary = store.read_json("report/summary.json")
    assert main(["run", str(file)]) == 0
    assert {
        k: Path(store.path(k)).stat().st_mtime_ns
        for k in store.keys()
        if not k.startswith(("report/", "timings/"))
    } == before
    assert store.read_json("report/summary.json") == summary
    assert "tasks added from" in capsys.readouterr().out


def test_the_page_is_self_contained(finished: tuple[Path, Store]) -> None:
    page = finished[1].read("report/index.html").decode()
    assert page.count("<svg") == 7
    assert "http" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert all(task in page for task in TASKS)


def test_evaluations_are_counts_on_the_test_split(finished: tuple[Path, Store]) -> None:
    _, store = finished
    rows = pq.read_table(store.path("evals/full/rows.parquet")).to_pylist()
    assert {r["split"] for r in rows} == {"test"} and {r["total"] for r in rows} == {300}
    assert len(rows) == sum(
        size * len(subsets) for size, subsets in task_subsets(len(TASKS), 0).items()
    )


def test_a_run_may_verify_every_stored_file(
    finished: tuple[Path, Store], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The closing line with and without damaged files; a damaged file is named."""
    file, reference = finished
    assert main(["run", str(file)]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == f"Report: {reference.where('report/index.html')}"
    store = Store(str(tmp_path / "store"))
    for key in reference.keys():
        reference.download(key, store.path(key))
    own = str(write_experiment(tmp_path, store.url))
    assert main(["run", own, "--verify"]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    count, _, rest = last.partition(" ")
    assert int(count) == len(store.keys()) > 30
    assert rest == f"stored files verified. Report: {store.where('report/index.html')}"
    damaged = Path(store.path("masks/shared/mask.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    assert main(["run", own, "--verify"]) == 1
    message = capfd.readouterr().err
    assert "does not match its records" in message and "masks/shared/mask.safetensors" in message


def test_ls_and_verify(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, store = finished
    assert main(["ls", store.url]) == 0
    listed = capsys.readouterr().out
    assert all(
        what in listed
        for what in (*(f"vectors/{t}" for t in TASKS), "masks/shared", "basis/svd-m2")
    )
    assert main(["verify", store.url]) == 0
    copy = tmp_path / "copy"
    for key in store.keys():
        store.download(key, copy / key)
    damaged = copy / f"vectors/{TASKS[0]}/vector.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(bytes(data))
    capsys.readouterr()
    assert main(["verify", str(copy)]) == 1
    assert f"vectors/{TASKS[0]}/vector.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"finetune": {"epochs": 2, "batch_size": 64}},
            ("3 task vectors will be made again", "epochs: stored 1.0, asked for 2.0", "`--yes`"),
        ),
        ({"seed": 3}, ("seed: stored 0, asked for 3", "`raytvb run --renew mask`")),
        (
            {"model": {"name": "ViT-B-32"}},
            ("belongs to another pretrained model", "asked for 'ViT-B-32'"),
        ),
    ],
)
def test_what_is_stored_is_not_replaced_without_a_word(
    finished: tuple[Path, Store],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    _, store = finished
    before = vector_bytes(store.url)
    assert main(["run", str(write_experiment(tmp_path, store.url, **fields))]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert vector_bytes(store.url) == before


@pytest.mark.slow
def test_own_masks_fractional_gpus_and_one_stage_at_a_time(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    file = write_experiment(
        tmp_path,
        store.url,
        tasks=list(TASKS[:2]),
        talos={"mask": "per-task", "images": 32, "rounds": 2},
        basis={"method": "svd", "online": True},
        evaluate={"control": TASKS[2]},
        resources={"gpus_per_task": 0.5, "max_retries": 1, "shards": 2, "cache": "disk"},
    )
    assert main(["basis", str(file)]) == 1
    assert "run `raytvb finetune` first" in capsys.readouterr().err
    for stage in ("finetune", "basis", "search", "evaluate", "report"):
        assert main([stage, str(file)]) == 0, capsys.readouterr().err
    masks = [store.read_json(f"masks/{t}/record.json")["parents"]["mask"] for t in TASKS[:2]]
    assert len(set(masks)) == 2
    summary = store.read_json("report/summary.json")
    left, right = (load_mask(store, f"masks/{t}/mask.safetensors").bits for t in TASKS[:2])
    overlap = int((left & right).sum()) / int((left | right).sum())
    assert 0 < overlap < 1 and list(summary["mask_overlap"].values()) == pytest.approx(
        [overlap] * 3
    )
    assert f"(Jaccard index): {overlap:.2f} on average" in capsys.readouterr().out
    assert f"(Jaccard index): {overlap:.2f}" in store.read("report/index.html").decode()
    assert set(summary["negation"]) == set(TASKS[:2])
    online = summary["online"]["svd-m1-online"]
    assert online["arrivals"] == [1, 2] and online["tasks"] == list(TASKS[:2])
    for kind in ("online", "offline"):
        (first, none), (left, right) = online[kind]["accuracy"]
        assert none is None and online[kind]["mean"] == pytest.approx([first, (left + right) / 2])
        assert online[kind]["forgetting"] == pytest.approx({TASKS[0]: first - left, TASKS[1]: 0.0})
        assert first == pytest.approx(
            summary["fine_tuned"][TASKS[0]], abs=0.1
        )  # M = 1 is exact for one task
    entry = summary["addition"][
        "svd-m1-online"
    ]  # after the last arrival it is the basis of all tasks
    assert online["online"]["mean"][-1] == pytest.approx(entry["subsets"]["1"], abs=0.004)
    assert online["online"]["added"][-1] == pytest.approx(entry["mean"], abs=0.004)
    assert summary["addition"]["svd-m1-online"]["relative_error"] == pytest.approx(
        summary["addition"]["svd-m1"]["relative_error"], rel=1e-3
    )  # two vectors: one refit sees all of both
    assert "Tasks arriving over time" in store.read("report/index.html").decode()
    stored = load_file(store.path("basis/svd-m1/basis-00001-of-00001.safetensors"))
    base = load_file(store.path("base/model.safetensors"))
    assert all(
        stored[n].shape == (1, *base[n].shape) for n in stored
    )  # no common mask: bases are dense


@pytest.mark.slow
def test_dense_vectors_and_a_single_task(ray_cluster: None, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    file = write_experiment(
        tmp_path, store.url, tasks=[TASKS[0]], talos={"density": 1.0}, basis={"method": "pca"}
    )
    assert main(["run", str(file)]) == 0
    summary = store.read_json("report/summary.json")
    assert summary["stored_bytes"]["masks"] == 0
    assert summary["addition"]["pca-m1"]["relative_error"] == pytest.approx(0, abs=1e-9)


def test_a_store_without_results_takes_the_experiment_with_its_mistake_mended(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two tasks with wrong data and a shared mask give two lines and no traceback. The corrected
    experiment file may use the same store, with the vector that the third task has made in it.
    """
    store = Store(str(tmp_path / "store"))
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, format="PNG")
    images = [picture.getvalue()] * 8
    pq.write_table(pa.table({"picture": images, "label": [0, 1] * 4}), tmp_path / "train.parquet")
    own = {"data": str(tmp_path), "classes": ["a", "b"]}
    tasks = [TASKS[0], {"name": "x", **own}, {"name": "y", **own}]
    file = write_experiment(tmp_path, store.url, tasks=tasks, evaluate={"control": "none"})
    assert main(["finetune", str(file)]) == 3
    message = capfd.readouterr().err
    assert all(
        f"{name}: data: {tmp_path}/train.parquet has no column image" in message for name in "xy"
    )
    assert "Traceback" not in message and "Unhandled" not in message
    tasks[1:] = [
        {**task, "image_column": "picture"} for task in tasks[1:] if isinstance(task, dict)
    ]
    file = write_experiment(tmp_path, store.url, tasks=tasks, evaluate={"control": "none"})
    assert main(["finetune", str(file)]) == 0
    assert main(["finetune", str(write_experiment(tmp_path, store.url))]) == 0
    message = capfd.readouterr().err
    assert "2 stored vectors are not in this experiment, and stay: x, y" in message
    assert "1 kept, 2 new" in message


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"gpus_per_task": 8}, ("8 GPUs per task", "no node", "resources.gpus_per_task")),
        ({"cpus_per_task": 64}, ("64 CPUs", "no node", "resources.cpus_per_task")),
    ],
)
def test_resources_that_are_not_there(
    ray_cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    resources: dict[str, float],
    words: tuple[str, ...],
) -> None:
    file = write_experiment(tmp_path, str(tmp_path / "store"), resources=resources)
    assert main(["run", str(file)]) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_resources_that_are_taken(
    ray_cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr("raytvb.orchestration.connect.FREE_PATIENCE_S", 1.0)

    class Holder:
        def ready(self) -> bool:
            return True

    remote: Any = ray.remote(Holder)
    holder = remote.options(num_cpus=0, num_gpus=4).remote()
    ray.get(holder.ready.remote())
    file = write_experiment(tmp_path, str(tmp_path / "store"), resources={"gpus_per_task": 1})
    assert main(["run", str(file)]) == 1
    assert "0 GPUs of the cluster's 2 CPUs and 4 GPUs are free" in capsys.readouterr().err
    ray.kill(holder)


def test_a_failing_task_is_named_and_the_rest_is_kept(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "data"
    bad.mkdir()
    (bad / "train.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    store = Store(str(tmp_path / "store"))
    file = write_experiment(
        tmp_path,
        store.url,
        talos={"density": 1.0},
        tasks=[TASKS[0], {"name": "broken", "data": str(bad), "classes": ["a", "b"]}],
    )
    assert main(["finetune", str(file)]) == 3
    message = capsys.readouterr().err
    assert "broken: data: " in message and "Traceback" not in message
    assert store.exists(f"vectors/{TASKS[0]}/record.json")


def test_a_fine_tune_goes_on_from_its_checkpoint(
    finished: tuple[Path, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suite_cache: str
) -> None:
    file, reference = finished
    store = Store(str(tmp_path / "store"))
    for key in reference.keys():
        if not key.startswith(f"vectors/{TASKS[0]}/"):
            reference.download(key, store.path(key))
    experiment = load_experiment(file, {"store": store.url, "resources": {"checkpoint_s": 1e-9}})
    fingerprint = store.read_json("base/record.json")["parents"]["fingerprint"]
    steps: list[int] = []
    save = CheckpointFolder.save

    def stops_at_twelve(folder: CheckpointFolder, checkpoint: Checkpoint) -> None:
        save(folder, checkpoint)
        steps.append(checkpoint.step)
        if len(steps) == 12:
            raise RuntimeError("the machine went away")

    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    monkeypatch.setattr(CheckpointFolder, "save", stops_at_twelve)
    with pytest.raises(RuntimeError, match="went away"):
        finetune_task(experiment, fingerprint, experiment.tasks[0])
    assert len(store.keys(f"vectors/{TASKS[0]}/checkpoint")) == 2  # the latest and its record
    record = finetune_task(experiment, fingerprint, experiment.tasks[0])
    assert steps == list(range(1, record.metrics_as(VectorMetrics, TASKS[0]).steps + 1))
    assert vector_bytes(store.url) == vector_bytes(reference.url)
    assert store.keys(f"vectors/{TASKS[0]}/checkpoint") == []


def kill_one_worker(title: str, patience_s: float = 60) -> None:
    """SIGKILL the first process of this test's own Ray that shows the title (`ray::` and the name
    of its task).
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] == [title]:
                    child.kill()
                    return
        time.sleep(0.05)
    raise AssertionError(f"no process {title}")


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_as_often_as_allowed(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, reference = finished
    store = Store(str(tmp_path / "store"))
    for retries, code in ((0, 3), (1, 0)):
        file = write_experiment(
            tmp_path, store.url, resources={"max_retries": retries, "checkpoint_s": 0.1}
        )
        with ThreadPoolExecutor() as threads:
            killed = threads.submit(kill_one_worker, "ray::finetune_task")
            assert main(["finetune", str(file)]) == code
            killed.result()
        message = capsys.readouterr().err
        assert ("all the rest is done, with 2 of 3 tasks. Missing:" in message) == (retries == 0)
    assert not any("checkpoint" in key for key in store.keys("vectors"))
    assert vector_bytes(store.url) == vector_bytes(reference.url)


def start(file: Path, cache: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "RAYTVB_CACHE": cache
    }
    return subprocess.Popen(
        [sys.executable, "-m", "raytvb", "run", str(file), "--num-cpus", "2"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_when(
    process: subprocess.Popen[bytes], store: Store, key: str, patience_s: float = 240
) -> None:
    """SIGKILL the run as soon as a key appears; fails if it ends or nothing appears."""
    deadline = time.monotonic() + patience_s
    while not store.exists(key):
        assert process.poll() is None and time.monotonic() < deadline, f"{key} never appeared"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.s3
def test_s3_gives_the_same_bits_and_so_does_a_run_that_was_killed(
    finished: tuple[Path, Store], s3_environment: str, tmp_path: Path, suite_cache: str
) -> None:
    _, local = finished
    remote = Store(f"{s3_environment}/runs/tiny")
    file = write_experiment(tmp_path, remote.url)
    kill_when(start(file, suite_cache), remote, f"vectors/{TASKS[0]}/vector.safetensors")
    assert not remote.exists("gram/record.json"), "it was killed too late to prove anything"
    for stage in ("finetune", "basis"):
        assert main([stage, str(file)]) == 0
    assert vector_bytes(remote.url) == vector_bytes(local.url)
    for basis in ("ae-anchored-m1", "svd-m2"):
        left, right = (s.read_json(f"basis/{basis}/record.json")["files"] for s in (remote, local))
        assert left == right
    assert main(["verify", remote.url]) == 0


@pytest.mark.slow
def test_ctrl_c_in_the_search_ends_it_and_the_next_run_goes_on(
    finished: tuple[Path, Store], tmp_path: Path, suite_cache: str
) -> None:
    _, reference = finished
    store = Store(str(tmp_path / "store"))
    for key in reference.keys():
        if not key.startswith(("search/", "evals/", "report/")):
            reference.download(key, store.path(key))
    process = start(write_experiment(tmp_path, store.url), suite_cache)
    deadline = time.monotonic() + 240
    while not any(
        key.startswith("search/") and key.endswith("/record.json") for key in store.keys()
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    assert process.wait(60) == 130
    assert not store.exists("report/summary.json")


@pytest.mark.slow
def test_quickstart_shows_what_the_readme_says(tmp_path: Path) -> None:
    """The whole quickstart in a separate process. Bounds allow for other floating point units."""
    run = subprocess.run(
        [sys.executable, "-m", "raytvb", "quickstart", "--store", "here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "here/report/summary.json").read_text())
    addition = summary["addition"]

    def mean(values: Collection[float]) -> float:
        return sum(values) / len(values)

    assert len(summary["tasks"]) == 8
    assert addition["full"]["mean"] >= mean(summary["zero_shot"].values()) + 0.10
    assert addition["ae-m4"]["mean"] >= addition["full"]["mean"] - 0.03
    on_subsets = {
        n: mean(addition[n]["subsets"].values())
        for n in ("full", "ae-m4", "ae-anchored-m4", "svd-m4")
    }
    assert max(v for n, v in on_subsets.items() if n != "full") >= on_subsets["full"] - 0.06
    for method in ("ae", "ae-anchored", "svd"):
        errors = [
            json.loads((tmp_path / f"here/basis/{method}-m{s}/record.json").read_text())["metrics"][
                "relative_error"
            ]
            for s in (2, 4)
        ]
        assert errors[1] < errors[0]
    negation = summary["negation"].values()
    assert sum(n["after"] < n["before"] for n in negation) >= 7
    assert mean([n["after"] for n in negation]) <= 0.8 * mean([n["before"] for n in negation])
    assert all(
        n["control_validation_after"] >= 0.95 * n["control_validation_before"] for n in negation
    )
    assert (
        summary["stored_bytes"]["vectors"] + summary["stored_bytes"]["masks"]
        <= 0.12 * summary["stored_bytes"]["dense_fp32"]
    )


def test_the_table_has_a_column_for_each_number_of_tasks_in_rising_order(
    finished: tuple[Path, Store], capsys: pytest.CaptureFixture[str]
) -> None:
    summary = read_summary(finished[1])
    subsets = {1: 0.8, 16: 0.5, 4: 0.7, 8: 0.6}  # as JSON with sorted keys gives them back
    full = summary.addition["full"].model_copy(update={"subsets": subsets, "mean": 0.5})
    fields = {"addition": {**summary.addition, "full": full}}
    print_summary(summary.model_copy(update=fields))
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if "vectors" in line[:12] and "┃" in line)
    (row,) = (line for line in lines if "full" in line[:12] and "│" in line)
    columns = [cell.strip() for cell in head.split("┃")[3:-2]]
    assert columns == ["all 3", "1 added", "4 added", "8 added", "subsets"]
    values = [cell.strip() for cell in row.split("│")[3:-2]]
    assert values == ["50.0", "80.0", "70.0", "60.0", "65.0"]


def test_every_selection_keeps_what_it_says(
    finished: tuple[Path, Store], monkeypatch: pytest.MonkeyPatch, suite_cache: str
) -> None:
    """One task's own mask of each kind, compared with its scores, on the finished run's model and
    in this process.
    """
    file, store = finished
    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    fingerprint = store.read_json("base/record.json")["parents"]["fingerprint"]
    weights = load_base(store.url, fingerprint).visual_state()

    def mask_and_scores(select: str) -> tuple[torch.Tensor, torch.Tensor]:
        experiment = load_experiment(file, {"talos": {"images": 16, "rounds": 1, "select": select}})
        assert experiment.talos.stages == 1
        scores = score_task(experiment, fingerprint, experiment.tasks[0], 1, None)
        kept = select_round(experiment, scores, None, 1)
        assert kept.sum() == round(0.1 * len(kept))
        return torch.from_numpy(kept), torch.from_numpy(scores)

    (lowest, fisher), (highest, negative) = mask_and_scores("lowest"), mask_and_scores("highest")
    assert torch.equal(negative, -fisher) and not bool((lowest & highest).any())
    assert (
        fisher[lowest].max() <= fisher[~lowest].min()
        and fisher[highest].min() >= fisher[~highest].max()
    )
    largest, _ = mask_and_scores("magnitude")
    flat = torch.cat([weights[n].reshape(-1) for n in sorted(weights)]).abs()
    assert flat[largest].min() >= flat[~largest].max()
    random, _ = mask_and_scores("random")
    assert 0.05 < float((random & lowest).sum() / lowest.sum()) < 0.15
    assert torch.equal(random, mask_and_scores("random")[0])
