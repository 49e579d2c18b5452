"""Our search as in a run, but without Ray: runs the trials one after the other, then chooses."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from raytvb.bench.search_experiment import Subsets, basis_candidates, record_of
from raytvb.bench.search_outcome import SearchOutcome, mean_accuracy, total_images
from raytvb.data.load_split import load_split
from raytvb.evaluation.evaluators import SplitArrays, make_evaluator
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, basis_prefix
from raytvb.experiment.present_versions import present_versions
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
    """Take every candidate through all rounds, then choose among them as the search does.

    The pretrained model is a candidate too: a basis is chosen only if it is better than that.
    """
    load_base.cache_clear()
    mirror.cache_clear()
    started = time.process_time()
    rounds = _measured(experiment, subsets)
    chosen = choice(experiment, rounds)
    seconds = time.process_time() - started
    last = rounds[chosen.name][-1]
    tested = _tested(experiment, chosen, last, subsets)
    coefficients, evaluations, images = 0, 0, 0
    for results in rounds.values():
        coefficients += results[0].evaluations  # later rounds repeat the best of the first
        evaluations += sum(measured.evaluations for measured in results)
        images += sum(measured.images for measured in results)
    return SearchOutcome(
        algorithm="coefficients searched on a part of the images, the best measured on all; "
        "everything is loaded once",
        size=chosen.size if chosen.is_basis else None,
        coefficient=last.coefficient,
        validation_accuracy=last.objective,
        candidates=coefficients,
        evaluations=evaluations,
        images=images,
        seconds=seconds,
        test_accuracy=mean_accuracy(tested),
        test_images=total_images(tested),
        test_seconds=time.process_time() - started - seconds,
    )


def _measured(experiment: Experiment, subsets: Subsets) -> dict[str, list[Measured]]:
    """Measure all rounds of every candidate, on validation images."""
    validation, rounds = split_evaluator(experiment, "val"), dict[str, list[Measured]]()
    present = present_versions(experiment)
    for candidate in (ZERO_SHOT, *basis_candidates(experiment)):
        search = CandidateSearch(experiment, candidate, validation, present, sizes=set(subsets))
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
    """The basis that the search would choose, or the pretrained model if no basis is better."""
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
    test, present = split_evaluator(experiment, "test"), present_versions(experiment)
    additions = Additions(experiment, chosen, test, present)
    tested: dict[int, list[Count]] = {}
    for size, group in subsets.items():
        tested[size] = []
        setting = last.setting(size)
        for counts in additions.counts(group, setting.coefficient, setting.own_lengths):
            tested[size] += counts.values()
    return tested
