"""The search with Ray Tune: one trial for each way to add tasks (method x M, and what it is compared with).

A trial chooses its coefficients by itself, so that the model, the images and the vectors are set up once. Its result is
a record in the store; a search that was killed runs only the trials without one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from ray import tune

from raytvb import records
from raytvb.candidates import Candidate
from raytvb.config import Experiment
from raytvb.errors import UserError
from raytvb.remote import Refs, search_trial
from raytvb.store import Store


def search_prefix(name: str) -> str:
    """Folder of a candidate's search result."""
    return f"search/{name}"


def search_identity(experiment: Experiment, candidate: Candidate) -> dict[str, Any]:
    """Identity of a search result: everything but which other candidates were searched."""
    identity = experiment.identity()
    limits = {k: identity["search"][k] for k in ("objective", "coefficients")}
    kept = ("model", "seed", "talos", "finetune", "tasks")
    return {k: identity[k] for k in kept} | {"search": limits, "candidate": candidate.name}


def find_result(store: Store, experiment: Experiment, candidate: Candidate) -> dict[str, Any] | None:
    """The result of a candidate's trial (see `workers.search_candidate`), or None where it has not run."""
    record = records.find(store, search_prefix(candidate.name), search_identity(experiment, candidate))
    return None if record is None else record["metrics"]


def _trial(config: dict[str, Any], experiment: Experiment, fingerprint: str, candidates: Sequence[Candidate],
           refs: Refs) -> None:
    candidate = candidates[config["index"]]
    try:
        result = search_trial(experiment, fingerprint, candidate, refs)
    except (UserError, ValueError) as error:  # would fail again: Tune is to repeat only what a dying worker broke
        tune.report({"objective": float("-inf"), "error": str(error)})
        return
    records.commit(Store(experiment.store), search_prefix(candidate.name),
                   identity=search_identity(experiment, candidate), metrics=result)
    tune.report({"objective": result["objective"], "method": candidate.method, "size": candidate.size,
                 **{f"accuracy_{s}": a for s, a in result["accuracy"].items()}})


class _Progress(tune.Callback):  # type: ignore[misc]
    """Reports trials as they end. Tune pickles callbacks into its state: what is left of this one is silent."""

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()

    def __init__(self, advance: Callable[[str], None], names: Sequence[str]) -> None:
        self._advance, self._names = advance, names

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        objective = (trial.last_result or {}).get("objective", float("nan"))
        self._advance(f"{self._names[trial.config['index']]} {100 * objective:.1f} %")


def _storage(store: Store) -> dict[str, Any]:
    """Where Tune keeps its own files: in the store, so that every node and every later run sees them."""
    local = store.local_path("search")
    if local is not None:
        return {"storage_path": local}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": store.path("search"), "storage_filesystem": PyFileSystem(FSSpecHandler(store.fs))}


def run_search(experiment: Experiment, fingerprint: str, candidates: Sequence[Candidate], refs: Refs,
               advance: Callable[[str], None]) -> None:
    """Run a Tune trial for each of the candidates. Raises UserError that names those that failed and why."""
    store, asked = Store(experiment.store), experiment.resources
    attempts = {k.split("/")[1] for k in store.keys("search") if k.startswith("search/tune-")}
    trainable = tune.with_resources(
        tune.with_parameters(_trial, experiment=experiment, fingerprint=fingerprint, candidates=list(candidates),
                             refs=refs),
        {"cpu": asked.cpus_per_task, "gpu": asked.gpus_per_task})
    tuner = tune.Tuner(
        trainable, param_space={"index": tune.grid_search(list(range(len(candidates))))},
        tune_config=tune.TuneConfig(metric="objective", mode="max", reuse_actors=True,
                                    max_concurrent_trials=asked.concurrent_trials or None),
        run_config=tune.RunConfig(name=f"tune-{len(attempts) + 1}", verbose=0, **_storage(store),
                                  failure_config=tune.FailureConfig(max_failures=min(asked.max_retries, 3)),
                                  callbacks=[_Progress(advance, [c.name for c in candidates])]))
    # Else Tune takes Ctrl-C for itself and ends as if all were done.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it would tell where its own files are
    results = tuner.fit()
    missing = [c.name for c in candidates if find_result(store, experiment, c) is None]
    if missing:
        told = {r.metrics["error"] for r in results if r.metrics and "error" in r.metrics}
        reasons = "; ".join(sorted(told | {str(e).strip().splitlines()[-1] for e in results.errors}))
        raise UserError(f"search failed for {', '.join(missing)}: {reasons}")
