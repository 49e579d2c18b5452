"""Tasks without a vector."""

from __future__ import annotations

import copy
from typing import Any

import torch

from raytvb.data.loading import load_split
from raytvb.evaluation.additions import Identity
from raytvb.evaluation.rows import row, write_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.stored import load_coefficients
from raytvb.maths.seeds import task_seed
from raytvb.models.base import base_encoder
from raytvb.models.classifier import ImageClassifier
from raytvb.models.evaluator import Evaluator
from raytvb.models.few_shot import few_shot_sample, learn_coefficients
from raytvb.models.heads import load_head
from raytvb.models.process import device, threads
from raytvb.search.candidates import FULL, Candidate
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store


def evaluate_unseen(
    experiment: Experiment,
    name: str,
    identity: Identity,
    candidate: Candidate,
    fingerprint: str,
    index: int,
    test: Evaluator,
) -> None:
    """Test accuracy on a task without a vector: zero-shot, and with coefficients learned on a few
    training images.

    One coefficient for each vector of the candidate's basis, and one for each of the T task
    vectors. Rows of the kinds `zero-shot`, `basis` and `full`; `size` is the number of
    coefficients, `subset` that of the images.
    """
    asked = experiment.evaluate.unseen
    assert asked is not None
    task, place = asked.tasks[index], device()
    encoder = base_encoder(experiment.store, fingerprint)
    head = load_head(Store(experiment.store), experiment, task, encoder)
    split = load_split(task, "train", encoder.preprocess, threads=threads(experiment))
    seed = task_seed(experiment.seed, f"{task.name}/few-shot")
    few = few_shot_sample(split.labels, asked.shots, seed)
    found = [row("zero-shot", "test", 0, 0, task.name, 0.0, test.zero_shot(task.name))]
    gram = GramState.read(Store(experiment.store)).ordered(experiment.task_names)
    length = gram.diagonal().sqrt().mean()
    subjects = {"basis": candidate, "full": FULL}
    for kind, subject in subjects.items():
        vectors, table = subject.open(experiment)
        if subject.kind == "full":
            lengths = gram.diagonal().sqrt()
        else:
            B = load_coefficients(Store(experiment.store), subject.basis)[0]
            lengths = (B * (gram @ B)).sum(dim=0).clamp(min=0).sqrt()
        scales = torch.where(
            lengths > 0, length / lengths.clamp(min=torch.finfo(torch.float64).tiny), 0.0
        )
        model: Any = encoder.model
        classifier = ImageClassifier(copy.deepcopy(model.visual), head).eval().to(place)
        learned = learn_coefficients(
            classifier,
            vectors,
            split.images[few],
            split.labels[few],
            scales=scales,
            preprocess=encoder.preprocess,
            steps=asked.steps,
            lr=asked.lr,
            batch_size=asked.batch_size,
            seed=seed,
            device=place,
        )
        test.merge(learned.direction, 1.0)
        found.append(
            row(kind, "test", table.shape[0], len(few), task.name, None, test.count(task.name))
        )
    write_rows(Store(experiment.store), name, found, identity)
