"""The experiment of the chaos benchmark: many small tasks, whose images are drawn on the spot."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment

CLASSES, IMAGES, SIDE = 4, 96, 32
BATCH = 32
ONLINE_BUFFER = 8
"""How many vectors the online bases take in at a time."""

PATIENCE_S = 120.0
"""How long a driver waits for a node, and Ray for the restart of one."""


def draw_tasks(folder: Path, count: int) -> None:
    """Draw the training images of tasks, a Parquet file for each.

    Each class of a task has a colour, which noise hides. The same number draws the same images.
    """
    for number in range(count):
        task = folder / _name(number)
        task.mkdir(parents=True)
        pq.write_table(_images(number), task / "train.parquet")


def _name(number: int) -> str:
    return f"task-{number:04d}"


def _images(number: int) -> pa.Table:
    generator = np.random.default_rng(number)
    colours = generator.integers(0, 256, (CLASSES, 3))
    labels = np.arange(IMAGES) % CLASSES
    pngs = []
    for label in labels:
        noise = generator.normal(0, 40, (SIDE, SIDE, 3))
        pixels = np.clip(colours[label] + noise, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        pngs.append(file.getvalue())
    return pa.table({"image": pngs, "label": labels})


def chaos_experiment(
    store: str, images: Path, tasks: int, steps: int, checkpoint_s: float
) -> Experiment:
    """The experiment with images that `draw_tasks` drew; a shared mask, offline and online bases.

    steps: of each fine-tune. checkpoint_s: seconds between its checkpoints.
    """
    names = [_name(number) for number in range(tasks)]
    classes = [f"colour {number}" for number in range(CLASSES)]
    fields = {
        "name": "bench-chaos",
        "store": store,
        "tasks": [{"name": n, "data": str(images / n), "classes": classes} for n in names],
        "talos": {"density": 0.02, "images": 16, "rounds": 1},
        "finetune": {"epochs": steps / -(-IMAGES // BATCH), "batch_size": BATCH},
        "basis": {"method": ["svd"], "online": True, "buffer": ONLINE_BUFFER},
        "search": {"sizes": [min(8, max(1, tasks // 4))]},
        "resources": {"checkpoint_s": checkpoint_s, "wait_s": PATIENCE_S},
    }
    return parse_experiment(fields, "bench chaos")
