"""What is measured on the test split once all is chosen: single models, additions, negations, tasks arriving over time,
unseen tasks and the disentanglement of pairs. Bodies of Ray tasks; each writes its rows (see `rows`) as the last thing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load
from torch import Tensor

from raytvb import artifacts
from raytvb.basis import fit_basis
from raytvb.candidates import FULL, Candidate
from raytvb.config import Experiment
from raytvb.data import load_split
from raytvb.encoder import ImageClassifier
from raytvb.evaluate import Evaluator, even_grid, task_subsets
from raytvb.fewshot import few_shot_sample, learn_coefficients
from raytvb.finetune import task_seed
from raytvb.gram_state import GramState
from raytvb.mixes import length_ratios
from raytvb.online import arrivals, watched
from raytvb.rows import row, write_rows
from raytvb.store import Store
from raytvb.trials import Additions, SizeClass, first_round, lengths_to_try, most_accurate
from raytvb.workers import device, threads

NEGATION_LADDER = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0, 5.0)
Identity = Mapping[str, Any]


def evaluate_candidate(experiment: Experiment, name: str, identity: Identity, candidate: Candidate,
                       coefficients: Mapping[str, float], own_lengths: Mapping[str, bool],
                       weights: Mapping[str, Any] | None, test: Evaluator) -> None:
    """Test accuracy of a candidate with what was chosen on validation data for each size; `weights`: a vector."""
    additions, found = Additions(experiment, candidate, test), []
    for size, subsets in candidate.subsets(task_subsets(len(experiment.tasks), experiment.seed)).items():
        alpha = coefficients[str(size)]
        for number, counts in enumerate(additions.counts(subsets, alpha, own_lengths[str(size)])):
            found += [row(candidate.name, "test", size, number, t, alpha, c) for t, c in counts.items()]
    if weights is not None:
        kind = weights["kind"]
        counts, = additions.weighted(torch.tensor(weights["weights"]), per_basis=kind == "per-basis")
        found += [row(kind, "test", len(counts), 0, t, None, c) for t, c in counts.items()]
    write_rows(Store(experiment.store), name, found, identity)


def evaluate_models(experiment: Experiment, name: str, identity: Identity, test: Evaluator) -> None:
    """Test accuracy of the pretrained model on every task, and of each fine-tuned model on its own."""
    found = [row("zero-shot", "test", 0, 0, task, 0.0, test.zero_shot(task)) for task in experiment.task_names]
    vectors = artifacts.vector_set(experiment.store, experiment.task_names)
    each = vectors.combinations(torch.eye(len(experiment.tasks), dtype=torch.float64))
    for index, (task, direction) in enumerate(zip(experiment.task_names, each, strict=True)):
        test.merge(direction, 1.0)
        found.append(row("fine-tuned", "test", 1, index, task, 1.0, test.count(task)))
    write_rows(Store(experiment.store), name, found, identity)


def evaluate_additions(experiment: Experiment, name: str, identity: Identity, candidate: Candidate,
                       validation: Evaluator, test: Evaluator) -> None:
    """Test accuracy of the additions of `evaluate.additions`, each with a coefficient of its own from validation."""
    names, found = experiment.task_names, []
    on_val, on_test = (Additions(experiment, candidate, e) for e in (validation, test))
    for number, group in enumerate(experiment.evaluate.additions):
        subset = tuple(names.index(n) for n in group)
        size_class = SizeClass(on_val, [subset], (1.0,))
        settings = first_round(experiment, size_class, candidate.addends(len(subset)),
                               lengths_to_try(experiment, candidate, len(subset)))
        best = most_accurate([size_class.row(len(subset), s, 1) for s in settings])
        alpha = best["coefficient"]
        counts, = on_test.counts([subset], alpha, best["own_lengths"])
        found += [row(candidate.name, "test", len(subset), number, t, alpha, c) for t, c in counts.items()]
    write_rows(Store(experiment.store), name, found, identity)


def evaluate_online(experiment: Experiment, name: str, identity: Identity, candidate: Candidate,
                    chosen: Mapping[str, Mapping[str, Any]], test: Evaluator) -> None:
    """Test accuracy after each arrival: from the online basis, from one that is fitted to all vectors so far, and from
    these vectors themselves.

    chosen: by `online`, `offline` and `full`, the outcomes of the search for all tasks; an addition of n of T tasks has
    the coefficient of all times T/n. At most 16 arrivals are looked at, and 16 tasks (see `online.watched`).
    """
    store, names = Store(experiment.store), experiment.task_names
    gram = GramState.read(store).ordered(names)
    looks, total, found = arrivals(len(names), experiment.basis.buffer), len(names), []
    prepared, raw = artifacts.basis_vector_set(experiment), artifacts.vector_set(experiment.store, names)
    for n in looks:
        tables = load(store.read(f"{artifacts.online_prefix(candidate.name)}/{artifacts.online_tables(n)}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # as many vectors as tasks, or more than their rank
            fit = fit_basis(gram[:n, :n], candidate.size, method=candidate.method,
                            generator=torch.Generator().manual_seed(experiment.seed))
        for kind, table, vectors in (("online", tables["H"] @ tables["W"], prepared),
                                     ("offline", fit.B @ fit.W, prepared),
                                     ("full", torch.eye(n, dtype=torch.float64), raw)):
            seen = [t for t in watched(total) if t < n]
            weights = torch.zeros(total, len(seen) + 1, dtype=torch.float64)
            alpha, own = chosen[kind]["coefficient"], chosen[kind]["own_lengths"]
            ratios = length_ratios(gram[:n, :n], table) if kind != "full" else torch.ones(n, dtype=torch.float64)
            weights[:n, :-1] = (table * ratios if own["1"] else table)[:, seen]
            weights[:n, -1] = (table * ratios if own[str(total)] else table).sum(dim=1)
            single, together = alpha["1"], alpha[str(total)] * total / n
            for position, direction in enumerate(vectors.combinations(weights)):
                alone = position < len(seen)
                test.merge(direction, single if alone else together)
                for t in seen[position:position + 1] if alone else seen:
                    found.append(row(kind, "test", 1 if alone else 0, n, names[t], single if alone else together,
                                     test.count(names[t])))
    write_rows(store, name, found, identity)


def evaluate_negation(experiment: Experiment, name: str, identity: Identity, candidate: Candidate, index: int,
                      control: str, validation: Evaluator, test: Evaluator) -> None:
    """Forget one task: subtract its vector as far as the control keeps its share of accuracy on validation.

    The largest such coefficient of the ladder is found by bisection (the control falls as the coefficient grows); if
    it does not lower the target on validation, nothing is subtracted. The test split is read for that one alone.
    """
    task = experiment.task_names[index]
    direction = next(Additions(experiment, candidate, validation).directions([(index,)]))
    unchanged = {name: validation.zero_shot(name) for name in (task, control)}
    floor = experiment.evaluate.keep * unchanged[control].accuracy
    chosen, kept = 0.0, unchanged[control]
    low, high = -1, len(NEGATION_LADDER)
    while high - low > 1:
        middle = (low + high) // 2
        validation.merge(direction, -NEGATION_LADDER[middle])
        held = validation.count(control)
        if held.accuracy >= floor:
            low, chosen, kept = middle, NEGATION_LADDER[middle], held
        else:
            high = middle
    validation.merge(direction, -chosen)
    if validation.count(task).accuracy >= unchanged[task].accuracy:
        chosen, kept = 0.0, unchanged[control]
    found = [row("before", "val", 0, 0, control, 0.0, unchanged[control]),
             row("after", "val", 0, 0, control, chosen, kept)]
    found += [row("before", "test", 0, 0, n, 0.0, test.zero_shot(n)) for n in (task, control)]
    test.merge(direction, -chosen)
    found += [row("after", "test", 0, 0, n, chosen, test.count(n)) for n in (task, control)]
    write_rows(Store(experiment.store), name, found, identity)


def evaluate_unseen(experiment: Experiment, name: str, identity: Identity, candidate: Candidate, fingerprint: str,
                    index: int, test: Evaluator) -> None:
    """Test accuracy on a task without a vector: zero-shot, and with coefficients learned on a few training images.

    One coefficient for each vector of the candidate's basis, and one for each of the T task vectors. Rows of the kinds
    `zero-shot`, `basis` and `full`; `size` is the number of coefficients, `subset` that of the images.
    """
    asked = experiment.evaluate.unseen
    assert asked is not None
    task, place = asked.tasks[index], device()
    encoder = artifacts.base_encoder(experiment.store, fingerprint)
    head = artifacts.load_head(Store(experiment.store), experiment, task, encoder)
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
            B = artifacts.load_coefficients(Store(experiment.store), subject.basis)[0]
            lengths = (B * (gram @ B)).sum(dim=0).clamp(min=0).sqrt()
        scales = torch.where(lengths > 0, length / lengths.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
        model: Any = encoder.model
        classifier = ImageClassifier(copy.deepcopy(model.visual), head).eval().to(place)
        learned = learn_coefficients(classifier, vectors, split.images[few], split.labels[few], scales=scales,
                                     preprocess=encoder.preprocess, steps=asked.steps, lr=asked.lr,
                                     batch_size=asked.batch_size, seed=seed, device=place)
        test.merge(learned.direction, 1.0)
        found.append(row(kind, "test", table.shape[0], len(few), task.name, None, test.count(task.name)))
    write_rows(Store(experiment.store), name, found, identity)


PAIR_SCHEMA = pa.schema([("model", pa.string()), ("split", pa.string()), ("first", pa.string()),
                         ("second", pa.string()), ("alpha", pa.float64()), ("beta", pa.float64()),
                         ("disagree", pa.int64()), ("total", pa.int64()), ("error", pa.float64())])


def evaluate_disentanglement(experiment: Experiment, name: str, identity: Identity, candidate: Candidate,
                             pair: tuple[str, str], test: Evaluator) -> None:
    """Weight disentanglement error of two tasks over a grid of their coefficients.

    error(a, b) = sum over both tasks of the share of its images that theta_0 + a tau_1 + b tau_2 answers otherwise than
    the model with that task's part alone (0 to 2; Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, eq. 4).
    """
    asked = experiment.evaluate.disentanglement
    assert asked is not None
    points = even_grid(asked.low, asked.high, asked.points)
    index = [experiment.task_names.index(n) for n in pair]
    first, second = Additions(experiment, candidate, test).directions([(i,) for i in index])
    assert first is not None and second is not None
    alone: list[list[Tensor]] = []
    for task, direction in zip(pair, (first, second), strict=True):
        alone.append([])
        for alpha in points:
            test.merge(direction, alpha)
            alone[-1].append(test.answers(task)[0])
    found = []
    for a, alpha in enumerate(points):
        for b, beta in enumerate(points):
            test.merge(alpha * first + beta * second, 1.0)
            wrong = [int((test.answers(task)[0] != own).sum())
                     for task, own in zip(pair, (alone[0][a], alone[1][b]), strict=True)]
            totals = [len(alone[0][a]), len(alone[1][b])]
            found.append({"model": candidate.name, "split": "test", "first": pair[0], "second": pair[1],
                          "alpha": alpha, "beta": beta, "disagree": sum(wrong), "total": sum(totals),
                          "error": sum(w / t for w, t in zip(wrong, totals, strict=True))})
    write_rows(Store(experiment.store), name, found, identity, PAIR_SCHEMA)
