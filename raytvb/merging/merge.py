"""From a store to a model: any mix of tasks, added or negated, as an ordinary open_clip folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.layout import BASE, basis_prefix, vector_prefix
from raytvb.experiment.searching import MERGES
from raytvb.experiment.stored import load_coefficients, stored_basis, vector_set
from raytvb.maths.merge_methods import UNSCALED
from raytvb.maths.mixes import decoded, length_ratios, summed, vector_of
from raytvb.models.base import base_encoder
from raytvb.models.open_clip_models import CONFIG_FILE, WEIGHTS_FILE
from raytvb.search.directions import method_direction
from raytvb.storage import records
from raytvb.storage.gram_state import GramState
from raytvb.storage.store import Store
from raytvb.storage.vector_set import Coordinates
from raytvb.storage.verify import check_files

Kind = Literal["decoded", "sum", "vectors"]


Lengths = Literal["projected", "own"]


METHODS = ("sum", *MERGES)


def merged_state(
    state: Mapping[str, Tensor], vectors: Coordinates, weights: Tensor
) -> dict[str, Tensor]:
    """State dict plus sum_f weights[f] * vectors[f], in float32; the given state dict is not
    changed.
    """
    return _moved(state, vectors, next(vectors.combinations(weights[:, None])))


def method_state(
    state: Mapping[str, Tensor],
    vectors: Coordinates,
    tasks: Tensor,
    method: str,
    coefficient: float,
) -> dict[str, Tensor]:
    """State dict plus coefficient * method(tau_1, ..., tau_n), in float32; see
    `directions.method_direction`.

    tasks: (F, n) float64, each of the n vectors to merge as a combination of the F stored ones.
    """
    return _moved(state, vectors, method_direction(vectors, tasks, method), coefficient)


def _moved(
    state: Mapping[str, Tensor], vectors: Coordinates, direction: Tensor, coefficient: float = 1.0
) -> dict[str, Tensor]:
    """State dict plus coefficient * direction, which is of the vectors' coordinates or of all
    parameters.
    """
    merged = {n: t.clone() for n, t in state.items()}
    everywhere = vectors.mask is None or len(direction) == vectors.mask.total
    tensors = None if everywhere or vectors.mask is None else vectors.mask.load().tensors()
    offset = 0
    for name, shape in vectors.parameters.items():
        if name not in merged or tuple(merged[name].shape) != tuple(shape):
            raise UserError(
                f"the model has no tensor {name} of shape {tuple(shape)}: the vectors are of another model"
            )
        target = merged[name].reshape(-1)
        indices = (
            torch.arange(target.numel())
            if tensors is None
            else tensors[name].reshape(-1).nonzero()[:, 0]
        )
        target[indices] += coefficient * direction[offset : offset + len(indices)]
        offset += len(indices)
        merged[name] = target.view(shape)
    return merged


def searched(store: Store, source: str, count: int) -> tuple[float, bool]:
    """What validation chose for additions of the searched number of tasks nearest to `count`: the
    coefficient, and whether decoded vectors get the lengths of the task vectors. Without a search
    1/count, and not."""
    record = records.find(store, f"search/{source}")
    if record is None or not record["metrics"]["coefficient"]:
        return 1.0 / count, False
    chosen = {int(s): a for s, a in record["metrics"]["coefficient"].items()}
    nearest = min(chosen, key=lambda s: (abs(s - count), s))
    return chosen[nearest], record["metrics"]["own_lengths"][str(nearest)]


@dataclass(frozen=True)
class _Mix:
    """What is to be added to the pretrained weights: coefficient * sum_f weights[f] *
    vectors[f].
    """

    vectors: Coordinates
    weights: Tensor
    coefficient: float
    source: str
    tasks: Tensor | None = None
    """(F, n): the weighted vectors of the n tasks one by one; weights are their sum."""
    own_lengths: bool = False


def _full(store: Store, tasks: Mapping[str, float]) -> _Mix:
    keys = (k for k in store.keys("vectors") if k.endswith("/vector.safetensors"))
    names = [k.removeprefix("vectors/").removesuffix("/vector.safetensors") for k in keys]
    if not names:
        raise UserError(f"{store.url} holds no task vectors yet; run `raytvb run` first")
    vector_of(names, tasks)  # all of them are there
    weights = torch.tensor(list(tasks.values()), dtype=torch.float64)
    for task in tasks:
        check_files(store, vector_prefix(task), ["vector.safetensors"])
    usual, _ = searched(store, "full", _added(tasks))
    return _Mix(vector_set(store.url, list(tasks)), weights, usual, "full", weights.diag())


def _added(tasks: Mapping[str, float]) -> int:
    return sum(1 for w in tasks.values() if w > 0) or 1


def _basis(
    store: Store,
    name: str,
    tasks: Mapping[str, float],
    kind: str,
    vectors: Mapping[int, float],
    lengths: Lengths | None,
) -> _Mix:
    record = records.find(store, basis_prefix(name))
    if record is None:
        there = sorted({k.split("/")[1] for k in store.keys("basis")})
        raise UserError(
            f"{store.url} has no basis {name!r}; it has {', '.join(there) or 'none'}, and `full`"
        )
    check_files(store, basis_prefix(name))
    basis = stored_basis(store.url, name)
    if kind == "sum":
        if not record["metrics"]["convex"]:
            raise UserError(
                f"the vectors of {name} are no convex combinations of task vectors, so their plain sum "
                f"means nothing: use `--merge decoded`, or a basis of ae, ae-anchored, kmeans …"
            )
        count = len(record["metrics"]["tasks"])
        return _Mix(
            basis, summed(basis.size), searched(store, f"{name}-sum", count)[0], f"{name}-sum"
        )
    if kind == "vectors":
        outside = [m for m in vectors if not 1 <= m <= basis.size]
        if outside:
            raise UserError(
                f"{name} has the vectors 1 to {basis.size}, not {', '.join(map(str, outside))}"
            )
        weights = torch.zeros(basis.size, dtype=torch.float64)
        for number, weight in vectors.items():
            weights[number - 1] = weight
        return _Mix(basis, weights, 1.0, name)
    x = vector_of(record["metrics"]["tasks"], tasks)
    coefficient, usual = searched(store, name, _added(tasks))
    B, W = load_coefficients(store, name)
    own = usual if lengths is None else lengths == "own"
    if own:
        W = W * length_ratios(GramState.read(store).ordered(record["metrics"]["tasks"]), B @ W)
    return _Mix(basis, decoded(W, x), coefficient, name, decoded(W, x.diag())[:, x != 0], own)


def merge(
    store: Store,
    tasks: Mapping[str, float],
    out: Path,
    *,
    basis: str | None = None,
    coefficient: float | None = None,
    kind: Kind = "decoded",
    vectors: Mapping[int, float] | None = None,
    method: str = "sum",
    lengths: Lengths | None = None,
) -> dict[str, Any]:
    """Write a merged model to the folder `out`, loadable as `local-dir:out`.

    Args:
        tasks: weight by task name: 1 adds, -1 negates.
        basis: `<method>-m<M>` decodes the task vectors from that basis; default: the chosen one,
            else full vectors.
        coefficient: scale of the whole merge; default: what validation chose for additions of that
            many tasks.
        kind: `decoded`: theta_0 + coefficient * sum_t weight_t * tau_t; `sum`: the plain sum of the
            basis vectors, which adds all tasks; `vectors`: the basis vectors with the weights in
            `vectors` (numbered from 1).
        method: instead of the sum of tasks, a method of `methods.MERGE` on their vectors (of
            `decoded` merges).
        lengths: of the vectors that a basis decodes: `projected`, or `own`, those of the task
            vectors; default: what validation chose along with the coefficient; `projected` where a
            coefficient or a method is given.
    Raises UserError for an unknown task or basis, ValueError for tasks that are not there.
    """
    choice = records.find(store, "search")
    source = basis or (choice["metrics"]["name"] if choice is not None else None) or "full"
    if source == "full" and kind != "decoded":
        raise UserError(
            f"only a basis has vectors to merge like that: name one with --basis (`raytvb ls {store.url}`)"
        )
    if lengths is None and (coefficient is not None or method != "sum"):
        lengths = "projected"
    mix = (
        _full(store, tasks)
        if source == "full"
        else _basis(store, source, tasks, kind, vectors or {}, lengths)
    )
    usual = mix.coefficient
    if method != "sum":  # that of the search, where it compared this method (`search.merges`)
        usual = 1.0 if method in UNSCALED else usual
        if records.find(store, f"search/{source}-{method}") is not None:
            usual, _ = searched(store, f"{source}-{method}", _added(tasks))
    alpha = usual if coefficient is None else coefficient
    base = records.find(store, BASE)
    if base is None:
        raise UserError(f"{store.url} holds no pretrained model; run `raytvb run` first")
    encoder = base_encoder(store.url, base["parents"]["fingerprint"])
    state: dict[str, Tensor] = encoder.model.state_dict()
    if method == "sum" or mix.tasks is None:
        merged = merged_state(state, mix.vectors, alpha * mix.weights)
    else:
        merged = method_state(state, mix.vectors, mix.tasks, method, alpha)
    out.mkdir(parents=True, exist_ok=True)
    for name in base["files"]:
        if name != WEIGHTS_FILE:
            data = store.read(f"{BASE}/{name}")
            (out / name).write_bytes(_with_place(data, out) if name == CONFIG_FILE else data)
    save_file(merged, out / WEIGHTS_FILE)
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors makes files that only their owner reads
    return {
        "chosen": choice is not None,
        "source": mix.source,
        "coefficient": alpha,
        "own_lengths": mix.own_lengths,
        "tasks": dict(tasks),
        "folder": str(out),
        "config": CONFIG_FILE,
    }


def _with_place(document: bytes, folder: Path) -> bytes:
    """A model's configuration whose tokenizer file has its full path: open_clip looks in the
    working folder alone.
    """
    config = json.loads(document)
    options = config["model_cfg"].get("text_cfg", {}).get("tokenizer_kwargs", {})
    if "bpe_path" in options:
        options["bpe_path"] = str(folder.resolve() / options["bpe_path"])
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()
