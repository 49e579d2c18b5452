"""The results of an experiment as plain numbers (`report/summary.json`), read from the store alone.

Accuracies are 0 to 1. Every choice behind them (coefficients, the chosen basis) was made on
validation data; the test split is read once for each candidate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from raytvb.errors import UserError
from raytvb.evaluation.plan import is_tested, pair_name
from raytvb.evaluation.rows import has_rows, read_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, OVERLAP, PRECISION, basis_prefix
from raytvb.experiment.stored import load_gram, stored_bytes
from raytvb.maths.counts import Count, even_grid, mean, wilson
from raytvb.maths.online_basis import forgetting
from raytvb.search.candidates import Candidate, all_candidates, basis_candidates
from raytvb.search.rounds import find_choice, find_result
from raytvb.storage import records
from raytvb.storage.store import Store

Rows = Sequence[Mapping[str, Any]]


def _count(row: Mapping[str, Any]) -> Count:
    return Count(row["correct"], row["total"])


def _accuracy(row: Mapping[str, Any]) -> float:
    return _count(row).accuracy


def _by_model(rows: Rows, model: str) -> dict[str, float]:
    return {r["task"]: _accuracy(r) for r in rows if r["model"] == model}


def _measured(rows: Rows, own: Mapping[str, float]) -> dict[str, Any]:
    """Accuracies of one model by task: their mean, counts, 95 % intervals, and shares of the tasks'
    own accuracy.
    """
    per_task = {r["task"]: _accuracy(r) for r in rows}
    normalised = {t: a / own[t] if own[t] else None for t, a in per_task.items()}
    known = [n for n in normalised.values() if n is not None]
    return {
        "mean": mean(list(per_task.values())),
        "per_task": per_task,
        "normalised": normalised,
        "normalised_mean": mean(known) if known else None,
        "counts": {r["task"]: [r["correct"], r["total"]] for r in rows},
        "interval": {r["task"]: list(wilson(_count(r))) for r in rows},
    }


def _addition(
    rows: Rows, outcome: Mapping[str, Any], tasks: Sequence[str], own: Mapping[str, float]
) -> dict[str, Any]:
    """Accuracies of one candidate: `mean` and `per_task` for the set of all tasks, `subsets` by
    size class.
    """
    vector = outcome["vector"]
    plain = [r for r in rows if vector is None or r["model"] != vector["kind"]]
    classes: dict[int, list[float]] = defaultdict(list)
    for row in plain:
        classes[row["size"]].append(_accuracy(row))
    found = {
        "coefficient": dict(outcome["coefficient"]),
        "own_lengths": dict(outcome["own_lengths"]),
        **_measured([r for r in plain if r["size"] == len(tasks)], own),
        "subsets": {str(s): mean(v) for s, v in sorted(classes.items())},
    }
    if vector is not None:
        weighted = [r for r in rows if r["model"] == vector["kind"]]
        found["weighted"] = {
            "kind": vector["kind"],
            "weights": vector["weights"],
            "validation_accuracy": vector["accuracy"],
            **_measured(weighted, own),
        }
    return found


def _spread(entry: Mapping[str, Any], full: Mapping[str, Any]) -> dict[str, Any]:
    """How far single tasks are from the addition of the full vectors, which the mean hides."""
    gaps = {t: a - full["per_task"][t] for t, a in entry["per_task"].items()}
    worst = min(gaps, key=lambda t: (gaps[t], t))
    return {
        "mean_absolute_difference": mean([abs(g) for g in gaps.values()]),
        "worst_task": worst,
        "worst_difference": gaps[worst],
    }


def _negation(
    store: Store, name: str, tasks: Sequence[str], control: str
) -> dict[str, dict[str, Any]]:
    """Per task: target and control before and after on the test split, the control on validation,
    the coefficient.
    """
    result = {}
    for task in tasks:
        rows = {
            (r["split"], r["model"], r["task"]): r
            for r in read_rows(store, f"negation-{name}/{task}")
        }

        def accuracy(split: str, when: str, name: str, found: Mapping[Any, Any] = rows) -> float:
            return _accuracy(found[split, when, name])

        result[task] = {
            "before": accuracy("test", "before", task),
            "after": accuracy("test", "after", task),
            "control_before": accuracy("test", "before", control),
            "control_after": accuracy("test", "after", control),
            "coefficient": rows["test", "after", task]["coefficient"],
            "control_validation_before": accuracy("val", "before", control),
            "control_validation_after": accuracy("val", "after", control),
            "interval": list(wilson(_count(rows["test", "after", task]))),
        }
    return result


def _online(store: Store, candidate: Candidate) -> dict[str, Any]:
    """How an online basis did after each arrival, beside one that was fitted to all vectors so far,
    and the vectors.

    `accuracy` is arrivals by tasks (16 of them where there are more), each task decoded by itself,
    None where it had not arrived; `added` is the mean accuracy of one model for all tasks so far;
    `forgetting` by task (see `online.forgetting`).
    """
    rows = read_rows(store, f"online/{candidate.name}")
    looks, tasks = sorted({r["subset"] for r in rows}), list(dict.fromkeys(r["task"] for r in rows))
    found: dict[str, Any] = {
        "method": candidate.method,
        "size": candidate.size,
        "arrivals": looks,
        "tasks": tasks,
    }
    for kind in ("online", "offline", "full"):
        single = {
            (r["subset"], r["task"]): _accuracy(r)
            for r in rows
            if r["model"] == kind and r["size"] == 1
        }
        added = [
            [
                _accuracy(r)
                for r in rows
                if r["model"] == kind and r["size"] == 0 and r["subset"] == n
            ]
            for n in looks
        ]
        matrix = [[single.get((n, t)) for t in tasks] for n in looks]
        lost = forgetting(
            torch.tensor([[math.nan if a is None else a for a in row] for row in matrix]).double()
        )
        found[kind] = {
            "accuracy": matrix,
            "mean": [mean([a for a in row if a is not None]) for row in matrix],
            "added": [mean(a) for a in added],
            "forgetting": dict(zip(tasks, lost.tolist(), strict=True)),
        }
    return found


def _additions(
    store: Store, experiment: Experiment, names: Sequence[str], own: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The additions that the experiment names: from the full vectors, and from the chosen basis."""
    rows = (
        {n: read_rows(store, f"additions/{n}") for n in names}
        if experiment.evaluate.additions
        else {}
    )
    found = []
    for number, group in enumerate(experiment.evaluate.additions):
        chosen = {n: [r for r in rows[n] if r["subset"] == number] for n in names}
        found.append(
            {
                "tasks": list(group),
                "models": {
                    n: {"coefficient": rs[0]["coefficient"], **_measured(rs, own)}
                    for n, rs in chosen.items()
                },
            }
        )
    return found


def _unseen(store: Store, experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Per unseen task and kind (zero_shot, basis, full): accuracy, interval, and how many
    coefficients were learned.
    """
    found = {}
    for task in experiment.unseen:
        rows = {r["model"].replace("-", "_"): r for r in read_rows(store, f"unseen/{task.name}")}
        found[task.name] = {"images": rows["full"]["subset"]} | {
            kind: {
                "accuracy": _accuracy(r),
                "interval": list(wilson(_count(r))),
                "coefficients": r["size"],
            }
            for kind, r in rows.items()
        }
    return found


def _disentanglement(
    store: Store, experiment: Experiment, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Per pair of tasks: the grid, and by model the errors (0 to 2; rows: first coefficient) and
    their mean.
    """
    asked, found = experiment.evaluate.disentanglement, []
    for pair in experiment.pairs:
        assert asked is not None
        points, models = even_grid(asked.low, asked.high, asked.points), {}
        for name in names:
            errors = [r["error"] for r in read_rows(store, pair_name(name, pair))]
            matrix = [errors[i : i + len(points)] for i in range(0, len(errors), len(points))]
            models[name] = {"error": matrix, "mean": mean(errors)}
        found.append({"tasks": list(pair), "coefficients": points, "models": models})
    return found


def summarise(store: Store, experiment: Experiment) -> dict[str, Any]:
    """Build the summary. Raises UserError that says which stage is missing."""
    gram, base = load_gram(store, experiment), records.find(store, BASE)
    if gram is None or base is None:
        raise UserError(f"{store.url} has no complete results yet: run `raytvb run` first")
    tasks, candidates = experiment.task_names, all_candidates(store, experiment)
    choice, outcomes = find_choice(store, experiment, candidates), dict[str, dict[str, Any]]()
    for c in candidates:
        outcome = find_result(store, experiment, c)
        needed = [] if outcome is None or not is_tested(experiment, c, outcome) else [c.name]
        if needed and c.online and c.is_basis and outcome and outcome["coefficient"]:
            needed.append(f"online/{c.name}")
        if choice is None or outcome is None or not all(has_rows(store, n) for n in needed):
            raise UserError(
                f"{c.name} has not been searched and evaluated yet: run `raytvb run` first"
            )
        outcomes[c.name] = outcome
    assert choice is not None
    tested = [c for c in candidates if is_tested(experiment, c, outcomes[c.name])]
    stored = stored_bytes(store, experiment, base["metrics"]["parameters"])
    models = read_rows(store, "models")
    own = _by_model(models, "fine-tuned")

    def entry(c: Candidate) -> dict[str, Any]:
        outcome = outcomes[c.name]
        return {
            "merge": "sum" if c.kind == "sum" else "decoded" if c.merge == "sum" else c.merge,
            "method": c.method,
            "size": c.size,
            "online": c.online,
            "relative_error": _error(store, c, gram),
            "stored_bytes": outcome["stored_bytes"],
            "validation_objective": outcome["objective"],
            "validation_share": outcome["share"],
            "stopped": outcome["stopped"],
            **_addition(read_rows(store, c.name), outcome, tasks, own),
        }

    addition = {c.name: entry(c) for c in tested if not c.kind.startswith("random")}
    random_subset = {c.name: entry(c) for c in tested if c.kind.startswith("random")}
    for found in (*addition.values(), *random_subset.values()):
        found["spread"] = _spread(found, addition["full"])
    control, overlap = (
        experiment.control,
        records.find(store, OVERLAP) if experiment.own_masks else None,
    )
    subjects = ["full", *([choice["name"]] if choice["name"] else [])]
    negation = (
        {n: _negation(store, n, tasks, control.name) for n in subjects}
        if control is not None
        else {}
    )
    bases = basis_candidates(experiment)
    stored_bases = {
        c.name: store.read_json(f"{basis_prefix(c.name)}/{records.RECORD}") for c in bases
    }
    timings = store.read_json("report/timings.json") if store.exists("report/timings.json") else {}
    return {
        "tasks": list(tasks),
        "zero_shot": _by_model(models, "zero-shot"),
        "fine_tuned": own,
        "addition": addition,
        "random_subset": random_subset,
        "additions": _additions(store, experiment, subjects, own),
        "negation": negation.get("full", {}),
        "negation_basis": negation.get(choice["name"], {}),
        "unseen": _unseen(store, experiment) if choice["name"] else {},
        "disentanglement": _disentanglement(store, experiment, subjects),
        "online": {
            c.name: _online(store, c) for c in tested if has_rows(store, f"online/{c.name}")
        },
        "mask_overlap": overlap["metrics"] if overlap is not None else None,
        "chosen": _chosen(choice, candidates, outcomes),
        "search": choice,
        "stored_bytes": stored,
        "seconds": timings,
        "floor": {n: r["metrics"]["floor"] for n, r in stored_bases.items()},
        "provenance": {
            "experiment": experiment.identity(),
            "base": base["parents"]["fingerprint"],
            "selection": choice["selection"],
            "test": choice["test"],
            "precision": _precision(store),
            "versions": records.versions(),
        },
    }


def _chosen(
    choice: Mapping[str, Any],
    candidates: Sequence[Candidate],
    outcomes: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The chosen basis; `name` is None and `reason` says why where no basis is valid."""
    if choice["name"] is None:
        return {"name": None, "reason": choice["reason"]}
    best = next(c for c in candidates if c.name == choice["name"])
    return {
        "name": best.name,
        "method": best.method,
        "size": best.size,
        "merge": "decoded",
        "coefficient": outcomes[best.name]["coefficient"],
        "own_lengths": outcomes[best.name]["own_lengths"],
        "objective": outcomes[best.name]["objective"],
        "tolerance": choice["tolerance"],
        "stored_bytes": outcomes[best.name]["stored_bytes"],
    }


def _precision(store: Store) -> dict[str, Any]:
    """What the evaluations ran in, and how well bf16 agreed where that was measured."""
    record = records.find(store, PRECISION)
    return {"use": "fp32"} if record is None else record["metrics"]


def _error(store: Store, candidate: Candidate, gram: torch.Tensor) -> float:
    """Relative reconstruction error of the task vectors; of a table over the vectors themselves
    tr((A - I)' G (A - I)) / tr G."""
    if candidate.kind in ("decoded", "sum"):
        record = store.read_json(f"{basis_prefix(candidate.basis)}/{records.RECORD}")
        return float(record["metrics"]["relative_error"])
    if candidate.table is None:
        return 0.0
    rest = torch.tensor(candidate.table, dtype=torch.float64) - torch.eye(
        len(gram), dtype=torch.float64
    )
    return float(torch.trace(rest.T @ gram @ rest) / torch.trace(gram))
