"""From a store to a model: any mix of tasks, added or negated, as an ordinary open_clip folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from raytvb import artifacts, records
from raytvb.encoder import CONFIG_FILE, WEIGHTS_FILE
from raytvb.errors import UserError
from raytvb.store import Store
from raytvb.vectors import VectorSet


def merged_state(state: Mapping[str, Tensor], vectors: VectorSet, weights: Tensor) -> dict[str, Tensor]:
    """State dict plus sum_f weights[f] * vectors[f], in float32; the given state dict is not changed."""
    direction = vectors.combine(weights)
    merged = {n: t.clone() for n, t in state.items()}
    mask = vectors.files[0].mask if vectors.compact else None
    tensors = mask.load().tensors() if mask is not None else None
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


def default_coefficient(store: Store, source: str, count: int) -> float:
    """The coefficient that validation chose for additions of the nearest searched number of tasks, else 1/count."""
    record = records.find(store, f"search/{source}")
    if record is None:
        return 1.0 / count
    chosen = {int(s): a for s, a in record["metrics"]["coefficient"].items()}
    return chosen[min(chosen, key=lambda s: (abs(s - count), s))]


def merge(store: Store, tasks: Mapping[str, float], out: Path, *, basis: str | None = None,
          coefficient: float | None = None) -> dict[str, Any]:
    """Write theta_0 + coefficient * sum_t weight_t * tau_t to the folder `out`, loadable as `local-dir:out`.

    Args:
        tasks: weight by task name: 1 adds, -1 negates.
        basis: `<method>-m<M>` decodes the task vectors from that basis; default: the chosen one, else full vectors.
        coefficient: default: what validation chose for additions of that many tasks.
    Raises UserError for an unknown task or basis.
    """
    chosen = store.read_json(artifacts.SUMMARY)["chosen"]["name"] if store.exists(artifacts.SUMMARY) else "full"
    source = basis or chosen
    if source == "full":
        vectors = artifacts.vector_set(store.url, list(tasks)) if _known(store, tasks) else None
        table = torch.eye(len(tasks), dtype=torch.float64)
        columns = list(range(len(tasks)))
    else:
        record = records.find(store, f"basis/{source}")
        if record is None:
            there = sorted({k.split("/")[1] for k in store.keys("basis")})
            raise UserError(f"{store.url} has no basis {source!r}; it has {', '.join(there) or 'none'}, and `full`")
        method, size = source.rsplit("-m", 1)
        names = record["metrics"]["tasks"]
        _check(store, tasks, names)
        vectors, table = artifacts.basis_set(store.url, method, int(size)), artifacts.load_coefficients(
            store, method, int(size))[1]
        columns = [names.index(t) for t in tasks]
    assert vectors is not None
    added = sum(1 for w in tasks.values() if w > 0) or 1
    alpha = default_coefficient(store, source, added) if coefficient is None else coefficient
    weights = alpha * table[:, columns] @ torch.tensor(list(tasks.values()), dtype=torch.float64)
    base = records.find(store, artifacts.BASE)
    if base is None:
        raise UserError(f"{store.url} holds no pretrained model; run `raytvb run` first")
    encoder = artifacts.base_encoder(store.url, base["parents"]["fingerprint"])
    out.mkdir(parents=True, exist_ok=True)
    for name in base["files"]:
        if name != WEIGHTS_FILE:
            data = store.read(f"{artifacts.BASE}/{name}")
            (out / name).write_bytes(_with_place(data, out) if name == CONFIG_FILE else data)
    save_file(merged_state(encoder.model.state_dict(), vectors, weights), out / WEIGHTS_FILE)
    (out / WEIGHTS_FILE).chmod(0o644)  # safetensors makes files that only their owner reads
    return {"source": source, "coefficient": alpha, "tasks": dict(tasks), "folder": str(out), "config": CONFIG_FILE}


def _with_place(document: bytes, folder: Path) -> bytes:
    """A model's configuration whose tokenizer file has its full path: open_clip looks in the working folder alone."""
    config = json.loads(document)
    options = config["model_cfg"].get("text_cfg", {}).get("tokenizer_kwargs", {})
    if "bpe_path" in options:
        options["bpe_path"] = str(folder.resolve() / options["bpe_path"])
    return (json.dumps(config, indent=1, sort_keys=True) + "\n").encode()


def _check(store: Store, tasks: Mapping[str, float], names: list[str]) -> None:
    unknown = [t for t in tasks if t not in names]
    if not names:
        raise UserError(f"{store.url} holds no task vectors yet; run `raytvb run` first")
    if unknown:
        raise UserError(f"no task vector of {', '.join(unknown)}; there are {', '.join(names)}")


def _known(store: Store, tasks: Mapping[str, float]) -> bool:
    keys = (k for k in store.keys("vectors") if k.endswith("/vector.safetensors"))
    _check(store, tasks, [k.removeprefix("vectors/").removesuffix("/vector.safetensors") for k in keys])
    return True
