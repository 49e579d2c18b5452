"""The search with Ray Tune: one trial for each way to add tasks (method x M, and what it is
compared with).

A trial chooses its coefficients by itself, so that the model, the images and the vectors are set up
once. It goes through rounds, on growing shares of the validation images; each is a record in the
store, so that a search that was killed goes on where it was. ASHA ends the poorer trials of a size
early. What it lets through depends on which trial was quicker, so it decides what is measured,
never what is chosen: the choice is that of successive halving over all trials of a size
(`selection.halve`), and rounds which that wants and ASHA ended are made up for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.maths.halving import LEAST
from raytvb.orchestration.progress import Stage
from raytvb.orchestration.service import Service
from raytvb.search.additions import InvalidCandidateError
from raytvb.search.candidates import Candidate
from raytvb.search.decision import halving_state
from raytvb.search.identities import search_identity
from raytvb.search.rounds import known_rounds
from raytvb.search.trial import CandidateSearch
from raytvb.storage import records
from raytvb.storage.store import Store

StageOf = Callable[[str, int], AbstractContextManager[Stage]]


def _trial(
    config: dict[str, Any], service: Service, candidates: Sequence[Candidate], limits: Sequence[int]
) -> None:
    """The rounds of a candidate up to its limit, each reported to Tune; those that the store has
    are not repeated.
    """
    experiment, candidate = service.experiment, candidates[config["index"]]
    store, search = Store(experiment.store), None
    known = known_rounds(store, experiment, candidate)
    for number in range(1, limits[config["index"]] + 1):
        if len(known) < number:
            try:
                search = search or CandidateSearch(experiment, candidate, service.evaluator("val"))
                result = search.round(number, known[-1] if known else None)
            except InvalidCandidateError as error:
                result = {"invalid": str(error), "objective": None, "accuracy": {}}
            except (
                UserError,
                ValueError,
            ) as error:  # fails again: Tune is to repeat only what a dying worker broke
                tune.report(
                    {"objective": -math.inf, "time": _time(experiment, number), "error": str(error)}
                )
                return
            records.commit(
                store,
                f"{search_prefix(candidate.name)}/round-{number}",
                identity=search_identity(experiment, candidate),
                metrics=result,
            )
            known = known_rounds(store, experiment, candidate)
        result = known[number - 1]
        tune.report(
            {
                "objective": result["objective"],
                "time": _time(experiment, number),
                "method": candidate.method,
                "size": candidate.size,
                "share": experiment.search.shares[number - 1],
                **{f"accuracy_{s}": a for s, a in result["accuracy"].items()},
            }
        )
        if "invalid" in result:
            return


def _time(experiment: Experiment, number: int) -> float:
    """What ASHA takes for the time of a round: its rounds are powers of the reduction factor."""
    return float((1.0 / experiment.search.keep) ** (number - 1))


class _ByGroup(FIFOScheduler):  # type: ignore[misc]
    """An ASHA for each group of candidates, which alone are compared: those of one size, whose
    bytes are equal.
    """

    def __init__(self, experiment: Experiment, groups: Sequence[str | None]) -> None:
        super().__init__()
        self._groups, self._ashas = list(groups), dict[str, TrialScheduler]()
        for group in groups:
            if group is not None and self._groups.count(group) > LEAST:
                self._ashas[group] = ASHAScheduler(
                    time_attr="time",
                    metric="objective",
                    mode="max",
                    grace_period=1,
                    max_t=_time(experiment, len(experiment.search.shares)) * (1 + 1e-9),
                    reduction_factor=1.0 / experiment.search.keep,
                )

    def _asha(self, trial: Any) -> TrialScheduler | None:
        group = self._groups[trial.config["index"]]
        return None if group is None else self._ashas.get(group)

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Tell the trial's ASHA."""
        if asha := self._asha(trial):
            asha.on_trial_add(controller, trial)

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What its ASHA says; CONTINUE for others."""
        asha = self._asha(trial)
        return (
            TrialScheduler.CONTINUE
            if asha is None
            else asha.on_trial_result(controller, trial, result)
        )

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tell the trial's ASHA, which needs a result."""
        if (asha := self._asha(trial)) and result:
            asha.on_trial_complete(controller, trial, result)


class _Progress(tune.Callback):  # type: ignore[misc]
    """Reports trials as they end. Tune pickles callbacks into its state: what is left of this one
    is silent.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def __init__(self, advance: Callable[[str], None], names: Sequence[str]) -> None:
        self._advance, self._names = advance, names

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        share = last.get("share", 1.0)
        of = f" on {100 * share:g} % of the images" if share < 1 else ""
        self._advance(
            f"{self._names[trial.config['index']]} {100 * last.get('objective', math.nan):.1f} %{of}"
        )


def _storage(store: Store) -> dict[str, Any]:
    """Where Tune keeps its own files: in the store, so that every node and every later run sees
    them.
    """
    local = store.local_path(SEARCH)
    if local is not None:
        return {"storage_path": local}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {
        "storage_path": store.path(SEARCH),
        "storage_filesystem": PyFileSystem(FSSpecHandler(store.fs)),
    }


def _run_trials(
    service: Service,
    candidates: Sequence[Candidate],
    limits: Sequence[int],
    early: bool,
    stage: Stage,
) -> dict[str, str]:
    """A Tune trial for each candidate up to its round; errors by name. `early`: ASHA may end them
    before.
    """
    experiment, asked = service.experiment, service.experiment.resources
    store = Store(experiment.store)
    attempts = {k.split("/")[1] for k in store.keys(SEARCH) if k.startswith(f"{SEARCH}/tune-")}
    trainable = tune.with_resources(
        tune.with_parameters(
            _trial, service=service, candidates=list(candidates), limits=list(limits)
        ),
        {"cpu": asked.cpus_per_task, "gpu": asked.gpus_per_task},
    )
    scheduler = _ByGroup(experiment, [c.group for c in candidates]) if early else FIFOScheduler()
    tuner = tune.Tuner(
        trainable,
        param_space={"index": tune.grid_search(list(range(len(candidates))))},
        tune_config=tune.TuneConfig(
            reuse_actors=True,
            max_concurrent_trials=asked.concurrent_trials or None,
            scheduler=scheduler,
            **({} if early else {"metric": "objective", "mode": "max"}),
        ),
        run_config=tune.RunConfig(
            name=f"tune-{len(attempts) + 1}",
            verbose=0,
            **_storage(store),
            failure_config=tune.FailureConfig(max_failures=min(asked.max_retries, 3)),
            callbacks=[_Progress(stage.advance, [c.name for c in candidates])],
        ),
    )
    # Else Tune takes Ctrl-C for itself and ends as if all were done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it would tell where its own files are
    failed = {}
    for result in tuner.fit():
        name = candidates[result.config["index"]].name if result.config else ""
        if result.metrics and "error" in result.metrics:
            failed[name] = str(result.metrics["error"])
        elif result.error is not None:
            failed[name] = str(result.error).strip().splitlines()[-1]
    return failed


def run_search(service: Service, candidates: Sequence[Candidate], stage_of: StageOf) -> None:
    """Measure what is missing, round by round. Raises UserError that names the candidates that
    failed and why.
    """
    experiment, store = service.experiment, Store(service.experiment.store)
    rounds = len(experiment.search.shares)
    while True:
        _, _, missing = halving_state(store, experiment, candidates)
        if not missing:
            return
        todo = [c for c in candidates if c.name in missing]
        first = any(not known_rounds(store, experiment, c) for c in todo)
        early = first and rounds > 1 and experiment.search.keep < 1.0
        limits = [rounds if first else missing[c.name] for c in todo]
        # What ASHA ended too early, or a share that only those get to which went on.
        with stage_of("search" if first else "search, further images", len(todo)) as stage:
            failed = _run_trials(service, todo, limits, early, stage)
        after = halving_state(store, experiment, candidates)[2]
        if failed or after == missing:
            reasons = "\n  ".join(f"{n}: {r}" for n, r in sorted(failed.items())) or ", ".join(
                sorted(after)
            )
            raise UserError(
                f"search failed for {len(failed) or len(after)} of {len(candidates)} candidates; the rest "
                f"is done and kept:\n  {reasons}\nOnce the cause is removed, run the same command again "
                f"to go on."
            )
