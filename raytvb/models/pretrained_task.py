"""The pretrained model with the zero-shot head of one task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import check_task
from raytvb.experiment.config import Experiment
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.models.classifier import ImageClassifier
from raytvb.models.heads import StoredHead, load_head
from raytvb.models.open_clip_models import Encoder
from raytvb.models.pretrained_model import load_base
from raytvb.models.worker_process import worker_setup


def prepare_task(
    experiment: Experiment, fingerprint: str, task: TaskConfig, splits: Sequence[str]
) -> None:
    """Check that the data of a task have these splits, and store its zero-shot head.

    No image is read. fingerprint: of the pretrained model. Raises UserError for a split that is
    missing and for data that cannot be opened.
    """
    worker_setup()
    check_task(task, splits)
    load_head(TaskStore(experiment, task), load_base(experiment.store, fingerprint))


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
