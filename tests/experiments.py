"""The small experiment that several test modules run: three tasks of the embedded suite, shortened
to run in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from raytvb.storage.store import Store
from raytvb.suite import glyphs
from raytvb.suite.task_names import class_names

TASKS = ("glyphs/greek-blur", "glyphs/latin-fog", "glyphs/clock-blur")
EXPERIMENT = {
    "name": "tiny",
    "tasks": list(TASKS),
    "talos": {"images": 32, "rounds": 2},
    "finetune": {"epochs": 1, "batch_size": 64},
    "basis": {"method": ["ae-anchored", "svd"]},
    "search": {"sizes": [1]},
}


def write_experiment(folder: Path, store: str, **fields: Any) -> Path:
    """The experiment file in `folder`, with some of its fields replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump({**EXPERIMENT, "store": store, **fields}))
    return file


def copy_store(source: Store, folder: Path, *without: str) -> Store:
    """A copy of a store, without the keys that begin with one of these texts."""
    target = Store(str(folder))
    for key in source.keys():
        if not key.startswith(without):
            source.download(key, target.path(key))
    return target


def vector_bytes(store: str) -> dict[str, bytes]:
    """All vector files of a store."""
    target = Store(store)
    return {k: target.read(k) for k in target.keys("vectors") if k.endswith("vector.safetensors")}


def write_images(folder: Path, task: str, split: str, count: int) -> None:
    """The first images of a split of the suite as PNG files, in one folder for each class."""
    made = glyphs.render(task, split, count)
    for number, (image, label) in enumerate(zip(made.images, made.labels, strict=True)):
        name = class_names(task)[label].replace(" ", "_").replace("/", "-")
        path = folder / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(image)).save(path)
