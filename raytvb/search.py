"""The search with Ray Tune: one trial for each way to add tasks (method x M, and what it is compared with).

A trial chooses its coefficients by itself, so that the model, the images and the vectors are set up once. It goes
through rounds, on growing shares of the validation images; each is a record in the store, so that a search that was
killed goes on where it was. ASHA ends the poorer trials of a size early. What it lets through depends on which trial
was quicker, so it decides what is measured, never what is chosen: the choice is that of successive halving over all
trials of a size (`selection.halve`), and rounds which that wants and ASHA ended are made up for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytvb import records
from raytvb.candidates import Candidate
from raytvb.config import Experiment
from raytvb.errors import UserError
from raytvb.evaluate import Count, wilson
from raytvb.progress import Stage
from raytvb.remote import Service
from raytvb.rows import parquet_bytes
from raytvb.selection import LEAST, Option, choose, halve, pareto_front
from raytvb.store import Store
from raytvb.trials import CandidateSearch, InvalidCandidateError, objective

SEARCH = "search"
StageOf = Callable[[str, int], AbstractContextManager[Stage]]


def search_prefix(name: str) -> str:
    """Folder of a candidate's search result."""
    return f"{SEARCH}/{name}"


def search_identity(experiment: Experiment, candidate: Candidate) -> dict[str, Any]:
    """Identity of a candidate's rounds: everything but which others were searched, and what is chosen by."""
    identity = experiment.identity()
    asked = {k: identity["search"][k] for k in ("coefficients", "shares", "lengths")}
    kept = ("model", "seed", "talos", "finetune", "tasks")
    made = {"prepare": experiment.basis.prepare} if experiment.basis.prepare != "none" else {}
    return {k: identity[k] for k in kept} | {"search": asked, "candidate": candidate.name,
                                             "precision": experiment.evaluate.precision} | made


def _same(record: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> bool:
    return record is not None and not records.differences(record["identity"], dict(identity))


def _rounds(store: Store, experiment: Experiment, candidate: Candidate) -> list[dict[str, Any]]:
    """Results of the first rounds of a candidate, as many as there are. Those of another search do not count."""
    found: list[dict[str, Any]] = []
    for number in range(1, len(experiment.search.shares) + 1):
        record = records.find(store, f"{search_prefix(candidate.name)}/round-{number}")
        if record is None or not _same(record, search_identity(experiment, candidate)):
            break
        found.append(record["metrics"] | {"objective": objective(experiment, record["metrics"]["accuracy"])
                                          if "invalid" not in record["metrics"] else -math.inf})
    return found


def find_result(store: Store, experiment: Experiment, candidate: Candidate) -> dict[str, Any] | None:
    """What a finished search says of a candidate (see `_outcome`), or None where it has not been searched."""
    record = records.find(store, search_prefix(candidate.name))
    if record is None or not _same(record, search_identity(experiment, candidate)):
        return None
    metrics: dict[str, Any] = record["metrics"]
    return metrics


def _choice_identity(experiment: Experiment, candidates: Sequence[Candidate]) -> dict[str, Any]:
    return {"candidates": [c.name for c in candidates], "search": experiment.identity()["search"]}


def find_choice(store: Store, experiment: Experiment, candidates: Sequence[Candidate]) -> dict[str, Any] | None:
    """What a finished search chose among the candidates, its Pareto front and how much it measured; else None."""
    record = records.find(store, SEARCH)
    if record is None or not _same(record, _choice_identity(experiment, candidates)):
        return None
    found: dict[str, Any] = record["metrics"]
    return found


# Trials ---------------------------------------------------------------------------------------------------------------


def _trial(config: dict[str, Any], service: Service, candidates: Sequence[Candidate], limits: Sequence[int]) -> None:
    """The rounds of a candidate up to its limit, each reported to Tune; those that the store has are not repeated."""
    experiment, candidate = service.experiment, candidates[config["index"]]
    store, search = Store(experiment.store), None
    known = _rounds(store, experiment, candidate)
    for number in range(1, limits[config["index"]] + 1):
        if len(known) < number:
            try:
                search = search or CandidateSearch(experiment, candidate, service.evaluator("val"))
                result = search.round(number, known[-1] if known else None)
            except InvalidCandidateError as error:
                result = {"invalid": str(error), "objective": None, "accuracy": {}}
            except (UserError, ValueError) as error:  # fails again: Tune is to repeat only what a dying worker broke
                tune.report({"objective": -math.inf, "time": _time(experiment, number), "error": str(error)})
                return
            records.commit(store, f"{search_prefix(candidate.name)}/round-{number}",
                           identity=search_identity(experiment, candidate), metrics=result)
            known = _rounds(store, experiment, candidate)
        result = known[number - 1]
        tune.report({"objective": result["objective"], "time": _time(experiment, number), "method": candidate.method,
                     "size": candidate.size, "share": experiment.search.shares[number - 1],
                     **{f"accuracy_{s}": a for s, a in result["accuracy"].items()}})
        if "invalid" in result:
            return


def _time(experiment: Experiment, number: int) -> float:
    """What ASHA takes for the time of a round: its rounds are powers of the reduction factor."""
    return float((1.0 / experiment.search.keep) ** (number - 1))


class _ByGroup(FIFOScheduler):  # type: ignore[misc]
    """An ASHA for each group of candidates, which alone are compared: those of one size, whose bytes are equal."""

    def __init__(self, experiment: Experiment, groups: Sequence[str | None]) -> None:
        super().__init__()
        self._groups, self._ashas = list(groups), dict[str, TrialScheduler]()
        for group in groups:
            if group is not None and self._groups.count(group) > LEAST:
                self._ashas[group] = ASHAScheduler(
                    time_attr="time", metric="objective", mode="max", grace_period=1,
                    max_t=_time(experiment, len(experiment.search.shares)) * (1 + 1e-9),
                    reduction_factor=1.0 / experiment.search.keep)

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
        return TrialScheduler.CONTINUE if asha is None else asha.on_trial_result(controller, trial, result)

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Tell the trial's ASHA, which needs a result."""
        if (asha := self._asha(trial)) and result:
            asha.on_trial_complete(controller, trial, result)


class _Progress(tune.Callback):  # type: ignore[misc]
    """Reports trials as they end. Tune pickles callbacks into its state: what is left of this one is silent."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def __init__(self, advance: Callable[[str], None], names: Sequence[str]) -> None:
        self._advance, self._names = advance, names

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        share = last.get("share", 1.0)
        of = f" on {100 * share:g} % of the images" if share < 1 else ""
        self._advance(f"{self._names[trial.config['index']]} {100 * last.get('objective', math.nan):.1f} %{of}")


def _storage(store: Store) -> dict[str, Any]:
    """Where Tune keeps its own files: in the store, so that every node and every later run sees them."""
    local = store.local_path(SEARCH)
    if local is not None:
        return {"storage_path": local}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": store.path(SEARCH), "storage_filesystem": PyFileSystem(FSSpecHandler(store.fs))}


def _run_trials(service: Service, candidates: Sequence[Candidate], limits: Sequence[int], early: bool,
                stage: Stage) -> dict[str, str]:
    """A Tune trial for each candidate up to its round; errors by name. `early`: ASHA may end them before."""
    experiment, asked = service.experiment, service.experiment.resources
    store = Store(experiment.store)
    attempts = {k.split("/")[1] for k in store.keys(SEARCH) if k.startswith(f"{SEARCH}/tune-")}
    trainable = tune.with_resources(
        tune.with_parameters(_trial, service=service, candidates=list(candidates), limits=list(limits)),
        {"cpu": asked.cpus_per_task, "gpu": asked.gpus_per_task})
    scheduler = _ByGroup(experiment, [c.group for c in candidates]) if early else FIFOScheduler()
    tuner = tune.Tuner(
        trainable, param_space={"index": tune.grid_search(list(range(len(candidates))))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=asked.concurrent_trials or None,
                                    scheduler=scheduler, **({} if early else {"metric": "objective", "mode": "max"})),
        run_config=tune.RunConfig(name=f"tune-{len(attempts) + 1}", verbose=0, **_storage(store),
                                  failure_config=tune.FailureConfig(max_failures=min(asked.max_retries, 3)),
                                  callbacks=[_Progress(stage.advance, [c.name for c in candidates])]))
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


# Decisions ------------------------------------------------------------------------------------------------------------


def _groups(candidates: Sequence[Candidate]) -> dict[str, str | None]:
    """Groups in which candidates compete, by name."""
    return {c.name: c.group for c in candidates}


def _halved(store: Store, experiment: Experiment, candidates: Sequence[Candidate]) -> tuple[
        dict[str, list[dict[str, Any]]], dict[str, int], dict[str, int]]:
    """(results by round of each candidate, rounds each goes through, rounds of those that lack some)."""
    found = {c.name: _rounds(store, experiment, c) for c in candidates}
    values = {n: [r["objective"] for r in results] for n, results in found.items()}
    limits, missing = halve(values, _groups(candidates), len(experiment.search.shares), experiment.search.keep)
    return found, limits, missing


def is_measured(store: Store, experiment: Experiment, candidates: Sequence[Candidate]) -> bool:
    """Nothing is left to measure on validation images."""
    return not _halved(store, experiment, candidates)[2]


def run_search(service: Service, candidates: Sequence[Candidate], stage_of: StageOf) -> None:
    """Measure what is missing, round by round. Raises UserError that names the candidates that failed and why."""
    experiment, store = service.experiment, Store(service.experiment.store)
    rounds = len(experiment.search.shares)
    while True:
        _, _, missing = _halved(store, experiment, candidates)
        if not missing:
            return
        todo = [c for c in candidates if c.name in missing]
        first = any(not _rounds(store, experiment, c) for c in todo)
        early = first and rounds > 1 and experiment.search.keep < 1.0
        limits = [rounds if first else missing[c.name] for c in todo]
        # What ASHA ended too early, or a share that only those get to which went on.
        with stage_of("search" if first else "search, further images", len(todo)) as stage:
            failed = _run_trials(service, todo, limits, early, stage)
        after = _halved(store, experiment, candidates)[2]
        if failed or after == missing:
            reasons = "\n  ".join(f"{n}: {r}" for n, r in sorted(failed.items())) or ", ".join(sorted(after))
            raise UserError(f"search failed for {len(failed) or len(after)} of {len(candidates)} candidates; the rest "
                            f"is done and kept:\n  {reasons}\nOnce the cause is removed, run the same command again "
                            f"to go on.")


@dataclass(frozen=True)
class Decision:
    """What follows from the rounds of all candidates: `choice` (see `find_choice`) and an outcome for each by name."""

    choice: dict[str, Any]
    outcomes: dict[str, dict[str, Any]]


def decide(store: Store, experiment: Experiment, candidates: Sequence[Candidate],
           stored_bytes: Mapping[str, int]) -> Decision:
    """The outcome of a search whose rounds are all there."""
    found, limits, missing = _halved(store, experiment, candidates)
    if missing:
        raise UserError(f"{', '.join(sorted(missing))}: not searched yet: run `raytvb search` first")
    rounds = len(experiment.search.shares)
    by_name = {c.name: c for c in candidates}
    outcomes = {n: _outcome(found[n][:limits[n]], rounds) for n in by_name}
    options = {n: Option(n, tuple(r["objective"] for r in found[n][:limits[n]]), stored_bytes[n])
               for n, c in by_name.items() if (c.is_basis or c.name == "full") and not outcomes[n]["stopped"]}
    bases = [o for n, o in options.items() if by_name[n].is_basis]
    compressing = [o for o in bases if by_name[o.name].size < len(experiment.tasks)]
    zero_shot = outcomes["zero-shot"]["objective"]
    tolerance = experiment.search.tolerance
    # One of as many vectors as there are tasks compresses nothing: it is chosen only where there is no other.
    name = choose(compressing or bases, zero_shot, tolerance)
    front = pareto_front(list(options.values()))
    choice: dict[str, Any] = {
        "name": name, "objective_of": experiment.search.objective, "tolerance": tolerance,
        "best": choose(compressing or bases, zero_shot), "zero_shot": zero_shot, "front": front,
        "stopped": sorted(n for n, o in outcomes.items() if o["stopped"]),
        "invalid": {n: o["invalid"] for n, o in outcomes.items() if o["invalid"]},
        "candidates": len(candidates), "evaluations": sum(o["evaluations"] for o in outcomes.values()),
        "images": sum(o["images"] for o in outcomes.values()),
        "selection": "validation split only",
        "test": "read once for each candidate that went through all rounds, or has M = T/2, after this choice"}
    if name is None:
        best = max((o.values[-1] for o in bases), default=-math.inf)
        choice["reason"] = (
            f"no basis is better on validation data than the pretrained model ({100 * zero_shot:.1f} %)"
            + (f"; the best one has {100 * best:.1f} %" if math.isfinite(best) else "; none could be measured"))
    for n, outcome in outcomes.items():
        outcome |= {"chosen": n == name, "front": n in front, "stored_bytes": stored_bytes[n]}
    return Decision(choice, outcomes)


def _outcome(results: Sequence[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """A candidate after its last round: that round's result, and what all rounds took."""
    last = results[-1]
    stopped = len(results) < rounds and "invalid" not in last
    return {"objective": last["objective"] if math.isfinite(last["objective"]) else None,
            "objectives": [r["objective"] if math.isfinite(r["objective"]) else None for r in results],
            "share": last.get("share"), "stopped": stopped, "invalid": last.get("invalid"),
            "coefficient": last.get("coefficient", {}), "own_lengths": last.get("own_lengths", {}),
            "accuracy": last["accuracy"], "vector": last.get("vector"),
            "evaluations": sum(r.get("evaluations", 0) for r in results),
            "images": sum(r.get("images", 0) for r in results)}


def commit_decision(store: Store, experiment: Experiment, candidates: Sequence[Candidate],
                    decision: Decision) -> bool:
    """Write a record for each candidate whose outcome is new, then the choice with its tables; whether it is new."""
    for candidate in candidates:
        outcome, prefix = decision.outcomes[candidate.name], search_prefix(candidate.name)
        identity, record = search_identity(experiment, candidate), records.find(store, prefix)
        if record is None or not _same(record, identity) or record["metrics"] != outcome:
            records.commit(store, prefix, identity=identity, metrics=outcome)
    identity, record = _choice_identity(experiment, candidates), records.find(store, SEARCH)
    new = record is None or not _same(record, identity) or record["metrics"] != decision.choice
    if new:
        tables = {"results.parquet": parquet_bytes(_results(candidates, decision)),
                  "tried.parquet": parquet_bytes(_tried(store, experiment, candidates, decision))}
        records.commit(store, SEARCH, identity=identity, metrics=decision.choice, files=tables)
    return new


def _results(candidates: Sequence[Candidate], decision: Decision) -> list[dict[str, Any]]:
    """A row for each candidate."""
    sizes = sorted({s for o in decision.outcomes.values() for s in o["accuracy"]}, key=int)
    table = []
    for c in candidates:
        outcome = decision.outcomes[c.name]
        table.append({"candidate": c.name, "kind": c.kind, "method": c.method, "size": c.size, "online": c.online,
                      "merge": c.merge, **{k: outcome[k] for k in (
                          "objective", "share", "stopped", "invalid", "chosen", "front", "stored_bytes", "evaluations",
                          "images")},
                      **{f"accuracy_{s}": outcome["accuracy"].get(s) for s in sizes},
                      **{f"coefficient_{s}": outcome["coefficient"].get(s) for s in sizes},
                      **{f"own_lengths_{s}": outcome["own_lengths"].get(s) for s in sizes}})
    return table


def _tried(store: Store, experiment: Experiment, candidates: Sequence[Candidate],
           decision: Decision) -> list[dict[str, Any]]:
    """A row for each coefficient of each size class that was tried, with the counts and their Wilson interval."""
    table = []
    for c in candidates:
        rounds = len(decision.outcomes[c.name]["objectives"])
        for number, result in enumerate(_rounds(store, experiment, c)[:rounds], 1):
            for tried in result.get("tried", ()):
                low, high = wilson(Count(tried["correct"], tried["total"]))
                table.append({"candidate": c.name, "round": number, "share": result["share"], **tried, "low": low,
                              "high": high})
    return table
