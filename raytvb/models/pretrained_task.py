"""The pretrained model with the zero-shot head of one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytvb.data.census import Census, take_census
from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.models.classifier import ImageClassifier
from raytvb.models.heads import StoredHead, load_head
from raytvb.models.open_clip_models import Encoder
from raytvb.models.pretrained_model import load_base
from raytvb.models.prompts import prompt_warnings
from raytvb.models.worker_process import threads, worker_setup


def prepare_task(
    experiment: Experiment, fingerprint: str, task: TaskConfig, splits: Sequence[str]
) -> Census:
    """Check that the data of a task have these splits, and store its zero-shot head.

    fingerprint: of the pretrained model. Returns what the data hold. Every image is decoded once,
    unless `data.leaks` is `ignore`. Raises UserError for a split that is missing, for data that
    cannot be used, and for data with another number of classes than the stored head has.
    """
    worker_setup()
    census = checked_census(experiment, task, splits, threads(experiment))
    head = load_head(TaskStore(experiment, task), load_base(experiment.store, fingerprint))
    if len(head.weights) != len(census.classes):
        raise UserError(
            f"task {task.name}: its head in the store has {len(head.weights)} classes, and its "
            f"data have {len(census.classes)} now: put the data back as they were, or use a new "
            f"store"
        )
    return census


def checked_census(
    experiment: Experiment,
    task: TaskConfig,
    splits: Sequence[str],
    decoders: int,
    *,
    decode: bool = True,
) -> Census:
    """What the data of a task hold, with warnings about its prompts.

    splits: those that the data must have. decoders: number of images that are decoded at the same
    time. decode: whether every image is decoded, unless `data.leaks` is `ignore`. Raises UserError
    as `take_census`, and for a split that is missing.
    """
    decode = decode and experiment.data.leaks != "ignore"
    census = take_census(task, experiment.data, decoders, splits=splits, decode=decode)
    census.warnings += prompt_warnings(experiment.model, [*census.classes], task.prompts)
    return census


@dataclass(frozen=True)
class PretrainedTask:
    """The start of all work on a task: its mask, its fine-tune, coefficients of an unseen task."""

    encoder: Encoder
    head: StoredHead

    @classmethod
    def load(cls, task_store: TaskStore, fingerprint: str) -> PretrainedTask:
        """Load both from the store. Raises UserError if the model has another fingerprint."""
        encoder = load_base(task_store.experiment.store, fingerprint)
        return cls(encoder, load_head(task_store, encoder))

    @property
    def preprocess(self) -> Preprocess:
        """How pixels become the tower's input."""
        return self.encoder.preprocess

    def classifier(self) -> ImageClassifier:
        """A fresh copy of the pretrained tower with the task's head, in eval mode."""
        return ImageClassifier(self.encoder.fresh_tower(), self.head.weights).eval()
