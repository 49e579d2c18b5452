"""What a search decides, and the tables it writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import SEARCH, search_prefix
from raytvb.maths.counts import Count, wilson
from raytvb.maths.halving import Option, choose, halve, pareto_front
from raytvb.search.candidates import Candidate
from raytvb.search.identities import choice_identity, search_identity
from raytvb.search.rounds import is_same, known_rounds
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.storage.tables import parquet_bytes


def _groups(candidates: Sequence[Candidate]) -> dict[str, str | None]:
    """Groups in which candidates compete, by name."""
    return {c.name: c.group for c in candidates}


def halving_state(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int], dict[str, int]]:
    """(results by round of each candidate, rounds each goes through, rounds of those that lack
    some).
    """
    found = {c.name: known_rounds(store, experiment, c) for c in candidates}
    values = {n: [r["objective"] for r in results] for n, results in found.items()}
    limits, missing = halve(
        values, _groups(candidates), len(experiment.search.shares), experiment.search.keep
    )
    return found, limits, missing


def is_measured(store: Store, experiment: Experiment, candidates: Sequence[Candidate]) -> bool:
    """Nothing is left to measure on validation images."""
    return not halving_state(store, experiment, candidates)[2]


@dataclass(frozen=True)
class Decision:
    """What follows from the rounds of all candidates: `choice` (see `find_choice`) and an outcome
    for each by name.
    """

    choice: dict[str, Any]
    outcomes: dict[str, dict[str, Any]]


def decide(
    store: Store,
    experiment: Experiment,
    candidates: Sequence[Candidate],
    stored_bytes: Mapping[str, int],
) -> Decision:
    """The outcome of a search whose rounds are all there."""
    found, limits, missing = halving_state(store, experiment, candidates)
    if missing:
        raise UserError(
            f"{', '.join(sorted(missing))}: not searched yet: run `raytvb search` first"
        )
    rounds = len(experiment.search.shares)
    by_name = {c.name: c for c in candidates}
    outcomes = {n: _outcome(found[n][: limits[n]], rounds) for n in by_name}
    options = {
        n: Option(n, tuple(r["objective"] for r in found[n][: limits[n]]), stored_bytes[n])
        for n, c in by_name.items()
        if (c.is_basis or c.name == "full") and not outcomes[n]["stopped"]
    }
    bases = [o for n, o in options.items() if by_name[n].is_basis]
    compressing = [o for o in bases if by_name[o.name].size < len(experiment.tasks)]
    zero_shot = outcomes["zero-shot"]["objective"]
    tolerance = experiment.search.tolerance
    # One of as many vectors as there are tasks compresses nothing: it is chosen only where there is
    # no other.
    name = choose(compressing or bases, zero_shot, tolerance)
    front = pareto_front(list(options.values()))
    choice: dict[str, Any] = {
        "name": name,
        "objective_of": experiment.search.objective,
        "tolerance": tolerance,
        "best": choose(compressing or bases, zero_shot),
        "zero_shot": zero_shot,
        "front": front,
        "stopped": sorted(n for n, o in outcomes.items() if o["stopped"]),
        "invalid": {n: o["invalid"] for n, o in outcomes.items() if o["invalid"]},
        "candidates": len(candidates),
        "evaluations": sum(o["evaluations"] for o in outcomes.values()),
        "images": sum(o["images"] for o in outcomes.values()),
        "selection": "validation split only",
        "test": "read once for each candidate that went through all rounds, or has M = T/2, after this choice",
    }
    if name is None:
        best = max((o.values[-1] for o in bases), default=-math.inf)
        choice["reason"] = (
            f"no basis is better on validation data than the pretrained model ({100 * zero_shot:.1f} %)"
            + (
                f"; the best one has {100 * best:.1f} %"
                if math.isfinite(best)
                else "; none could be measured"
            )
        )
    for n, outcome in outcomes.items():
        outcome |= {"chosen": n == name, "front": n in front, "stored_bytes": stored_bytes[n]}
    return Decision(choice, outcomes)


def _outcome(results: Sequence[dict[str, Any]], rounds: int) -> dict[str, Any]:
    """A candidate after its last round: that round's result, and what all rounds took."""
    last = results[-1]
    stopped = len(results) < rounds and "invalid" not in last
    return {
        "objective": last["objective"] if math.isfinite(last["objective"]) else None,
        "objectives": [r["objective"] if math.isfinite(r["objective"]) else None for r in results],
        "share": last.get("share"),
        "stopped": stopped,
        "invalid": last.get("invalid"),
        "coefficient": last.get("coefficient", {}),
        "own_lengths": last.get("own_lengths", {}),
        "accuracy": last["accuracy"],
        "vector": last.get("vector"),
        "evaluations": sum(r.get("evaluations", 0) for r in results),
        "images": sum(r.get("images", 0) for r in results),
    }


def commit_decision(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate], decision: Decision
) -> bool:
    """Write a record for each candidate whose outcome is new, then the choice with its tables;
    whether it is new.
    """
    for candidate in candidates:
        outcome, prefix = decision.outcomes[candidate.name], search_prefix(candidate.name)
        identity, record = search_identity(experiment, candidate), records.find(store, prefix)
        if record is None or not is_same(record, identity) or record["metrics"] != outcome:
            records.commit(store, prefix, identity=identity, metrics=outcome)
    identity, record = choice_identity(experiment, candidates), records.find(store, SEARCH)
    new = record is None or not is_same(record, identity) or record["metrics"] != decision.choice
    if new:
        tables = {
            "results.parquet": parquet_bytes(_results(candidates, decision)),
            "tried.parquet": parquet_bytes(_tried(store, experiment, candidates, decision)),
        }
        records.commit(store, SEARCH, identity=identity, metrics=decision.choice, files=tables)
    return new


def _results(candidates: Sequence[Candidate], decision: Decision) -> list[dict[str, Any]]:
    """A row for each candidate."""
    sizes = sorted({s for o in decision.outcomes.values() for s in o["accuracy"]}, key=int)
    table = []
    for c in candidates:
        outcome = decision.outcomes[c.name]
        table.append(
            {
                "candidate": c.name,
                "kind": c.kind,
                "method": c.method,
                "size": c.size,
                "online": c.online,
                "merge": c.merge,
                **{
                    k: outcome[k]
                    for k in (
                        "objective",
                        "share",
                        "stopped",
                        "invalid",
                        "chosen",
                        "front",
                        "stored_bytes",
                        "evaluations",
                        "images",
                    )
                },
                **{f"accuracy_{s}": outcome["accuracy"].get(s) for s in sizes},
                **{f"coefficient_{s}": outcome["coefficient"].get(s) for s in sizes},
                **{f"own_lengths_{s}": outcome["own_lengths"].get(s) for s in sizes},
            }
        )
    return table


def _tried(
    store: Store, experiment: Experiment, candidates: Sequence[Candidate], decision: Decision
) -> list[dict[str, Any]]:
    """A row for each coefficient of each size class that was tried, with the counts and their
    Wilson interval.
    """
    table = []
    for c in candidates:
        rounds = len(decision.outcomes[c.name]["objectives"])
        for number, result in enumerate(known_rounds(store, experiment, c)[:rounds], 1):
            for tried in result.get("tried", ()):
                low, high = wilson(Count(tried["correct"], tried["total"]))
                table.append(
                    {
                        "candidate": c.name,
                        "round": number,
                        "share": result["share"],
                        **tried,
                        "low": low,
                        "high": high,
                    }
                )
    return table
