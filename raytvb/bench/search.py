"""Benchmark of the search over basis sizes and coefficients: ours beside the published procedure,
on the same bases.

Zeng et al., "Task Vector Bases", TMLR 2026, arXiv 2502.01015. Both choose on the validation split
by the mean accuracy over tasks and then read the test split once for what they chose, in one
process without Ray. An evaluation is the accuracy of one coefficient for additions of one size;
`images` are those that went through the tower, and `seconds` those of the processor, until the
choice is made.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load
from torch import Tensor

from raytvb.bench.measure import machine, versions
from raytvb.data.loading import load_split
from raytvb.errors import UserError
from raytvb.evaluation.images import make_evaluator
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, EXPERIMENT, basis_prefix, head_key, vector_prefix
from raytvb.experiment.parsing import parse_experiment
from raytvb.maths.basis_methods import METHODS
from raytvb.maths.counts import Count, even_grid, mean
from raytvb.maths.halving import Option, choose
from raytvb.maths.subsets import task_subsets
from raytvb.merging.merge import merged_state
from raytvb.models.base import base_encoder
from raytvb.models.classifier import ImageClassifier
from raytvb.models.evaluator import BATCH
from raytvb.models.open_clip_models import load_folder
from raytvb.models.process import device
from raytvb.search.additions import Additions
from raytvb.search.candidates import ZERO_SHOT, Candidate
from raytvb.search.trial import CandidateSearch
from raytvb.storage import records
from raytvb.storage.mirror import Mirror, mirror
from raytvb.storage.store import Store
from raytvb.suite import glyphs

COEFFICIENTS = tuple(even_grid(0.0, 1.0, 21))  # the published ones, for sums of vectors


TASKS, DENSITY = 16, 0.1


Objective = Literal["all", "subsets"]


Subsets = Mapping[int, Sequence[tuple[int, ...]]]


@dataclass
class _Outcome:
    """What a search chose, and what that took. `coefficient` by number of tasks added; `size`: None
    for no basis.
    """

    algorithm: str
    size: int | None
    coefficient: dict[int, float]
    validation_accuracy: float
    candidates: int
    evaluations: int
    images: int
    seconds: float
    """Of the processor, until the choice is made: other work on the machine would not change them
    in equal parts.
    """
    test_accuracy: float = 0.0
    test_images: int = 0
    test_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For the result."""
        only = next(iter(self.coefficient.values())) if len(self.coefficient) == 1 else None
        coefficient = {str(s): a for s, a in self.coefficient.items()} if only is None else only
        return {
            "algorithm": self.algorithm,
            "seconds": self.seconds,
            "test_seconds": self.test_seconds,
            "candidates": self.candidates,
            "evaluations": self.evaluations,
            "images": self.images,
            "test_images": self.test_images,
            "chosen": {"size": self.size, "coefficient": coefficient},
            "validation_accuracy": self.validation_accuracy,
            "test_accuracy": self.test_accuracy,
        }


def bench_search(
    tasks: int | None = None,
    sizes: Sequence[int] = (),
    *,
    method: str = "ae",
    objective: Objective = "all",
    density: float | None = None,
    store: str | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Seconds, images and accuracy of both searches over bases of one method.

    tasks: how many of the embedded suite (default: 16), fine-tuned with that density (default: 0.1)
    on a local Ray, in a temporary folder; not timed. store: instead of those, that of an experiment
    whose bases are there. sizes: default T/8, T/4, 3T/8, T/2 and 3T/4. objective: `all` tasks
    added, or the mean over `subsets` of them (see `evaluate.task_subsets`) with a coefficient for
    each number of tasks. Raises UserError where the store lacks something.
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown basis method {method!r}; there are: {', '.join(sorted(METHODS))}"
        )
    if store is not None:
        if tasks is not None or density is not None:
            raise UserError(
                "the tasks and the density are those of the store: leave out --tasks and --density"
            )
        return _compared(stored_experiment(Store(store), method, sizes, objective), threads)
    with tempfile.TemporaryDirectory(prefix="raytvb-bench-") as folder:
        experiment = suite_experiment(
            f"{folder}/store",
            TASKS if tasks is None else tasks,
            method,
            sizes,
            objective,
            DENSITY if density is None else density,
        )
        _make(experiment, Path(folder))
        return _compared(experiment, threads)


def basis_sizes(count: int, asked: Sequence[int] = ()) -> list[int]:
    """The sizes asked for, rising; default: T/8, T/4, 3T/8, T/2 and 3T/4, rounded. ValueError for
    one from T on.
    """
    if count < 2:
        raise ValueError("a basis is smaller than the number of tasks: give two tasks or more")
    sizes = asked or [
        min(count - 1, max(1, round(count * share)))
        for share in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
    ]
    wrong = [m for m in sizes if not 1 <= m < count]
    if wrong:
        raise ValueError(
            f"basis size must be from 1 to {count - 1} for {count} tasks, got {wrong[0]}"
        )
    return sorted(set(sizes))


def suite_experiment(
    store: str, tasks: int, method: str, sizes: Sequence[int], objective: Objective, density: float
) -> Experiment:
    """The first tasks of the embedded suite, fine-tuned as in the quickstart."""
    return parse_experiment(
        {
            "name": "bench-search",
            "store": store,
            "tasks": list(glyphs.task_names()[:tasks]),
            "talos": {"density": density},
            "finetune": {"epochs": 7.5, "batch_size": 64},
            "basis": {"method": [method]},
            "search": {"sizes": basis_sizes(tasks, sizes), "objective": objective},
        },
        "bench search",
    )


def stored_experiment(
    store: Store, method: str, sizes: Sequence[int], objective: Objective
) -> Experiment:
    """The experiment of a store, with another search. Raises UserError that names all that the
    search needs and the store lacks."""
    if not store.exists(EXPERIMENT):
        raise UserError(f"{store.url} holds no experiment yet")
    asked = yaml.safe_load(store.read(EXPERIMENT))
    search = {"sizes": basis_sizes(len(asked["tasks"]), sizes), "objective": objective}
    basis = {**asked["basis"], "method": [method]}
    experiment = parse_experiment(
        {**asked, "store": store.url, "basis": basis, "search": search}, store.where(EXPERIMENT)
    )
    needed = [
        BASE,
        *(vector_prefix(t) for t in experiment.task_names),
        *(basis_prefix(c.basis) for c in _candidates(experiment)),
    ]
    missing = [p for p in needed if records.find(store, p) is None]
    if missing:
        there = sorted({k.split("/")[1] for k in store.keys("basis")})
        raise UserError(
            f"{store.url} lacks {', '.join(missing)} (its bases: {', '.join(there) or 'none'}): choose "
            f"among those with --method and --size, or make what is missing with `raytvb basis`"
        )
    return experiment


_SETUP = """
import sys
from raytvb import load_experiment, run
run(load_experiment(sys.argv[1]), ("finetune", "basis"))
"""


def _make(experiment: Experiment, folder: Path) -> None:
    """Make the vectors and bases, in a process of its own: its Ray is gone when the searches are
    timed.

    All that it says goes to standard error.
    """
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")), encoding="utf-8")
    local = {
        k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"
    }  # another machine would not see the folder
    if subprocess.run(
        [sys.executable, "-c", _SETUP, str(file)], stdout=2, env=local, check=False
    ).returncode:
        raise UserError("the vectors and bases to search could not be made: the reason is above")


def _candidates(experiment: Experiment) -> list[Candidate]:
    (method,) = experiment.basis.method
    return [
        Candidate(f"{method}-m{size}", "decoded", method, size) for size in experiment.search.sizes
    ]


def _compared(experiment: Experiment, threads: int) -> dict[str, Any]:
    """Both searches, one after the other."""
    count, objective = len(experiment.tasks), experiment.search.objective
    subsets = task_subsets(count, experiment.seed)
    if objective == "all":
        subsets = {count: subsets[count]}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        _warm(experiment)
        reference, ours = published_search(experiment, subsets), our_search(experiment, subsets)
    finally:
        torch.set_num_threads(before)
    return {
        "benchmark": "search",
        "tasks": count,
        "sizes": list(experiment.search.sizes),
        "method": experiment.basis.method[0],
        "objective": objective,
        "density": experiment.talos.density,
        "reference": reference.to_json(),
        "ours": ours.to_json(),
        "ratio": reference.seconds / ours.seconds,
        "images_ratio": reference.images / ours.images,
        "accuracy_gap": reference.test_accuracy - ours.test_accuracy,
        "machine": machine(device(), threads),
        "versions": versions(),
    }


def _record(experiment: Experiment, prefix: str) -> dict[str, Any]:
    """A record that is there: that was looked for first."""
    record = records.find(Store(experiment.store), prefix)
    assert record is not None
    return record


def _fetched_base(copies: Mirror, experiment: Experiment) -> str:
    """Folder of the pretrained model on this machine."""
    for name in _record(experiment, BASE)["files"]:
        copies.fetch(f"{BASE}/{name}")
    return copies.local.path(BASE)


def _warm(experiment: Experiment) -> None:
    """What is there only once: the suite drawn, libraries imported, and all files in the disk's
    cache.
    """
    copies = Mirror(Store(experiment.store))
    encoder = load_folder(_fetched_base(copies, experiment))
    for task in experiment.tasks:
        for name in ("val", "test"):
            split = load_split(task, name, encoder.preprocess)
    with torch.inference_mode():
        model: Any = encoder.model
        model.visual.to(device())(encoder.preprocess.normalise(split.images[:BATCH].to(device())))
    for candidate in _candidates(experiment):
        for _ in copies.basis(basis_prefix(candidate.basis)).blocks():
            pass


def published_search(experiment: Experiment, subsets: Subsets) -> _Outcome:
    """The algorithm of the authors' code: every coefficient of every basis on all validation
    images.

    Of equals the first coefficient, and the smaller basis.
    """
    started = time.process_time()
    copies = Mirror(Store(experiment.store))
    count = partial(published_counts, experiment, copies, _fetched_base(copies, experiment))
    images, best = 0, None
    for candidate in _candidates(experiment):
        accuracies: dict[int, float] = {}
        coefficients: dict[int, float] = {}
        for size, group in subsets.items():
            found: dict[float, list[Count]] = {alpha: [] for alpha in COEFFICIENTS}
            for subset in group:
                vector = published_vector(copies, candidate, subset)
                for alpha in COEFFICIENTS:
                    found[alpha] += count(vector, alpha, subset, "val")
            values = {alpha: mean([c.accuracy for c in counts]) for alpha, counts in found.items()}
            coefficients[size] = max(values, key=lambda a: values[a])
            accuracies[size] = values[coefficients[size]]
            images += sum(c.total for counts in found.values() for c in counts)
        value = mean(list(accuracies.values()))
        if best is None or value > best[0]:
            best = (value, candidate, coefficients)
    assert best is not None
    value, candidate, coefficients = best
    pairs = len(COEFFICIENTS) * len(subsets) * len(experiment.search.sizes)
    outcome = _Outcome(
        "an even grid of coefficients; model, heads and images are loaded for each (authors' code)",
        candidate.size,
        coefficients,
        value,
        pairs,
        pairs,
        images,
        time.process_time() - started,
    )
    tested = {
        size: [
            c
            for subset in group
            for c in count(
                published_vector(copies, candidate, subset), coefficients[size], subset, "test"
            )
        ]
        for size, group in subsets.items()
    }
    return _with_test(outcome, tested, started)


def published_vector(
    copies: Mirror, candidate: Candidate, subset: Sequence[int]
) -> dict[str, Tensor]:
    """The decoded sum of some tasks, with a value for every parameter."""
    basis = copies.basis(basis_prefix(candidate.basis))
    key = f"{basis_prefix(candidate.basis)}/coefficients.safetensors"
    copies.fetch(key)
    W_MT = load(copies.local.read(key))["W"]
    nothing = {name: torch.zeros(shape) for name, shape in basis.parameters.items()}
    return merged_state(nothing, basis, W_MT[:, list(subset)].sum(dim=1))


@torch.inference_mode()
def published_counts(
    experiment: Experiment,
    copies: Mirror,
    base: str,
    vector: Mapping[str, Tensor],
    alpha: float,
    subset: Sequence[int],
    split: str,
) -> list[Count]:
    """Correct answers on each task of the subset by the pretrained model + alpha * vector; nothing
    is kept of a call before."""
    place, encoder = device(), load_folder(base)
    for name, parameter in encoder.visual_state().items():
        parameter += alpha * vector[name]
    model: Any = encoder.model
    found = []
    for task in (experiment.tasks[t] for t in subset):
        key = head_key(experiment, task)
        copies.fetch(key)
        classifier = ImageClassifier(model.visual, load(copies.local.read(key))["head"]).to(place)
        loaded = load_split(task, split, encoder.preprocess)
        correct = 0
        for images, labels in zip(
            loaded.images.split(BATCH), loaded.labels.split(BATCH), strict=True
        ):
            answers = classifier(encoder.preprocess.normalise(images.to(place))).argmax(dim=1)
            correct += int((answers.cpu() == labels).sum())
        found.append(Count(correct, len(loaded)))
    return found


def our_search(experiment: Experiment, subsets: Subsets) -> _Outcome:
    """The trials of raytvb's search one after the other, each through all rounds, and its choice
    among them.

    The pretrained model is one of them: a basis that is not better than that is not chosen.
    `candidates` are what the first round looks at; the later ones look at the best of those.
    """
    base_encoder.cache_clear()
    mirror.cache_clear()
    started = time.process_time()
    fingerprint = _record(experiment, BASE)["parents"]["fingerprint"]
    validation = make_evaluator(experiment, fingerprint, _arrays(experiment, fingerprint, "val"))
    rounds = dict[str, list[dict[str, Any]]]()
    for candidate in (ZERO_SHOT, *_candidates(experiment)):
        search = CandidateSearch(experiment, candidate, validation, sizes=set(subsets))
        results: list[dict[str, Any]] = []
        for number in range(1, len(experiment.search.shares) + 1):
            results.append(search.round(number, results[-1] if results else None))
        rounds[candidate.name] = results
    chosen = _choice(experiment, rounds)
    last, every = rounds[chosen.name][-1], [r for results in rounds.values() for r in results]
    outcome = _Outcome(
        "coefficients searched on a part of the images, the best measured on all; everything is loaded once",
        chosen.size if chosen.is_basis else None,
        {int(s): a for s, a in last["coefficient"].items()},
        last["objective"],
        sum(results[0]["evaluations"] for results in rounds.values()),
        sum(r["evaluations"] for r in every),
        sum(r["images"] for r in every),
        time.process_time() - started,
    )
    test = make_evaluator(experiment, fingerprint, _arrays(experiment, fingerprint, "test"))
    additions, own = Additions(experiment, chosen, test), last["own_lengths"]
    tested = {
        size: [
            c
            for counts in additions.counts(group, outcome.coefficient[size], own[str(size)])
            for c in counts.values()
        ]
        for size, group in subsets.items()
    }
    return _with_test(outcome, tested, started)


def _arrays(experiment: Experiment, fingerprint: str, split: str) -> dict[str, dict[str, Any]]:
    """Images and labels of all tasks, decoded."""
    preprocess = base_encoder(experiment.store, fingerprint).preprocess
    loaded = {t.name: load_split(t, split, preprocess) for t in experiment.tasks}
    return {
        n: {"images": s.images.numpy(), "labels": s.labels.numpy(), "classes": s.classes}
        for n, s in loaded.items()
    }


def _choice(experiment: Experiment, rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Candidate:
    """The basis that the search would choose, or the pretrained model where none is better than
    that.
    """
    options = []
    for candidate in _candidates(experiment):
        files = _record(experiment, basis_prefix(candidate.basis))["files"]
        size = sum(info["size"] for info in files.values())
        options.append(
            Option(candidate.name, tuple(r["objective"] for r in rounds[candidate.name]), size)
        )
    name = choose(options, rounds[ZERO_SHOT.name][-1]["objective"], experiment.search.tolerance)
    return next((c for c in _candidates(experiment) if c.name == name), ZERO_SHOT)


def _with_test(
    outcome: _Outcome, tested: Mapping[int, Sequence[Count]], started: float
) -> _Outcome:
    """The outcome with its accuracy on the test split, from counts by number of tasks added."""
    outcome.test_accuracy = mean([mean([c.accuracy for c in counts]) for counts in tested.values()])
    outcome.test_images = sum(c.total for counts in tested.values() for c in counts)
    outcome.test_seconds = time.process_time() - started - outcome.seconds
    return outcome
