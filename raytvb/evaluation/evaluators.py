"""Loads the images that evaluations need, and makes evaluators over them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raytvb.data.split_cache import cached_split
from raytvb.data.splits import Split
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.stored_vectors import common_mask, vectors_of
from raytvb.experiment.task_store import TaskStore
from raytvb.models.evaluator import Evaluator
from raytvb.models.heads import load_head
from raytvb.models.pretrained_model import load_base
from raytvb.models.worker_process import device, threads, worker_setup
from raytvb.storage.store import Store


@dataclass(frozen=True)
class SplitArrays:
    """The images of a split as plain arrays, which the workers of a node can share in Ray's object
    store.
    """

    images: npt.NDArray[np.uint8]
    """(n, 3, H, W)."""
    labels: npt.NDArray[np.int64]
    """(n,)."""
    classes: tuple[str, ...]

    @classmethod
    def of(cls, split: Split) -> SplitArrays:
        """The arrays of a split, which share its memory."""
        return cls(split.images.numpy(), split.labels.numpy(), tuple(split.classes))

    def split(self) -> Split:
        """The split over these arrays, without a copy.

        Do not write to it, for arrays from Ray's object store are read-only.
        """
        return Split(_tensor(self.images), _tensor(self.labels), self.classes)


def evaluation_split(
    experiment: Experiment, fingerprint: str, task: TaskConfig, split: str
) -> tuple[int, SplitArrays]:
    """The number of images of a split that cannot be read, and the images that can.

    Images are decoded once. Afterwards they come from the store.
    """
    worker_setup()
    preprocess = load_base(experiment.store, fingerprint).preprocess
    loaded = cached_split(
        Store(experiment.store), task, split, preprocess, threads(experiment), experiment.data
    )
    return loaded.skipped, SplitArrays.of(loaded)


def make_evaluator(
    experiment: Experiment,
    fingerprint: str,
    arrays: Mapping[str, SplitArrays],
    precision: str = "fp32",
) -> Evaluator:
    """An evaluator over one split of several tasks.

    It takes directions in the coordinates of the experiment's vectors.

    Args:
        fingerprint: checksum of the pretrained model.
        arrays: images by task.
        precision: of the forward pass, fp32 or bf16.
    """
    encoder = load_base(experiment.store, fingerprint)
    heads: dict[str, Tensor] = {}
    splits: dict[str, Split] = {}
    for task in experiment.every_task:
        if task.name in arrays:
            heads[task.name] = load_head(TaskStore(experiment, task), encoder).weights
            splits[task.name] = arrays[task.name].split()
    mask = common_mask(list(vectors_of(experiment, experiment.task_names).values()))
    return Evaluator(
        encoder.fresh_tower(),
        heads,
        splits,
        encoder.preprocess,
        device=device(),
        mask=None if mask is None else mask.load().tensors(),
        precision=precision,
    )


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """A tensor over an array, without a copy."""
    # torch warns that code might write to a tensor over a read-only array.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
