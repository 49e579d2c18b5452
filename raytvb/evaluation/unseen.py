"""Tasks without a vector: learns coefficients of stored vectors on a few training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raytvb.data.load_split import load_split
from raytvb.data.splits import Split
from raytvb.evaluation.evaluation import Context, Evaluation
from raytvb.evaluation.rows import Row, write_rows
from raytvb.evaluation.store_names import unseen_name
from raytvb.experiment.present_versions import Parents, PresentVersions
from raytvb.experiment.sections.evaluate import UnseenConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.maths.seeds import task_seed
from raytvb.models.few_shot import few_shot_sample, learn_coefficients
from raytvb.models.pretrained_model import load_base
from raytvb.models.pretrained_task import PretrainedTask
from raytvb.models.worker_process import device, threads
from raytvb.search.candidates import FULL, Candidate
from raytvb.storage.contract import JsonObject


@dataclass(frozen=True)
class _FewImages:
    """The images that coefficients are learned on."""

    split: Split
    """All training images of the task."""
    sample: Tensor
    """(n,) positions of the few images in `split`."""
    seed: int


@dataclass(frozen=True)
class UnseenTask(Evaluation):
    """Test accuracy on a task without a vector, zero-shot and with learned coefficients.

    Coefficients are learned on a few training images, once for the vectors of a basis and once for
    the T task vectors. The `model` of the rows is `zero-shot`, `basis` or `full`, `size` is the
    number of coefficients, and `subset` is the number of training images.
    """

    basis: Candidate
    task: TaskConfig
    learning: UnseenConfig

    @property
    def name(self) -> str:
        """`unseen/` and the task's name."""
        return unseen_name(self.task.name)

    @property
    def choices(self) -> JsonObject:
        """The basis, the task and how it is learned."""
        return {
            "basis": self.basis.name,
            "task": self.task.model_dump(mode="json"),
            "learning": self.learning.model_dump(mode="json", exclude={"tasks"}),
        }

    def parents(self, present: PresentVersions) -> Parents:
        """The basis, and the vectors of all tasks."""
        return present.of_basis(self.basis.basis)

    def run(self, context: Context) -> None:
        """Measure, and write the rows."""
        test, task = context.evaluator("test"), self.task.name
        few = self._few_images(context)
        rows = [Row.of("zero-shot", "test", 0, 0, task, 0.0, test.zero_shot(task))]
        for model, candidate in (("basis", self.basis), ("full", FULL)):
            size, direction = self._learned(context, candidate, few)
            test.merge(direction, 1.0)
            rows.append(Row.of(model, "test", size, len(few.sample), task, None, test.count(task)))
        write_rows(context.store, self.name, rows, self.identity, self.parents(context.present))

    def _few_images(self, context: Context) -> _FewImages:
        experiment = context.experiment
        preprocess = load_base(experiment.store, context.fingerprint).preprocess
        split = load_split(
            self.task, "train", preprocess, threads=threads(experiment), reading=experiment.data
        )
        seed = task_seed(experiment.seed, f"{self.task.name}/few-shot")
        return _FewImages(split, few_shot_sample(split.labels, self.learning.shots, seed), seed)

    def _learned(
        self, context: Context, candidate: Candidate, few: _FewImages
    ) -> tuple[int, Tensor]:
        """The number of learned coefficients, and the direction that they give."""
        experiment, place = context.experiment, device()
        task_store = TaskStore(experiment, self.task)
        pretrained = PretrainedTask.load(task_store, context.fingerprint)
        vectors, table = candidate.open(experiment, context.present)
        learned = learn_coefficients(
            pretrained.classifier(),
            vectors,
            few.split.images[few.sample],
            few.split.labels[few.sample],
            scales=_scales(context, candidate),
            preprocess=pretrained.preprocess,
            steps=self.learning.steps,
            lr=self.learning.lr,
            batch_size=self.learning.batch_size,
            seed=few.seed,
            device=place,
        )
        return len(table), learned.direction


def _scales(context: Context, candidate: Candidate) -> Tensor:
    """Factors (F,) float64 that give each stored vector the mean length of the task vectors.

    The factor is 0 for a vector of length 0.
    """
    gram = context.present.gram(context.experiment)
    task_lengths = gram.diagonal().sqrt()
    lengths = task_lengths
    if candidate.uses_stored_basis:
        B = context.present.basis(context.store, candidate.basis).coefficients()[0]
        lengths = (B * (gram @ B)).sum(dim=0).clamp(min=0).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return torch.where(lengths > 0, task_lengths.mean() / lengths.clamp(min=tiny), 0.0)
