"""The search with Ray Tune: one trial for each candidate.

A trial chooses the coefficients of its candidate by itself, so that the model, the images and the
vectors are set up once. It goes through rounds on growing shares of the validation images. Each
round is a record in the store, so a search that was killed continues where it was.

ASHA ends the poorer trials of a size early. Which trials it ends depends on which were quicker, so
ASHA decides only what is measured first, never what is chosen. Successive halving over all trials
of a size makes the choice (`maths.halving.halve`). If ASHA ended a trial before a round that
halving grants to its candidate, another pass of `run_search` measures that round.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.maths.halving import LEAST
from raytvb.orchestration.evaluation_service import Service
from raytvb.orchestration.failures import explain
from raytvb.orchestration.progress import Stage
from raytvb.orchestration.task_memory import task_memory
from raytvb.orchestration.tune_trial import Report, asha_time, run_trial
from raytvb.search.candidates import Candidate
from raytvb.search.choice import halving_state
from raytvb.search.rounds import known_rounds
from raytvb.storage.store import Store

StageOf = Callable[[str, int], AbstractContextManager[Stage]]
"""Opens a stage of the progress display, given its name and number of steps."""

MAX_FAILURES = 3
"""How often Tune repeats, at most, a trial whose worker died."""


# Scheduler and callback --------------------------------------------------------------------------


class _ByGroup(FIFOScheduler):
    """One ASHA for each group of candidates that compete.

    A group is the bases of one size, which take the same number of bytes. Candidates without a
    group, and those of a group that is too small for halving, run to their end.
    """

    def __init__(self, experiment: Experiment, groups: Sequence[str | None]) -> None:
        """groups: the group of each candidate, by the candidate's index."""
        super().__init__()  # type: ignore[no-untyped-call]  # Ray's schedulers have no types
        self._groups = list(groups)
        self._ashas: dict[str, TrialScheduler] = {}
        for group in groups:
            if group is not None and self._groups.count(group) > LEAST:
                self._ashas[group] = _asha(experiment)

    def _asha_of(self, trial: Trial) -> TrialScheduler | None:
        group = self._groups[trial.config["index"]]
        return None if group is None else self._ashas.get(group)

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Hand a new trial to the ASHA of its group."""
        asha = self._asha_of(trial)
        if asha is not None:
            asha.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Report) -> str:
        """The decision of the ASHA of the trial's group. Without an ASHA the trial continues."""
        asha = self._asha_of(trial)
        if asha is None:
            return TrialScheduler.CONTINUE
        return asha.on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: Report) -> None:
        """Hand the last result of a trial, if it has one, to the ASHA of its group."""
        asha = self._asha_of(trial)
        if asha is not None and result:
            asha.on_trial_complete(tune_controller, trial, result)


def _asha(experiment: Experiment) -> TrialScheduler:
    """ASHA over the rounds of an experiment."""
    last = asha_time(experiment, len(experiment.search.shares))
    return ASHAScheduler(
        time_attr="time",
        metric="objective",
        mode="max",
        grace_period=1,
        max_t=last * (1 + 1e-9),  # type: ignore[arg-type]  # Ray takes any number
        reduction_factor=1.0 / experiment.search.keep,
    )


class _Progress(tune.Callback):
    """Advances the progress display at the end of each trial.

    Tune pickles its callbacks into a file. This one is pickled as a callback that does nothing.
    """

    def __init__(self, advance: Callable[[str], None], names: Sequence[str]) -> None:
        """advance: called with a note on the trial. names: names of the candidates, in order."""
        self._advance = advance
        self._names = names

    def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
        return tune.Callback, ()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Advance the display by one trial."""
        last = trial.last_result or {}
        share = last.get("share", 1.0)
        images = f" on {100 * share:g} % of the images" if share < 1 else ""
        objective = 100 * last.get("objective", math.nan)
        self._advance(f"{self._names[trial.config['index']]} {objective:.1f} %{images}")


# Passes over missing rounds ----------------------------------------------------------------------


def run_search(service: Service, candidates: Sequence[Candidate], stage_of: StageOf) -> None:
    """Measure all rounds that the store lacks.

    Raises UserError that names the candidates that failed, and the reasons.
    """
    store = Store(service.experiment.store)
    present = service.present
    missing = halving_state(store, service.experiment, candidates, present).missing
    while missing:
        failed = _run_pass(service, candidates, missing, stage_of)
        still_missing = halving_state(store, service.experiment, candidates, present).missing
        if failed or still_missing == missing:
            raise UserError(_failure_message(failed, list(still_missing), len(candidates)))
        missing = still_missing


def _run_pass(
    service: Service,
    candidates: Sequence[Candidate],
    missing: Mapping[str, int],
    stage_of: StageOf,
) -> dict[str, str]:
    """Run Tune once over the candidates with missing rounds. Returns reasons of failures, by name.

    A pass counts as the first if some candidate has no round at all. In the first pass every
    candidate goes through all rounds, unless ASHA ends it. Later passes measure only the rounds
    that halving still needs.
    """
    experiment, store = service.experiment, Store(service.experiment.store)
    rounds = len(experiment.search.shares)
    remaining = [candidate for candidate in candidates if candidate.name in missing]
    is_first = any(
        not known_rounds(store, experiment, candidate, service.present) for candidate in remaining
    )
    if is_first:
        name, limits = "search", [rounds] * len(remaining)
        may_end_early = rounds > 1 and experiment.search.keep < 1.0
    else:
        name, limits = "search, further images", [missing[c.name] for c in remaining]
        may_end_early = False
    with stage_of(name, len(remaining)) as stage:
        return _run_trials(service, remaining, limits, may_end_early, stage)


def _failure_message(failed: Mapping[str, str], missing: Sequence[str], total: int) -> str:
    """Which candidates failed, out of how many, and what to do."""
    count = len(failed) or len(missing)
    reasons = [f"{name}: {reason}" for name, reason in sorted(failed.items())]
    details = "\n  ".join(reasons) or ", ".join(sorted(missing))
    return (
        f"search failed for {count} of {total} candidates; the rest is done and kept:\n"
        f"  {details}\n"
        f"Once the cause is removed, run the same command again to go on."
    )


def _run_trials(
    service: Service,
    candidates: Sequence[Candidate],
    limits: Sequence[int],
    may_end_early: bool,
    stage: Stage,
) -> dict[str, str]:
    """Run a Tune trial for each candidate, up to its limit of rounds.

    Returns the reasons of failures, by the candidate's name.
    """
    # Otherwise Tune handles Ctrl-C itself and returns as if all trials were done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Otherwise Tune prints where it keeps its own files.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Otherwise Tune writes a log of every trial for TensorBoard.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    with tempfile.TemporaryDirectory(prefix="raytvb-tune-") as folder:
        tuner = tune.Tuner(
            _trainable(service, candidates, limits),
            param_space={"index": tune.grid_search(list(range(len(candidates))))},
            tune_config=_tune_config(service.experiment, candidates, may_end_early),
            run_config=_run_config(service.experiment, candidates, stage, folder),
        )
        results = tuner.fit()
    failed: dict[str, str] = {}
    for position in range(len(results)):
        result = results[position]
        name = candidates[result.config["index"]].name if result.config else ""
        if result.metrics and "error" in result.metrics:
            failed[name] = str(result.metrics["error"])
        elif result.error is not None:
            failed[name] = explain(result.error)
    return failed


def _trainable(service: Service, candidates: Sequence[Candidate], limits: Sequence[int]) -> Any:
    """`run_trial` bound to its arguments and resources."""
    resources = service.experiment.resources
    trial = tune.with_parameters(
        run_trial, service=service, candidates=list(candidates), limits=list(limits)
    )
    return tune.with_resources(
        trial,
        {
            "cpu": resources.cpus_per_task,
            "gpu": resources.gpus_per_task,
            "memory": task_memory(service.experiment, resources.gpus_per_task),
        },
    )


def _tune_config(
    experiment: Experiment, candidates: Sequence[Candidate], may_end_early: bool
) -> tune.TuneConfig:
    """How trials are scheduled."""
    concurrent = experiment.resources.concurrent_trials or None
    if may_end_early:
        # Each ASHA is given the metric itself, so Tune is not.
        scheduler = _ByGroup(experiment, [candidate.group for candidate in candidates])
        return tune.TuneConfig(
            reuse_actors=True, max_concurrent_trials=concurrent, scheduler=scheduler
        )
    return tune.TuneConfig(
        metric="objective",
        mode="max",
        reuse_actors=True,
        max_concurrent_trials=concurrent,
        scheduler=FIFOScheduler(),
    )


def _run_config(
    experiment: Experiment, candidates: Sequence[Candidate], stage: Stage, folder: str
) -> tune.RunConfig:
    """Where Tune keeps its own files, and what it does on failures.

    folder: of the driver. Trials report to the driver through Ray, and every round is a record in
    the store, so no other node and no later run reads Tune's files. Some of them are pickles, which
    do not belong into a store.
    """
    failures = min(experiment.resources.max_retries, MAX_FAILURES)
    return tune.RunConfig(
        name="search",
        verbose=0,
        storage_path=folder,
        failure_config=tune.FailureConfig(max_failures=failures),
        callbacks=[_Progress(stage.advance, [candidate.name for candidate in candidates])],
    )
