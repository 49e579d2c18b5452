"""Our search as a run does it, without Ray: the trials one after the other, and the choice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from raytvb.bench.search_experiment import Subsets, basis_candidates, record_of
from raytvb.bench.search_outcome import SearchOutcome, mean_accuracy, total_images
from raytvb.data.load_split import load_split
from raytvb.evaluation.evaluators import SplitArrays, make_evaluator
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, basis_prefix
from raytvb.maths.counts import Count
from raytvb.maths.halving import Option, choose
from raytvb.models.evaluator import Evaluator
from raytvb.models.pretrained_model import load_base
from raytvb.search.additions import Additions
from raytvb.search.candidates import ZERO_SHOT, Candidate
from raytvb.search.results import Measured
from raytvb.search.trial import CandidateSearch
from raytvb.storage.mirror import mirror

Rounds = Mapping[str, Sequence[Measured]]
"""The rounds of each candidate, by its name."""


def our_search(experiment: Experiment, subsets: Subsets) -> SearchOutcome:
    """Every candidate goes through all rounds; then the search's own choice among them.

    The pretrained model is a candidate: a basis that is not better than it is not chosen.
    """
    load_base.cache_clear()
    mirror.cache_clear()
    started = time.process_time()
    rounds = _measured(experiment, subsets)
    chosen = choice(experiment, rounds)
    seconds = time.process_time() - started
    last = rounds[chosen.name][-1]
    tested = _tested(experiment, chosen, last, subsets)
    looked_at, evaluations, images = 0, 0, 0
    for own in rounds.values():
        looked_at += own[0].evaluations  # later rounds look at the best of the first
        evaluations += sum(measured.evaluations for measured in own)
        images += sum(measured.images for measured in own)
    return SearchOutcome(
        algorithm="coefficients searched on a part of the images, the best measured on all; "
        "everything is loaded once",
        size=chosen.size if chosen.is_basis else None,
        coefficient=last.coefficient,
        validation_accuracy=last.objective,
        candidates=looked_at,
        evaluations=evaluations,
        images=images,
        seconds=seconds,
        test_accuracy=mean_accuracy(tested),
        test_images=total_images(tested),
        test_seconds=time.process_time() - started - seconds,
    )


def _measured(experiment: Experiment, subsets: Subsets) -> dict[str, list[Measured]]:
    """All rounds of every candidate, on validation images."""
    validation, rounds = split_evaluator(experiment, "val"), dict[str, list[Measured]]()
    for candidate in (ZERO_SHOT, *basis_candidates(experiment)):
        search = CandidateSearch(experiment, candidate, validation, sizes=set(subsets))
        results: list[Measured] = []
        for number in range(1, len(experiment.search.shares) + 1):
            results.append(search.round(number, results[-1] if results else None))
        rounds[candidate.name] = results
    return rounds


def split_evaluator(experiment: Experiment, split: str) -> Evaluator:
    """An evaluator on all images of a split."""
    fingerprint = record_of(experiment, BASE).parents["fingerprint"]
    preprocess, arrays = load_base(experiment.store, fingerprint).preprocess, {}
    for task in experiment.tasks:
        arrays[task.name] = SplitArrays.of(load_split(task, split, preprocess))
    return make_evaluator(experiment, fingerprint, arrays)


def choice(experiment: Experiment, rounds: Rounds) -> Candidate:
    """The basis that the search would choose, or the pretrained model where none is better."""
    candidates, options = {}, []
    for candidate in basis_candidates(experiment):
        candidates[candidate.name] = candidate
        objectives = tuple(measured.objective for measured in rounds[candidate.name])
        size = record_of(experiment, basis_prefix(candidate.name)).size
        options.append(Option(candidate.name, objectives, size))
    zero_shot = rounds[ZERO_SHOT.name][-1].objective
    name = choose(options, zero_shot, experiment.search.tolerance)
    return ZERO_SHOT if name is None else candidates[name]


def _tested(
    experiment: Experiment, chosen: Candidate, last: Measured, subsets: Subsets
) -> dict[int, list[Count]]:
    """Counts on the test images with the chosen settings, by number of tasks."""
    additions = Additions(experiment, chosen, split_evaluator(experiment, "test"))
    tested: dict[int, list[Count]] = {}
    for size, group in subsets.items():
        tested[size] = []
        setting = last.setting(size)
        for counts in additions.counts(group, setting.coefficient, setting.own_lengths):
            tested[size] += counts.values()
    return tested
