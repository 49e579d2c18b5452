"""The results of an experiment as plain numbers (`report/summary.json`), read from the store alone.

Accuracies are 0 to 1. Every choice behind them (coefficients, the chosen basis) was made on validation data; the test
split is read once for each candidate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raytvb import artifacts, records
from raytvb.basis_actor import load_gram
from raytvb.candidates import Candidate, basis_candidates, random_candidates, sum_candidates
from raytvb.config import Experiment
from raytvb.errors import UserError
from raytvb.evaluate import mean
from raytvb.online import forgetting
from raytvb.search import find_result
from raytvb.store import Store
from raytvb.workers import has_rows, read_rows

Rows = Sequence[Mapping[str, Any]]


def _accuracy(row: Mapping[str, Any]) -> float:
    return row["correct"] / row["total"]


def _by_model(rows: Rows, model: str) -> dict[str, float]:
    return {r["task"]: _accuracy(r) for r in rows if r["model"] == model}


def _addition(rows: Rows, coefficients: Mapping[str, float], tasks: Sequence[str]) -> dict[str, Any]:
    """Accuracies of one candidate: `mean` and `per_task` for the set of all tasks, `subsets` by size class."""
    classes: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        classes[row["size"]].append(_accuracy(row))
    per_task = {r["task"]: _accuracy(r) for r in rows if r["size"] == len(tasks)}
    return {"coefficient": dict(coefficients), "mean": mean(list(per_task.values())), "per_task": per_task,
            "subsets": {str(s): mean(v) for s, v in sorted(classes.items())}}


def _spread(entry: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """How far single tasks are from the addition of the full vectors, which the mean hides."""
    gaps = {t: a - full["per_task"][t] for t, a in entry["per_task"].items()}
    worst = min(gaps, key=lambda t: (gaps[t], t))
    return {"mean_absolute_difference": mean([abs(g) for g in gaps.values()]), "worst_task": worst,
            "worst_difference": gaps[worst]}


def _basis_bytes(record: Mapping[str, Any]) -> int:
    return sum(f["size"] for f in record["files"].values())


def _negation(store: Store, tasks: Sequence[str], control: str) -> dict[str, dict[str, Any]]:
    """Per task: target and control before and after on the test split, the control on validation, the coefficient."""
    result = {}
    for task in tasks:
        rows = {(r["split"], r["model"], r["task"]): r for r in read_rows(store, f"negation-full/{task}")}

        def accuracy(split: str, when: str, name: str, found: Mapping[Any, Any] = rows) -> float:
            return _accuracy(found[split, when, name])

        result[task] = {"before": accuracy("test", "before", task), "after": accuracy("test", "after", task),
                        "control_before": accuracy("test", "before", control),
                        "control_after": accuracy("test", "after", control),
                        "coefficient": rows["test", "after", task]["coefficient"],
                        "control_validation_before": accuracy("val", "before", control),
                        "control_validation_after": accuracy("val", "after", control)}
    return result


def _online(store: Store, candidate: Candidate) -> dict[str, Any]:
    """How an online basis did after each arrival, beside one that was fitted to all vectors so far.

    `accuracy` is arrivals by tasks (16 of them where there are more), each task decoded by itself, None where it had
    not arrived; `added` is the mean accuracy of one model for all tasks so far; `forgetting` by task (see
    `online.forgetting`).
    """
    rows = read_rows(store, f"online/{candidate.name}")
    looks, tasks = sorted({r["subset"] for r in rows}), list(dict.fromkeys(r["task"] for r in rows))
    found: dict[str, Any] = {"method": candidate.method, "size": candidate.size, "arrivals": looks, "tasks": tasks}
    for kind in ("online", "offline"):
        single = {(r["subset"], r["task"]): _accuracy(r) for r in rows if r["model"] == kind and r["size"] == 1}
        added = [[_accuracy(r) for r in rows if r["model"] == kind and r["size"] == 0 and r["subset"] == n]
                 for n in looks]
        matrix = [[single.get((n, t)) for t in tasks] for n in looks]
        lost = forgetting(torch.tensor([[math.nan if a is None else a for a in row] for row in matrix]).double())
        found[kind] = {"accuracy": matrix, "mean": [mean([a for a in row if a is not None]) for row in matrix],
                       "added": [mean(a) for a in added], "forgetting": dict(zip(tasks, lost.tolist(), strict=True))}
    return found


def choose(results: Mapping[str, Mapping[str, Any]], bases: Sequence[Candidate], count: int) -> dict[str, Any]:
    """The decoded basis with the best objective on validation data; of equals the smallest.

    One of as many vectors as there are tasks compresses nothing: it is chosen only where there is no other.
    """
    smaller = [c for c in bases if c.size < count]
    best = min(smaller or bases, key=lambda c: (-results[c.name]["objective"], c.size, c.name))
    return {"name": best.name, "method": best.method, "size": best.size, "merge": "decoded",
            "coefficient": results[best.name]["coefficient"], "objective": results[best.name]["objective"]}


def summarise(store: Store, experiment: Experiment) -> dict[str, Any]:
    """Build the summary. Raises UserError that says which stage is missing."""
    gram = load_gram(store, experiment)
    base = records.find(store, artifacts.BASE)
    if gram is None or base is None:
        raise UserError(f"{store.url} has no complete results yet: run `raytvb run` first")
    tasks, bases = experiment.task_names, basis_candidates(experiment)
    stored_bases = {c.name: store.read_json(f"{artifacts.basis_prefix(c.name)}/{records.RECORD}") for c in bases}
    sums, randoms = sum_candidates(experiment), random_candidates(experiment, gram)
    full = Candidate("full", "full", "full", 0)
    results, rows = {}, {}
    for c in (full, *bases, *sums, *randoms):
        found = find_result(store, experiment, c)
        if found is None or not has_rows(store, c.name) or (c.online and not has_rows(store, f"online/{c.name}")):
            raise UserError(f"{c.name} has not been searched and evaluated yet: run `raytvb run` first")
        results[c.name], rows[c.name] = found, read_rows(store, c.name)
    stored = artifacts.stored_bytes(store, experiment, base["metrics"]["parameters"])

    def entry(c: Candidate, error: float, size: int) -> dict[str, Any]:
        found = _addition(rows[c.name], results[c.name]["coefficient"], tasks)
        return {"merge": "sum" if c.kind == "sum" else "decoded", "method": c.method, "size": c.size,
                "online": c.online, "relative_error": error, "stored_bytes": size,
                "validation_objective": results[c.name]["objective"], **found}

    addition = {"full": entry(full, 0.0, stored["vectors"])}
    for c in (*bases, *sums):
        record = stored_bases[c.basis]
        addition[c.name] = entry(c, record["metrics"]["relative_error"], _basis_bytes(record))
    random_subset = {c.name: entry(c, _table_error(c, gram), stored["vectors"] * c.size // len(tasks)) for c in randoms}
    for found in (*addition.values(), *random_subset.values()):
        found["spread"] = _spread(found, addition["full"])
    models, control = read_rows(store, "models"), experiment.control
    overlap = records.find(store, artifacts.OVERLAP) if experiment.own_masks else None
    timings = store.read_json("report/timings.json") if store.exists("report/timings.json") else {}
    return {"tasks": list(tasks), "zero_shot": _by_model(models, "zero-shot"),
            "fine_tuned": _by_model(models, "fine-tuned"), "addition": addition, "random_subset": random_subset,
            "negation": _negation(store, tasks, control.name) if control is not None else {},
            "online": {c.name: _online(store, c) for c in bases if c.online},
            "mask_overlap": overlap["metrics"] if overlap is not None else None,
            "chosen": choose(results, bases, len(tasks)), "stored_bytes": stored, "seconds": timings,
            "floor": {n: r["metrics"]["floor"] for n, r in stored_bases.items()},
            "provenance": {"experiment": experiment.identity(), "base": base["parents"]["fingerprint"],
                           "selection": "validation split only", "versions": records.versions()}}


def _table_error(candidate: Candidate, gram: Any) -> float:
    """Relative reconstruction error of a table over the vectors themselves: tr((A - I)' G (A - I)) / tr G."""
    rest = torch.tensor(candidate.table, dtype=torch.float64) - torch.eye(len(gram), dtype=torch.float64)
    return float(torch.trace(rest.T @ gram @ rest) / torch.trace(gram))
