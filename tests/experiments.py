"""The small experiment that several test modules run: three tasks of the embedded suite, shortened
to run in seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from raytvb.storage.store import Store

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


def vector_bytes(store: str) -> dict[str, bytes]:
    """All vector files of a store."""
    target = Store(store)
    return {k: target.read(k) for k in target.keys("vectors") if k.endswith("vector.safetensors")}
