"""From a store to a model: any mix of tasks, added or negated, as an ordinary open_clip folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from raytvb import artifacts, records
from raytvb.encoder import CONFIG_FILE, WEIGHTS_FILE
from raytvb.errors import UserError
from raytvb.methods import MERGE, global_thresholds
from raytvb.mixes import decoded, summed, vector_of
from raytvb.store import Store
from raytvb.vectors import Coordinates

Kind = Literal["decoded", "sum", "vectors"]
METHODS = tuple(name for name in MERGE if name != "fisher")  # which needs what a store has not
MATRIX_METHODS = ("tsv-m", "iso-c")
UNSCALED = ("mean", "ties", "tsv-m", "iso-c")  # made for a coefficient of 1; the others are as large as a sum


def merged_state(state: Mapping[str, Tensor], vectors: Coordinates, weights: Tensor) -> dict[str, Tensor]:
    """State dict plus sum_f weights[f] * vectors[f], in float32; the given state dict is not changed."""
    direction = next(vectors.combinations(weights[:, None]))
    merged = {n: t.clone() for n, t in state.items()}
    tensors = vectors.mask.load().tensors() if vectors.mask is not None else None
    offset = 0
    for name, shape in vectors.parameters.items():
        if name not in merged or tuple(merged[name].shape) != tuple(shape):
            raise UserError(f"the model has no tensor {name} of shape {tuple(shape)}: the vectors are of another model")
        target = merged[name].reshape(-1)
        indices = torch.arange(target.numel()) if tensors is None else tensors[name].reshape(-1).nonzero()[:, 0]
        target[indices] += direction[offset:offset + len(indices)]
        offset += len(indices)
        merged[name] = target.view(shape)
    return merged


def method_state(state: Mapping[str, Tensor], vectors: Coordinates, tasks: Tensor, method: str,
                 coefficient: float) -> dict[str, Tensor]:
    """State dict plus coefficient * method(tau_1, ..., tau_n), one parameter at a time, in float32.

    tasks: (F, n) float64, each of the n vectors to merge as a combination of the F stored ones. Methods that go entry
    by entry see the kept entries only; those of matrices see whole ones, and fill them. Memory: n times one parameter.
    """
    kept = vectors.mask.load().tensors() if vectors.mask is not None else None
    factors, generator = tasks.T.to(torch.float32), torch.Generator().manual_seed(0)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        first = 0
        for name, shape in vectors.parameters.items():
            count = prod(shape) if kept is None else int(kept[name].sum())
            yield name, factors @ vectors.read_all(first, count)
            first += count

    options: dict[str, Any] = {"dare": {"generator": generator}}.get(method, {})
    if method == "ties":
        options = {"thresholds": global_thresholds(lambda: (rows for _, rows in parameters()))}
    merged = dict(state)
    for name, rows in parameters():
        shape = vectors.parameters[name]
        if method in MATRIX_METHODS or kept is None:
            whole = rows
            if kept is not None:
                whole = torch.zeros(len(rows), prod(shape))
                whole[:, kept[name].reshape(-1)] = rows
            change = MERGE[method](whole.view(-1, *shape), **options)
        else:
            change = torch.zeros(prod(shape))
            change[kept[name].reshape(-1)] = MERGE[method](rows, **options)
        merged[name] = state[name] + coefficient * change.view(shape)
    return merged


def default_coefficient(store: Store, source: str, count: int) -> float:
    """The coefficient that validation chose for additions of the nearest searched number of tasks, else 1/count."""
    record = records.find(store, f"search/{source}")
    if record is None:
        return 1.0 / count
    chosen = {int(s): a for s, a in record["metrics"]["coefficient"].items()}
    return chosen[min(chosen, key=lambda s: (abs(s - count), s))]


@dataclass(frozen=True)
class _Mix:
    """What is to be added to the pretrained weights: coefficient * sum_f weights[f] * vectors[f]."""

    vectors: Coordinates
    weights: Tensor
    coefficient: float
    source: str
    tasks: Tensor | None = None
    """(F, n): the weighted vectors of the n tasks one by one; weights are their sum."""


def _full(store: Store, tasks: Mapping[str, float]) -> _Mix:
    keys = (k for k in store.keys("vectors") if k.endswith("/vector.safetensors"))
    names = [k.removeprefix("vectors/").removesuffix("/vector.safetensors") for k in keys]
    if not names:
        raise UserError(f"{store.url} holds no task vectors yet; run `raytvb run` first")
    vector_of(names, tasks)  # all of them are there
    weights = torch.tensor(list(tasks.values()), dtype=torch.float64)
    for task in tasks:
        artifacts.check_files(store, artifacts.vector_prefix(task), ["vector.safetensors"])
    usual = default_coefficient(store, "full", _added(tasks))
    return _Mix(artifacts.vector_set(store.url, list(tasks)), weights, usual, "full", weights.diag())


def _added(tasks: Mapping[str, float]) -> int:
    return sum(1 for w in tasks.values() if w > 0) or 1


def _basis(store: Store, name: str, tasks: Mapping[str, float], kind: str, vectors: Mapping[int, float]) -> _Mix:
    record = records.find(store, artifacts.basis_prefix(name))
    if record is None:
        there = sorted({k.split("/")[1] for k in store.keys("basis")})
        raise UserError(f"{store.url} has no basis {name!r}; it has {', '.join(there) or 'none'}, and `full`")
    artifacts.check_files(store, artifacts.basis_prefix(name))
    basis = artifacts.stored_basis(store.url, name)
    if kind == "sum":
        if not record["metrics"]["convex"]:
            raise UserError(f"the vectors of {name} are no convex combinations of task vectors, so their plain sum "
                            f"means nothing: use `--merge decoded`, or a basis of ae, ae-anchored, kmeans …")
        count = len(record["metrics"]["tasks"])
        return _Mix(basis, summed(basis.size), default_coefficient(store, f"{name}-sum", count), f"{name}-sum")
    if kind == "vectors":
        outside = [m for m in vectors if not 1 <= m <= basis.size]
        if outside:
            raise UserError(f"{name} has the vectors 1 to {basis.size}, not {', '.join(map(str, outside))}")
        weights = torch.zeros(basis.size, dtype=torch.float64)
        for number, weight in vectors.items():
            weights[number - 1] = weight
        return _Mix(basis, weights, 1.0, name)
    table = artifacts.load_coefficients(store, name)[1]
    x = vector_of(record["metrics"]["tasks"], tasks)
    return _Mix(basis, decoded(table, x), default_coefficient(store, name, _added(tasks)), name,
                decoded(table, x.diag())[:, x != 0])


def merge(store: Store, tasks: Mapping[str, float], out: Path, *, basis: str | None = None,
          coefficient: float | None = None, kind: Kind = "decoded", vectors: Mapping[int, float] | None = None,
          method: str = "sum") -> dict[str, Any]:
    """Write a merged model to the folder `out`, loadable as `local-dir:out`.

    Args:
        tasks: weight by task name: 1 adds, -1 negates.
        basis: `<method>-m<M>` decodes the task vectors from that basis; default: the chosen one, else full vectors.
        coefficient: scale of the whole merge; default: what validation chose for additions of that many tasks.
        kind: `decoded`: theta_0 + coefficient * sum_t weight_t * tau_t; `sum`: the plain sum of the basis vectors,
            which adds all tasks; `vectors`: the basis vectors with the weights in `vectors` (numbered from 1).
        method: instead of the sum of tasks, a method of `methods.MERGE` on their vectors (of `decoded` merges).
    Raises UserError for an unknown task or basis, ValueError for tasks that are not there.
    """
    chosen = store.read_json(artifacts.SUMMARY)["chosen"]["name"] if store.exists(artifacts.SUMMARY) else "full"
    source = basis or chosen
    if source == "full" and kind != "decoded":
        raise UserError(f"only a basis has vectors to merge like that: name one with --basis (`raytvb ls {store.url}`)")
    mix = _full(store, tasks) if source == "full" else _basis(store, source, tasks, kind, vectors or {})
    usual = 1.0 if method in UNSCALED else mix.coefficient
    alpha = usual if coefficient is None else coefficient
    base = records.find(store, artifacts.BASE)
    if base is None:
        raise UserError(f"{store.url} holds no pretrained model; run `raytvb run` first")
    encoder = artifacts.base_encoder(store.url, base["parents"]["fingerprint"])
    state: dict[str, Tensor] = encoder.model.state_dict()
    if method == "sum" or mix.tasks is None:
        merged = merged_state(state, mix.vectors, alpha * mix.weights)
    else:
        merged = method_state(state, mix.vectors, mix.tasks, method, alpha)
    out.mkdir(parents=True, exist_ok=True)
    for name in base["files"]:
        if name != WEIGHTS_FILE:
            data = store.read(f"{artifacts.BASE}/{name}")
            (out / name).write_bytes(_with_place(data, out) if name == CONFIG_FILE else data)
    save_file(merged, out / WEIGHTS_FILE)
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors makes files that only their owner reads
    return {"chosen": store.exists(artifacts.SUMMARY), "source": mix.source, "coefficient": alpha,
            "tasks": dict(tasks), "folder": str(out), "config": CONFIG_FILE}


def _with_place(document: bytes, folder: Path) -> bytes:
    """A model's configuration whose tokenizer file has its full path: open_clip looks in the working folder alone."""
    config = json.loads(document)
    options = config["model_cfg"].get("text_cfg", {}).get("tokenizer_kwargs", {})
    if "bpe_path" in options:
        options["bpe_path"] = str(folder.resolve() / options["bpe_path"])
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
