"""Experiments on a user's own data, in every form, through the command line and real Ray."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments import write_images

from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.models.pretrained_model import store_base
from raytvb.storage.store import Store
from raytvb.suite.task_names import task_names

pytestmark = pytest.mark.ray
SOURCES = {"pets": "glyphs/greek-blur", "EuroSAT": "glyphs/latin-fog", "cars": "glyphs/clock-blur"}


def experiment_file(folder: Path, **fields: Any) -> Path:
    file = folder / "experiment.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "store": str(folder / "store"),
                "talos": {"images": 32, "rounds": 1},
                "basis": {"method": "svd"},
                "finetune": {"epochs": 1, "batch_size": 32},
                "evaluate": {"control": "none"},
                **fields,
            }
        )
    )
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pets` has folders train and test. EuroSAT is as torchvision stores it: JPEG files in one
    folder for each class.
    """
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 320), ("test", 60)):
        write_images(root / "pets" / split, SOURCES["pets"], split, count)
    write_images(root / "torchvision" / "eurosat" / "2750", SOURCES["EuroSAT"], "train", 300)
    for number, path in enumerate(sorted((root / "pets" / "train").rglob("*.png"))):
        if number in (3, 77):
            path.write_bytes(path.read_bytes()[:200])
    return root


@pytest.mark.slow
def test_folders_and_a_torchvision_data_set_with_all_options_of_training(
    ray_cluster: None, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = experiment_file(
        tmp_path,
        tasks=[
            {"name": "pets", "data": str(folders / "pets"), "epochs": 3},
            {
                "name": "EuroSAT",
                "data": "torchvision:EuroSAT",
                "root": str(folders / "torchvision"),
                "splits": {"val": 0.15, "test": 0.2},
            },
        ],
        talos={"images": 32, "rounds": 1, "precision": "bf16"},
        resources={"cpus_per_task": 2},
        finetune={
            "epochs": 1,
            "batch_size": 32,
            "accumulate": 3,
            "precision": "bf16",
            "label_smoothing": 0.1,
            "warmup": 4,
        },
    )
    assert main(["plan", str(file)]) == 0
    assert main(["run", str(file)]) == 0
    shown = capsys.readouterr()
    assert "pets: loss" in shown.err and "pets: left out: 2 " in shown.err
    store = Store(str(tmp_path / "store"))
    metrics = {
        t: store.read_json(f"vectors/{t}/record.json")["metrics"] for t in ("pets", "EuroSAT")
    }
    assert {t: (m["images"], m["skipped"], m["steps"]) for t, m in metrics.items()} == {
        "pets": (286, 2, 27),
        "EuroSAT": (195, 0, 7),
    }
    assert "EuroSAT: loss" in shown.err and "within the warm-up" not in shown.err
    summary = store.read_json("report/summary.json")
    assert summary["fine_tuned"]["pets"] > summary["zero_shot"]["pets"]


@pytest.mark.slow
def test_a_preset_whose_data_was_copied_elsewhere(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The eight tasks of clip8 with their own class names, from folders of the same names."""
    for number, name in enumerate(
        ("Cars", "DTD", "EuroSAT", "GTSRB", "MNIST", "RESISC45", "SVHN", "SUN397")
    ):
        write_images(tmp_path / "clip" / name / "train", task_names()[number], "train", 96)
        write_images(tmp_path / "clip" / name / "test", task_names()[number], "test", 32)
    file = experiment_file(
        tmp_path,
        tasks=[{"preset": "clip8", "data": str(tmp_path / "clip"), "epochs": 1, "classes": None}],
    )
    assert main(["finetune", str(file)]) == 0, capsys.readouterr().err
    vectors = [
        k
        for k in Store(str(tmp_path / "store")).keys("vectors")
        if k.endswith("vector.safetensors")
    ]
    assert len(vectors) == 8


def test_more_corrupt_images_than_allowed_stop_one_task_and_name_the_first(
    ray_cluster: None, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = [
        {"name": "pets", "data": str(folders / "pets"), "max_corrupt": 1},
        {"name": "EuroSAT", "data": "torchvision:EuroSAT", "root": str(folders / "torchvision")},
    ]
    file = experiment_file(
        tmp_path,
        tasks=tasks,
        talos={"density": 1.0},
        finetune={"epochs": 1, "batch_size": 32, "warmup": 500},
    )
    assert main(["finetune", str(file)]) == 3
    message = capsys.readouterr().err
    assert ", its 7 steps end within the warm-up of 500" in message
    assert (
        "pets: data: train/" in message
        and "truncated, and 1 more of train; up to `max_corrupt: 1`" in message
    )
    store = Store(str(tmp_path / "store"))
    assert store.exists("vectors/EuroSAT/record.json") and not store.exists(
        "vectors/pets/record.json"
    )


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    folders: Path, tmp_path: Path
) -> None:
    file = experiment_file(
        tmp_path,
        tasks=[{"name": "pets", "data": str(folders / "pets")}],
        talos={"density": 1.0},
        finetune={"epochs": 1, "batch_size": 32, "lr": 1e30, "warmup": 0},
        resources={"checkpoint_s": 1e-9},
    )
    experiment = load_experiment(file)
    base = store_base(experiment)
    with pytest.raises(
        UserError,
        match=r"task pets: the loss is nan at step 2 of 9; lower finetune.lr \(1e\+30\); "
        r"its last good checkpoint, after step 1, is kept in .*vectors/pets/checkpoint",
    ):
        finetune_task(experiment, base.parents["fingerprint"], experiment.tasks[0])
    kept = CheckpointFolder(TaskStore(experiment, experiment.tasks[0])).load()
    assert (
        kept is not None
        and kept.step == 1
        and all(bool(t.isfinite().all()) for t in kept.tensors.values())
    )
    assert not Store(experiment.store).exists("vectors/pets/record.json")
