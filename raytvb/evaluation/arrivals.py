"""Accuracy after each arrival of an online basis."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load

from raytvb.evaluation.additions import Identity
from raytvb.evaluation.rows import row, write_rows
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import online_prefix, online_tables
from raytvb.experiment.stored import basis_vector_set, vector_set
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.mixes import length_ratios
from raytvb.maths.online_basis import arrivals, watched
from raytvb.models.evaluator import Evaluator
from raytvb.search.candidates import Candidate
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store


def evaluate_online(
    experiment: Experiment,
    name: str,
    identity: Identity,
    candidate: Candidate,
    chosen: Mapping[str, Mapping[str, Any]],
    test: Evaluator,
) -> None:
    """Test accuracy after each arrival: from the online basis, from one that is fitted to all
    vectors so far, and from these vectors themselves.

    chosen: by `online`, `offline` and `full`, the outcomes of the search for all tasks; an addition
    of n of T tasks has the coefficient of all times T/n. At most 16 arrivals are looked at, and 16
    tasks (see `online.watched`).
    """
    store, names = Store(experiment.store), experiment.task_names
    gram = GramState.read(store).ordered(names)
    looks, total, found = arrivals(len(names), experiment.basis.buffer), len(names), []
    prepared, raw = basis_vector_set(experiment), vector_set(experiment.store, names)
    for n in looks:
        tables = load(store.read(f"{online_prefix(candidate.name)}/{online_tables(n)}"))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # as many vectors as tasks, or more than their rank
            fit = fit_basis(
                gram[:n, :n],
                candidate.size,
                method=candidate.method,
                generator=torch.Generator().manual_seed(experiment.seed),
            )
        for kind, table, vectors in (
            ("online", tables["H"] @ tables["W"], prepared),
            ("offline", fit.B @ fit.W, prepared),
            ("full", torch.eye(n, dtype=torch.float64), raw),
        ):
            seen = [t for t in watched(total) if t < n]
            weights = torch.zeros(total, len(seen) + 1, dtype=torch.float64)
            alpha, own = chosen[kind]["coefficient"], chosen[kind]["own_lengths"]
            ratios = (
                length_ratios(gram[:n, :n], table)
                if kind != "full"
                else torch.ones(n, dtype=torch.float64)
            )
            weights[:n, :-1] = (table * ratios if own["1"] else table)[:, seen]
            weights[:n, -1] = (table * ratios if own[str(total)] else table).sum(dim=1)
            single, together = alpha["1"], alpha[str(total)] * total / n
            for position, direction in enumerate(vectors.combinations(weights)):
                alone = position < len(seen)
                test.merge(direction, single if alone else together)
                for t in seen[position : position + 1] if alone else seen:
                    found.append(
                        row(
                            kind,
                            "test",
                            1 if alone else 0,
                            n,
                            names[t],
                            single if alone else together,
                            test.count(names[t]),
                        )
                    )
    write_rows(store, name, found, identity)
