"""What runs in Ray workers, as plain functions of small arguments; `pipeline` wraps them with Ray in one place.

Every function that makes a thing first looks for its record, so a retried or resumed call does nothing twice.
"""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load
from torch import Tensor

from raytvb import artifacts, records
from raytvb.basis import fit_basis
from raytvb.candidates import Candidate
from raytvb.config import Experiment, TaskConfig
from raytvb.data import SPLITS, Split, check_task, load_split
from raytvb.encoder import ImageClassifier, Preprocess, quiet_open_clip
from raytvb.errors import UserError
from raytvb.evaluate import (
    Count,
    Evaluator,
    best_coefficient,
    climb,
    coefficient_ladder,
    mean,
    task_subsets,
)
from raytvb.finetune import finetune, task_seed
from raytvb.fisher import fisher_scores
from raytvb.gram_state import GramState
from raytvb.masks import Mask
from raytvb.online import arrivals, watched
from raytvb.store import Store
from raytvb.talos import damp, flatten, round_density, select_further, unflatten
from raytvb.vectors import vector_bytes, vector_info

NEGATION_LADDER = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0, 5.0)


def worker_setup() -> None:
    """Once a worker process: one thread (results do not depend on what a task asks for), no model-loading chatter."""
    quiet_open_clip()
    torch.set_num_threads(1)


def device() -> torch.device:
    """The GPU that Ray gave this worker, or the CPU, also where the GPUs Ray counts are not there."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def _threads(experiment: Experiment) -> int:
    """Threads that decode images; how many changes no result."""
    return max(1, int(experiment.resources.cpus_per_task))


def all_tasks(experiment: Experiment) -> list[TaskConfig]:
    """The tasks, and the control where there is one that is not a task itself."""
    control = experiment.control
    extra = [control] if control is not None and control.name not in experiment.task_names else []
    return [*experiment.tasks, *extra]


def prepare_base(experiment: Experiment, splits: Sequence[str] = SPLITS) -> dict[str, Any]:
    """Store the pretrained model and the heads, if every task has the splits; returns its record."""
    worker_setup()
    store = Store(experiment.store)
    record = records.find(store, artifacts.BASE, artifacts.base_identity(experiment))
    if record is not None:
        return record
    classes = {t.name: check_task(t, [s for s in splits if s != "train" or t in experiment.tasks])
               for t in all_tasks(experiment)}
    return artifacts.write_base(store, experiment, classes)


def _classifier(experiment: Experiment, fingerprint: str, task: TaskConfig) -> tuple[ImageClassifier, Preprocess]:
    """A fresh copy of the pretrained tower with the task's head."""
    encoder = artifacts.base_encoder(experiment.store, fingerprint)
    head = artifacts.load_head(Store(experiment.store), experiment, task, encoder)
    model: Any = encoder.model
    return ImageClassifier(copy.deepcopy(model.visual), head).eval(), encoder.preprocess


def score_task(experiment: Experiment, fingerprint: str, task: TaskConfig, round_: int,
               kept: np.ndarray | None) -> np.ndarray:
    """Scores (D,) float32 of one task in one round, the lowest to be kept; `kept` (D,) bool are still in the race."""
    worker_setup()
    classifier, preprocess = _classifier(experiment, fingerprint, task)
    parameters = {n: p.detach() for n, p in classifier.named_parameters()}
    seed = task_seed(experiment.seed, f"{task.name}/scores/{round_}")
    generator = torch.Generator().manual_seed(seed)
    if experiment.talos.select == "magnitude":
        return -flatten(parameters).abs().numpy()
    if experiment.talos.select == "random":
        return torch.rand(len(flatten(parameters)), generator=generator).numpy()
    if kept is not None:
        damped = damp(parameters, unflatten(torch.from_numpy(kept.copy()), parameters), experiment.talos.damping)
        classifier.load_state_dict(damped, strict=False)
    split = load_split(task, "train", preprocess, threads=_threads(experiment), sample=experiment.talos.images,
                       generator=generator)
    place = device()
    images = preprocess.normalise(split.images.to(place))
    scores = flatten(fisher_scores(classifier.to(place), images, draws=experiment.talos.draws, generator=generator,
                                   precision=experiment.talos.precision))
    return (-scores if experiment.talos.select == "highest" else scores).cpu().numpy()


def add_scores(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Sum of two score vectors; the tree in which they are added is fixed by the order of the tasks."""
    return left + right


def select_round(experiment: Experiment, scores: np.ndarray, kept: np.ndarray | None, round_: int) -> np.ndarray:
    """The entries (D,) bool that are kept after round `round_` (1-based)."""
    density = round_density(experiment.talos.density, round_, experiment.talos.stages)
    before = None if kept is None else {"": torch.from_numpy(kept.copy())}
    return select_further({"": torch.from_numpy(scores.copy())}, before, density)[""].numpy()


def commit_shared_mask(experiment: Experiment, fingerprint: str, kept: np.ndarray) -> dict[str, int]:
    """Store the shared mask; returns its numbers of kept and of all entries."""
    state = artifacts.base_encoder(experiment.store, fingerprint).visual_state()
    mask = Mask.of(unflatten(torch.from_numpy(kept.copy()), state))
    artifacts.write_mask(Store(experiment.store), experiment, artifacts.SHARED_MASK, experiment.tasks, mask)
    return {"kept": mask.kept, "total": len(mask.bits)}


def own_mask(experiment: Experiment, fingerprint: str, task: TaskConfig) -> Mask:
    """A task's own mask: taken from the store, or made in staged rounds and committed."""
    store, mask_id = Store(experiment.store), task.name
    if records.find(store, artifacts.mask_prefix(mask_id), artifacts.mask_identity(experiment, [task])):
        return artifacts.load_mask(store, mask_id)
    kept: np.ndarray | None = None
    for round_ in range(1, experiment.talos.stages + 1):
        kept = select_round(experiment, score_task(experiment, fingerprint, task, round_, kept), kept, round_)
    assert kept is not None
    state = artifacts.base_encoder(experiment.store, fingerprint).visual_state()
    mask = Mask.of(unflatten(torch.from_numpy(kept), state))
    artifacts.write_mask(store, experiment, mask_id, [task], mask)
    return mask


def record_overlap(experiment: Experiment) -> None:
    """Store how far the tasks' own masks overlap, unless that is stored."""
    worker_setup()
    store = Store(experiment.store)
    if records.find(store, artifacts.OVERLAP, artifacts.mask_identity(experiment, experiment.tasks)) is None:
        artifacts.write_overlap(store, experiment)


def finetune_task(experiment: Experiment, fingerprint: str, task: TaskConfig) -> dict[str, Any]:
    """Fine-tune one task, from its checkpoint if it has one, and commit its vector; returns the record."""
    worker_setup()
    store, prefix = Store(experiment.store), artifacts.vector_prefix(task.name)
    identity = artifacts.vector_identity(experiment, task)
    record = records.find(store, prefix, identity)
    if record is not None:
        return record
    classifier, preprocess = _classifier(experiment, fingerprint, task)
    key, mask_id = artifacts.vector_key(task.name), ""
    parents = {"base": fingerprint}
    if experiment.talos.density == 1.0:
        tensors = {n: torch.ones_like(p, dtype=torch.bool) for n, p in classifier.named_parameters()}
        info = vector_info(fingerprint)
    else:
        shared = experiment.talos.mask == "shared"
        mask_id = artifacts.SHARED_MASK if shared else task.name
        mask = artifacts.load_mask(store, mask_id) if shared else own_mask(experiment, fingerprint, task)
        tensors = mask.tensors()
        path = os.path.relpath(f"{artifacts.mask_prefix(mask_id)}/mask.safetensors", prefix)
        info = vector_info(fingerprint, mask_path=path, mask=mask.fingerprint)
        parents["mask"] = mask.fingerprint
    split = load_split(task, "train", preprocess, threads=_threads(experiment))
    config = experiment.finetune.model_copy(update={"epochs": task.epochs or experiment.finetune.epochs})
    try:
        tuned = finetune(classifier, split, tensors, config, preprocess,
                         seed=task_seed(experiment.seed, task.name), device=device(),
                         start=artifacts.load_checkpoint(store, experiment, task),
                         save=partial(artifacts.write_checkpoint, store, experiment, task),
                         save_every_s=experiment.resources.checkpoint_s)
    except UserError as error:
        good = artifacts.load_checkpoint(store, experiment, task)
        kept = "" if good is None else (f"; its last good checkpoint, after step {good.step}, is kept in "
                                        f"{store.where(artifacts.checkpoint_prefix(task.name))}")
        raise UserError(f"task {task.name}: {error} (that is another experiment, with another store){kept}") from None
    artifacts.check_finite(tuned.values, store.where(key))
    metrics = {"steps": tuned.steps, "final_loss": tuned.final_loss, "seconds": tuned.seconds, "images": len(split),
               "skipped": split.skipped, "classes_without_images": len(split.classes) - len(split.labels.unique()),
               "norm": float(sum(v.double().square().sum() for v in tuned.values.values()) ** 0.5)}
    head = store.read(f"{prefix}/head.safetensors")
    files = {"vector.safetensors": vector_bytes(tuned.values, info)}
    record = records.commit(store, prefix, identity=identity, files=files,
                            written={"head.safetensors": records.FileInfo.of(head)}, parents=parents, metrics=metrics)
    store.delete(artifacts.checkpoint_prefix(task.name))
    return record


def evaluation_split(experiment: Experiment, fingerprint: str, task: TaskConfig,
                     split: str) -> tuple[int, dict[str, Any]]:
    """Images of a split that could not be read, and the rest with labels as plain arrays, which workers of a node
    share in Ray's object store."""
    worker_setup()
    preprocess = artifacts.base_encoder(experiment.store, fingerprint).preprocess
    loaded = load_split(task, split, preprocess, threads=_threads(experiment))
    return loaded.skipped, {"images": loaded.images.numpy(), "labels": loaded.labels.numpy(), "classes": loaded.classes}


def make_evaluator(experiment: Experiment, fingerprint: str, arrays: Mapping[str, Mapping[str, Any]]) -> Evaluator:
    """An evaluator over the given splits, whose directions have the coordinates of the experiment's vectors."""
    encoder, store = artifacts.base_encoder(experiment.store, fingerprint), Store(experiment.store)
    named = {t.name: t for t in all_tasks(experiment)}
    heads = {n: artifacts.load_head(store, experiment, named[n], encoder) for n in arrays}
    # Arrays from Ray's object store are read-only; tensors over them are only read here.
    splits = {n: Split(_tensor(a["images"]), _tensor(a["labels"]), tuple(a["classes"])) for n, a in arrays.items()}
    vectors = artifacts.vector_set(experiment.store, experiment.task_names)
    model: Any = encoder.model
    return Evaluator(copy.deepcopy(model.visual), heads, splits, encoder.preprocess, device=device(),
                     mask=None if vectors.mask is None else vectors.mask.load().tensors())


def _tensor(array: np.ndarray) -> Tensor:
    """A tensor over an array, without a copy; torch warns of read-only ones, which are never written to here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


class CandidateEvaluator:
    """Evaluates one candidate: the directions of its merges come from stored files, streamed, a few at a time."""

    def __init__(self, experiment: Experiment, candidate: Candidate, evaluator: Evaluator) -> None:
        self._names = experiment.task_names
        self._evaluator, self._candidate = evaluator, candidate
        self._vectors, self._table = candidate.open(experiment)

    def counts(self, subsets: Sequence[Sequence[int]], alpha: float) -> Iterator[dict[str, Count]]:
        """Correct answers by task for the addition of each subset's tasks, on the images of those tasks."""
        weights = torch.stack([self._table[:, list(subset)].sum(dim=1) for subset in subsets], dim=1)
        for subset, direction in zip(subsets, self._vectors.combinations(weights), strict=True):
            self._evaluator.merge(direction, alpha)
            yield {self._names[t]: self._evaluator.count(self._names[t]) for t in subset}

    def size_class(self, subsets: Sequence[Sequence[int]], alpha: float) -> float:
        """Mean accuracy over all tasks of all subsets; every subset has the same size."""
        return mean([c.accuracy for counts in self.counts(subsets, alpha) for c in counts.values()])


def search_candidate(experiment: Experiment, candidate: Candidate, evaluator: Evaluator) -> dict[str, Any]:
    """Choose a coefficient for each size class on validation data, by a line search.

    Returns {size: coefficient}, {size: accuracy}, everything tried, and the objective.
    """
    limits = experiment.search.coefficients
    subject = CandidateEvaluator(experiment, candidate, evaluator)
    tried: dict[int, dict[float, float]] = {}
    for size, subsets in candidate.subsets(task_subsets(len(experiment.tasks), experiment.seed)).items():
        addends = candidate.addends(size)
        ladder = coefficient_ladder(addends, limits.low, limits.high)
        likely = (1.0 if addends == 1 else 2.0) / addends
        start = min(range(len(ladder)), key=lambda rung: abs(ladder[rung] - likely))
        tried[size] = climb(ladder, start, partial(subject.size_class, subsets))
    chosen = {s: best_coefficient(t) for s, t in tried.items()}
    accuracy = {s: tried[s][a] for s, a in chosen.items()}
    full = len(experiment.tasks)
    objective = {"subsets": mean(list(accuracy.values())), "all": accuracy[full],
                 "single": accuracy.get(1, accuracy[full])}[experiment.search.objective]
    return {"objective": objective, "coefficient": {str(s): a for s, a in chosen.items()},
            "accuracy": {str(s): a for s, a in accuracy.items()},
            "tried": {str(s): {repr(a): v for a, v in sorted(t.items())} for s, t in tried.items()}}


ROWS = pa.schema([("model", pa.string()), ("split", pa.string()), ("size", pa.int64()), ("subset", pa.int64()),
                  ("task", pa.string()), ("coefficient", pa.float64()), ("correct", pa.int64()), ("total", pa.int64())])


def write_rows(store: Store, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write an evaluation as `evals/<name>.parquet`: one object, so it is there whole or not at all."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(r) for r in rows], schema=ROWS), buffer)
    store.write(f"evals/{name}.parquet", buffer.getvalue())


def has_rows(store: Store, name: str) -> bool:
    """The evaluation has been done."""
    return store.exists(f"evals/{name}.parquet")


def read_rows(store: Store, name: str) -> list[dict[str, Any]]:
    """The rows of an evaluation."""
    return pq.read_table(io.BytesIO(store.read(f"evals/{name}.parquet"))).to_pylist()


def _row(model: str, split: str, size: int, subset: int, task: str, alpha: float, count: Count) -> dict[str, Any]:
    return {"model": model, "split": split, "size": size, "subset": subset, "task": task, "coefficient": alpha,
            "correct": count.correct, "total": count.total}


def evaluate_candidate(experiment: Experiment, candidate: Candidate, coefficients: Mapping[str, float],
                       evaluator: Evaluator) -> None:
    """Test accuracy of a candidate with the coefficients chosen on validation data."""
    subject, rows = CandidateEvaluator(experiment, candidate, evaluator), []
    for size, subsets in candidate.subsets(task_subsets(len(experiment.tasks), experiment.seed)).items():
        alpha = coefficients[str(size)]
        for number, counts in enumerate(subject.counts(subsets, alpha)):
            for task, count in counts.items():
                rows.append(_row(candidate.name, "test", size, number, task, alpha, count))
    write_rows(Store(experiment.store), candidate.name, rows)


def evaluate_models(experiment: Experiment, evaluator: Evaluator) -> None:
    """Test accuracy of the pretrained model on every task, and of each fine-tuned model on its own."""
    rows = []
    evaluator.merge(None)
    for task in experiment.task_names:
        rows.append(_row("zero-shot", "test", 0, 0, task, 0.0, evaluator.count(task)))
    vectors = artifacts.vector_set(experiment.store, experiment.task_names)
    each = vectors.combinations(torch.eye(len(experiment.tasks), dtype=torch.float64))
    for index, (task, direction) in enumerate(zip(experiment.task_names, each, strict=True)):
        evaluator.merge(direction, 1.0)
        rows.append(_row("fine-tuned", "test", 1, index, task, 1.0, evaluator.count(task)))
    write_rows(Store(experiment.store), "models", rows)


def evaluate_online(experiment: Experiment, candidate: Candidate, coefficients: Mapping[str, Mapping[str, float]],
                    evaluator: Evaluator) -> None:
    """Test accuracy after each arrival, from the online basis and from one that is fitted to all vectors so far.

    coefficients: by `online` and `offline`, those that the search chose for the two bases of all tasks; an addition of
    n of T tasks has that of all times T/n. At most 16 arrivals are looked at, and 16 tasks (see `online.watched`).
    """
    store, names = Store(experiment.store), experiment.task_names
    gram = GramState.read(store).ordered(names)
    looks, total, rows = arrivals(len(names), experiment.basis.buffer), len(names), []
    vectors = artifacts.vector_set(experiment.store, names)
    for n in looks:
        tables = load(store.read(f"{artifacts.online_prefix(candidate.name)}/{artifacts.online_tables(n)}"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # as many vectors as tasks, or more than their rank
            fit = fit_basis(gram[:n, :n], candidate.size, method=candidate.method,
                            generator=torch.Generator().manual_seed(experiment.seed))
        for kind, table in (("online", tables["H"] @ tables["W"]), ("offline", fit.B @ fit.W)):
            seen = [t for t in watched(total) if t < n]
            weights = torch.zeros(total, len(seen) + 1, dtype=torch.float64)
            weights[:n, :-1], weights[:n, -1] = table[:, seen], table.sum(dim=1)
            chosen = coefficients[kind]
            single, together = chosen["1"], chosen[str(total)] * total / n
            for position, direction in enumerate(vectors.combinations(weights)):
                alone = position < len(seen)
                evaluator.merge(direction, single if alone else together)
                for t in seen[position:position + 1] if alone else seen:
                    rows.append(_row(kind, "test", 1 if alone else 0, n, names[t], single if alone else together,
                                     evaluator.count(names[t])))
    write_rows(store, f"online/{candidate.name}", rows)


def evaluate_negation(experiment: Experiment, candidate: Candidate, index: int, control: str,
                      validation: Evaluator, test: Evaluator) -> None:
    """Forget one task: subtract its vector as far as the control keeps its share of accuracy on validation.

    The largest such coefficient of the ladder is found by bisection (the control falls as the coefficient grows); if
    it does not lower the target on validation, nothing is subtracted. The test split is read for that one alone.
    """
    task = experiment.task_names[index]
    vectors, table = candidate.open(experiment)
    direction = next(vectors.combinations(table[:, index:index + 1]))
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
    rows = [_row("before", "val", 0, 0, control, 0.0, unchanged[control]),
            _row("after", "val", 0, 0, control, chosen, kept)]
    rows += [_row("before", "test", 0, 0, name, 0.0, test.zero_shot(name)) for name in (task, control)]
    test.merge(direction, -chosen)
    rows += [_row("after", "test", 0, 0, name, chosen, test.count(name)) for name in (task, control)]
    write_rows(Store(experiment.store), f"negation-{candidate.name}/{task}", rows)
