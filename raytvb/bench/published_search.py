"""The search of the authors' code. It measures every coefficient of every basis on all validation
images, and loads the model, the heads and the images again for each measurement.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load
from torch import Tensor

from raytvb.bench.search_experiment import Subsets, basis_candidates, fetched_base
from raytvb.bench.search_outcome import SearchOutcome, accuracy_of, mean_accuracy, total_images
from raytvb.data.load_split import load_split
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import basis_prefix
from raytvb.experiment.task_store import TaskStore
from raytvb.maths.counts import Count, even_grid, mean
from raytvb.merging.merge import merged_state
from raytvb.models.classifier import ImageClassifier
from raytvb.models.evaluator import BATCH
from raytvb.models.heads import load_head
from raytvb.models.open_clip_models import load_folder
from raytvb.models.worker_process import device
from raytvb.search.candidates import Candidate
from raytvb.storage.mirror import Mirror
from raytvb.storage.store import Store

COEFFICIENTS = tuple(even_grid(0.0, 1.0, 21))
"""The coefficients that the published search tries, for sums of vectors."""


@dataclass(frozen=True)
class _Tuned:
    """A basis with the best coefficient for each number of tasks."""

    candidate: Candidate
    coefficient: Mapping[int, float]
    accuracy: float
    images: int


class _Published:
    """The authors' procedure on one experiment. It keeps nothing from one call to the next."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._copies = Mirror(Store(experiment.store))
        self._base = fetched_base(self._copies, experiment)

    def tuned(self, candidate: Candidate, subsets: Subsets) -> _Tuned:
        """The best coefficient for each number of tasks. Of equally good ones, the first."""
        coefficient, accuracy, images = dict[int, float](), list[float](), 0
        for size, group in subsets.items():
            counts = self._grid(candidate, group)
            accuracies = {alpha: accuracy_of(answers) for alpha, answers in counts.items()}
            best = max(accuracies, key=lambda alpha: accuracies[alpha])
            coefficient[size] = best
            accuracy.append(accuracies[best])
            for answers in counts.values():
                images += sum(count.total for count in answers)
        return _Tuned(candidate, coefficient, mean(accuracy), images)

    def _grid(
        self, candidate: Candidate, group: Sequence[tuple[int, ...]]
    ) -> dict[float, list[Count]]:
        """Counts on the validation images, by coefficient."""
        counts: dict[float, list[Count]] = {alpha: [] for alpha in COEFFICIENTS}
        for subset in group:
            vector = self.vector(candidate, subset)
            for alpha in COEFFICIENTS:
                counts[alpha] += self.counts(vector, alpha, subset, "val")
        return counts

    def tested(self, tuned: _Tuned, subsets: Subsets) -> dict[int, list[Count]]:
        """Counts on the test images with the chosen coefficients, by number of tasks."""
        counts: dict[int, list[Count]] = {}
        for size, group in subsets.items():
            counts[size] = []
            for subset in group:
                vector = self.vector(tuned.candidate, subset)
                counts[size] += self.counts(vector, tuned.coefficient[size], subset, "test")
        return counts

    def vector(self, candidate: Candidate, subset: Sequence[int]) -> dict[str, Tensor]:
        """The decoded sum of some tasks, with a value for every parameter."""
        prefix = basis_prefix(candidate.name)
        basis = self._copies.basis(prefix)
        key = f"{prefix}/coefficients.safetensors"
        self._copies.fetch(key)
        W_MT = load(self._copies.local.read(key))["W"]
        zeros = {name: torch.zeros(shape) for name, shape in basis.parameters.items()}
        return merged_state(zeros, basis, W_MT[:, list(subset)].sum(dim=1))

    @torch.inference_mode()
    def counts(
        self, vector: Mapping[str, Tensor], alpha: float, subset: Sequence[int], split: str
    ) -> list[Count]:
        """Correct answers on each task of the subset by the pretrained model + alpha * vector."""
        place, encoder = device(), load_folder(self._base)
        for name, parameter in encoder.visual_state().items():
            parameter += alpha * vector[name]
        counts = []
        for position in subset:
            task = self._experiment.tasks[position]
            head = load_head(TaskStore(self._experiment, task), encoder).weights
            classifier = ImageClassifier(encoder.visual, head).to(place)
            loaded = load_split(task, split, encoder.preprocess)
            correct = 0
            batches = zip(loaded.images.split(BATCH), loaded.labels.split(BATCH), strict=True)
            for images, labels in batches:
                logits = classifier(encoder.preprocess.normalise(images.to(place)))
                correct += int((logits.argmax(dim=1).cpu() == labels).sum())
            counts.append(Count(correct, len(loaded)))
        return counts


def published_search(experiment: Experiment, subsets: Subsets) -> SearchOutcome:
    """The best coefficients of the best basis. Of equally good bases, the smallest is chosen."""
    started = time.process_time()
    published, all_tuned = _Published(experiment), list[_Tuned]()
    for candidate in basis_candidates(experiment):
        all_tuned.append(published.tuned(candidate, subsets))
    best = max(all_tuned, key=lambda tuned: tuned.accuracy)
    seconds = time.process_time() - started
    tested = published.tested(best, subsets)
    pairs = len(COEFFICIENTS) * len(subsets) * len(all_tuned)
    return SearchOutcome(
        algorithm="an even grid of coefficients; model, heads and images are loaded for each "
        "(authors' code)",
        size=best.candidate.size,
        coefficient=dict(best.coefficient),
        validation_accuracy=best.accuracy,
        candidates=pairs,
        evaluations=pairs,
        images=sum(tuned.images for tuned in all_tuned),
        seconds=seconds,
        test_accuracy=mean_accuracy(tested),
        test_images=total_images(tested),
        test_seconds=time.process_time() - started - seconds,
    )
