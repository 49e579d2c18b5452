"""The images that evaluations need, and evaluators over them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytvb.data.split_cache import cached_split
from raytvb.data.splits import Split
from raytvb.experiment.config import Experiment
from raytvb.experiment.stored import vector_set
from raytvb.experiment.tasks import TaskConfig
from raytvb.models.base import base_encoder
from raytvb.models.evaluator import Evaluator
from raytvb.models.heads import load_head
from raytvb.models.process import device, threads, worker_setup
from raytvb.storage.store import Store


def evaluation_split(
    experiment: Experiment, fingerprint: str, task: TaskConfig, split: str
) -> tuple[int, dict[str, Any]]:
    """Images of a split that could not be read, and the rest with labels as plain arrays, which
    workers of a node share in Ray's object store. They are decoded once and then come from the
    store."""
    worker_setup()
    preprocess = base_encoder(experiment.store, fingerprint).preprocess
    loaded = cached_split(
        Store(experiment.store), task, split, preprocess, threads=threads(experiment)
    )
    return loaded.skipped, {
        "images": loaded.images.numpy(),
        "labels": loaded.labels.numpy(),
        "classes": loaded.classes,
    }


def make_evaluator(
    experiment: Experiment,
    fingerprint: str,
    arrays: Mapping[str, Mapping[str, Any]],
    precision: str = "fp32",
) -> Evaluator:
    """An evaluator over the given splits, whose directions have the coordinates of the experiment's
    vectors.
    """
    encoder, store = base_encoder(experiment.store, fingerprint), Store(experiment.store)
    named = {t.name: t for t in experiment.every_task}
    heads = {n: load_head(store, experiment, named[n], encoder) for n in arrays}
    # Arrays from Ray's object store are read-only; tensors over them are only read here.
    splits = {
        n: Split(_tensor(a["images"]), _tensor(a["labels"]), tuple(a["classes"]))
        for n, a in arrays.items()
    }
    vectors = vector_set(experiment.store, experiment.task_names)
    model: Any = encoder.model
    return Evaluator(
        copy.deepcopy(model.visual),
        heads,
        splits,
        encoder.preprocess,
        device=device(),
        mask=None if vectors.mask is None else vectors.mask.load().tensors(),
        precision=precision,
    )


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over an array, without a copy; torch warns of read-only ones, which are never
    written to here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)
