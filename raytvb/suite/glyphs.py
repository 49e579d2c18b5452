"""The images of the embedded suite: drawings of a task's source, degraded by its domain."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from raytvb.suite.canvas import SIZE
from raytvb.suite.domains import DOMAINS
from raytvb.suite.sources import SOURCES, Source
from raytvb.suite.task_names import CONTROL, SPLITS, all_classes, class_names, source_and_domain

SPLIT_SIZES = {"train": 1280, "val": 96, "test": 300}
"""Number of images in each split of a task."""

CONTROL_SIZES = {"train": 0, "val": 480, "test": 960}
"""Number of images in each split of the control, over all classes."""


@dataclass(frozen=True)
class Rendered:
    """Images (N, 32, 32, 3) uint8 with labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


def render(task: str, split: str, count: int | None = None) -> Rendered:
    """Draw a split of a task. The images are always the same: task name and split are the seed.

    Draws `count` images, or as many as the split has. Classes are balanced to within one image and
    shuffled. Raises KeyError for an unknown task or split.
    """
    classes = class_names(task)
    if split not in SPLITS:
        raise KeyError(split)
    if count is None:
        count = _size(task, split)
    rng = np.random.default_rng([zlib.crc32(task.encode()), SPLITS.index(split)])
    labels = rng.permutation(_balanced(count, len(classes)))
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        images[i] = quantise(_task_image(task, int(label), rng, split))
    return Rendered(images, labels.astype(np.int64))


def class_counts(task: str, split: str) -> list[int]:
    """Number of images of each class in a split. Nothing is drawn."""
    classes = len(class_names(task))
    counts: list[int] = np.bincount(
        _balanced(_size(task, split), classes), minlength=classes
    ).tolist()
    return counts


def _size(task: str, split: str) -> int:
    return CONTROL_SIZES[split] if task == CONTROL else SPLIT_SIZES[split]


def _balanced(count: int, classes: int) -> np.ndarray:
    """Labels (count,) in their order, the same number of each to within one."""
    return np.arange(count) % classes


def _task_image(task: str, label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """One image of a task, or one of the control, whose images are not degraded."""
    if task == CONTROL:
        source, source_label, _ = all_classes()[label]
        return draw(SOURCES[source], source_label, rng, split)
    source, domain = source_and_domain(task)
    return DOMAINS[domain](draw(SOURCES[source], label, rng, split), 1.0, rng)


def draw(source: Source, label: int, rng: np.random.Generator, split: str) -> np.ndarray:
    """One undegraded image (32, 32, 3) float32.

    The foreground is lighter than the background. Slight noise may take values out of [0, 1].
    """
    mask = source.draw(label, rng, split)[..., None]
    if source.colours is None:
        foreground, background = rng.uniform(0.55, 1.0, 3), rng.uniform(0.0, 0.42, 3)
    else:
        foreground = np.asarray(source.colours[label]) / 255.0 * rng.uniform(0.9, 1.0)
        background = rng.uniform(0.0, 0.2, 3)
    image = background + mask * (foreground - background)
    return (image + rng.normal(0.0, 0.02, image.shape)).astype(np.float32)


def quantise(image: np.ndarray) -> np.ndarray:
    """A float image as uint8. Values outside [0, 1] are clipped."""
    pixels: np.ndarray = (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return pixels
