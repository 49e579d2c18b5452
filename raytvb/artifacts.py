"""What an experiment keeps in its store, and under which keys; see the README for the layout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

from raytvb import records
from raytvb.basis_files import INDEX, StoredBasis
from raytvb.config import Experiment, TaskConfig
from raytvb.data import task_classes
from raytvb.encoder import (
    Encoder,
    Tokenizer,
    encoder_files,
    load_encoder,
    load_folder,
    load_tokenizer,
    zero_shot_head,
)
from raytvb.errors import UserError, VectorError
from raytvb.finetune import Checkpoint
from raytvb.masks import Header, Mask, MaskFile, mask_intersections
from raytvb.records import FileInfo
from raytvb.store import Store, StoreKeyError
from raytvb.talos import jaccard
from raytvb.vectors import VectorFile, VectorSet

EXPERIMENT = "experiment.yaml"
BASE = "base"
SHARED_MASK = "shared"
GRAM = "gram"
OVERLAP = "overlap"
PRECISION = "precision"
SUMMARY = "report/summary.json"
REPORT = "report/index.html"


def vector_prefix(task: str) -> str:
    """Folder of a task's vector, head and record."""
    return f"vectors/{task}"


def vector_key(task: str) -> str:
    """The vector file itself."""
    return f"{vector_prefix(task)}/vector.safetensors"


def basis_vector_prefix(experiment: Experiment, task: str) -> str:
    """Folder of what bases are made of for a task: its vector, or the prepared twin of that."""
    return vector_prefix(task) if experiment.basis.prepare == "none" else f"prepared/{task}"


def basis_vector_key(experiment: Experiment, task: str) -> str:
    """The vector file that bases are made of."""
    return f"{basis_vector_prefix(experiment, task)}/vector.safetensors"


def basis_vector_record(store: Store, experiment: Experiment, task: str) -> dict[str, Any] | None:
    """Record of the vector that bases are made of; None where it is not there, or of a vector that was made again."""
    record = records.find(store, vector_prefix(task))
    if record is None or experiment.basis.prepare == "none":
        return record
    twin = records.find(store, basis_vector_prefix(experiment, task))
    present = record["files"]["vector.safetensors"]["sha256"]
    return twin if twin is not None and twin["parents"]["vector"] == present else None


def mask_prefix(mask_id: str) -> str:
    """Folder of a mask; its id is `shared` or the task's name."""
    return f"masks/{mask_id}"


def basis_prefix(name: str) -> str:
    """Folder of a basis."""
    return f"basis/{name}"


def online_prefix(name: str) -> str:
    """Folder of the state of an online basis."""
    return f"online/{name}"


def online_tables(count: int) -> str:
    """The file of an online basis's small matrices after `count` tasks."""
    return f"after-{count:06d}.safetensors"


ASKED = ("search", "evaluate")  # may change while a store lives: what depends on them says so itself


def freeze(store: Store, experiment: Experiment) -> None:
    """Write what was asked into a new store; check it against what an existing store holds.

    What is asked of the vectors may change later: more basis methods, another search, other evaluations. A store in
    which nothing but the pretrained model was made so far is given to the new experiment. Raises UserError where the
    store belongs to another experiment; the message shows the fields that differ.
    """
    asked = experiment.identity()
    stored = yaml.safe_load(store.read(EXPERIMENT)) if store.exists(EXPERIMENT) else None
    differing = [] if stored is None else records.differences(_frozen(stored), _frozen(asked))
    if differing and not any(k.endswith(f"/{records.RECORD}") and not k.startswith((f"{BASE}/", "splits/"))
                             for k in store.keys()):
        for made in (BASE, "vectors", "splits"):  # the heads of its tasks are there
            store.delete(made)
        differing = []
    if differing:
        raise UserError(f"{store.url} belongs to another experiment:\n  " + "\n  ".join(differing)
                        + "\nUse another store, or the experiment file that it was made with.")
    if stored != asked:
        store.write(EXPERIMENT, yaml.safe_dump(asked, sort_keys=False, allow_unicode=True).encode())


def _frozen(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an experiment that its store was made for."""
    kept = {k: v for k, v in identity.items() if k not in ASKED}
    return kept | {"basis": {"prepare": "none"} | {k: v for k, v in identity.get("basis", {}).items() if k != "method"}}


def base_identity(experiment: Experiment) -> dict[str, Any]:
    """Identity of the pretrained model."""
    return {"model": experiment.model.model_dump(mode="json")}


def vector_identity(experiment: Experiment, task: TaskConfig) -> dict[str, Any]:
    """Identity of a task vector: with a shared mask it depends on all tasks, else on its own alone."""
    identity = experiment.identity()
    chosen = {k: identity[k] for k in ("model", "seed", "talos", "finetune")} | {"task": task.model_dump(mode="json")}
    shared = experiment.talos.mask == "shared" and experiment.talos.density < 1.0
    return chosen | ({"mask_tasks": list(experiment.task_names)} if shared else {})


def prepared_identity(experiment: Experiment, task: TaskConfig) -> dict[str, Any]:
    """Identity of a vector's prepared twin."""
    return vector_identity(experiment, task) | {"prepare": experiment.basis.prepare}


def mask_identity(experiment: Experiment, tasks: Sequence[TaskConfig]) -> dict[str, Any]:
    """Identity of a mask made from the scores of the given tasks."""
    identity = experiment.identity()
    return {k: identity[k] for k in ("model", "seed", "talos")} | {"tasks": [t.model_dump(mode="json") for t in tasks]}


def basis_identity(experiment: Experiment, method: str, size: int, *, online: bool = False) -> dict[str, Any]:
    """Identity of a basis: that of all vectors, and how it was made."""
    identity = experiment.identity()
    made: dict[str, Any] = {"method": method, "size": size}
    if online:
        made["online"] = {"buffer": experiment.basis.buffer}
    if experiment.basis.prepare != "none":
        made["prepare"] = experiment.basis.prepare
    return {k: identity[k] for k in ("model", "seed", "talos", "finetune", "tasks")} | made


def head_key(experiment: Experiment, task: TaskConfig) -> str:
    """Zero-shot head of a task, or of the control or an unseen task."""
    if task.name in experiment.task_names:
        return f"{vector_prefix(task.name)}/head.safetensors"
    return f"{BASE}/heads/{task.name}.safetensors"


def write_base(store: Store, experiment: Experiment, classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Store the pretrained model and the zero-shot heads of all tasks; `classes` by task name."""
    encoder = load_encoder(experiment.model)
    tokenizer = load_tokenizer(experiment.model)
    for task in experiment.every_task:
        write_head(store, experiment, task, encoder, tokenizer, classes[task.name])
    sizes = {"parameters": sum(t.numel() for t in encoder.visual_state().values())}
    return records.commit(store, BASE, identity=base_identity(experiment), metrics=sizes,
                          files=encoder_files(encoder, experiment.model),
                          parents={"fingerprint": encoder.fingerprint()})


def write_head(store: Store, experiment: Experiment, task: TaskConfig, encoder: Encoder, tokenizer: Tokenizer,
               classes: Sequence[str]) -> Tensor:
    """Make and store the zero-shot head (C, E) float32 of a task; its metadata says what of."""
    head = zero_shot_head(encoder, tokenizer, classes, task.prompts).contiguous()
    store.write(head_key(experiment, task), save({"head": head}, metadata={"raytvb": _head_source(task)}))
    return head


def _head_source(task: TaskConfig) -> str:
    source = {"data": task.data, "classes": task.classes, "prompts": task.prompts}
    return json.dumps(source, sort_keys=True)


def load_head(store: Store, experiment: Experiment, task: TaskConfig, encoder: Encoder) -> Tensor:
    """The zero-shot head (C, E) float32 of a task; made again where its folder was deleted, or where it is that of a
    control or unseen task of the same name with other classes or prompts."""
    key = head_key(experiment, task)
    try:
        if json.dumps(Header.read(store, key).info, sort_keys=True) == _head_source(task):
            return load(store.read(key))["head"]
    except (StoreKeyError, VectorError):
        pass
    return write_head(store, experiment, task, encoder, load_tokenizer(experiment.model), task_classes(task))


class Mirror:
    """Local copies of store files for reading them often; a local store needs no copies. Removed with the process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = None if store.local_path("x") else tempfile.TemporaryDirectory(prefix="raytvb-")
        self.local = store if self._folder is None else Store(self._folder.name)

    def fetch(self, key: str) -> None:
        """Make the key readable through `local`."""
        if self._folder is not None and not self.local.exists(key):
            self._store.download(key, str(Path(self._folder.name) / key))

    def basis(self, prefix: str) -> StoredBasis:
        """Open a basis, all of its files and its mask fetched along with it."""
        remote = StoredBasis(self._store, prefix)
        if self._folder is None:
            return remote
        for key in (f"{prefix}/{INDEX}", *remote.files, *([remote.layout.mask_key] if remote.layout.mask_key else [])):
            self.fetch(key)
        return StoredBasis(self.local, prefix)

    def vector(self, key: str) -> VectorFile:
        """Open a vector file, its mask fetched along with it."""
        remote = VectorFile(self._store, key)
        if self._folder is None:
            return remote
        self.fetch(key)
        if remote.mask is not None:
            self.fetch(remote.mask_key)
        return VectorFile(self.local, key)


@cache
def mirror(url: str) -> Mirror:
    """The process's mirror of a store."""
    return Mirror(Store(url))


@cache
def base_encoder(url: str, fingerprint: str) -> Encoder:
    """The stored pretrained model, loaded once a process. Raises UserError where it is not the one recorded."""
    store, copies = Store(url), mirror(url)
    record = records.find(store, BASE)
    if record is None:
        raise UserError(f"{url} holds no pretrained model; run all stages with `raytvb run`")
    for name in record["files"]:
        copies.fetch(f"{BASE}/{name}")
    encoder = load_folder(copies.local.path(BASE))
    if encoder.fingerprint() != fingerprint:
        raise UserError(f"{store.where(BASE)}: weights and record differ; delete the folder to make it again")
    return encoder


def load_mask(store: Store, mask_id: str) -> Mask:
    """A stored mask, whole."""
    return MaskFile(store, f"{mask_prefix(mask_id)}/mask.safetensors").load()


def write_mask(store: Store, experiment: Experiment, mask_id: str, tasks: Sequence[TaskConfig], mask: Mask) -> None:
    """Commit a mask and its record."""
    metrics = {"kept": mask.kept, "total": len(mask.bits)}
    records.commit(store, mask_prefix(mask_id), identity=mask_identity(experiment, tasks), metrics=metrics,
                   files={"mask.safetensors": mask.to_bytes()}, parents={"mask": mask.fingerprint})


def write_overlap(store: Store, experiment: Experiment) -> dict[str, Any]:
    """Commit how far the tasks' own masks overlap: intersections (T, T) int64; mean, min and max Jaccard index."""
    masks = [MaskFile(store, f"{mask_prefix(t)}/mask.safetensors") for t in experiment.task_names]
    intersections = mask_intersections(masks)
    pairs = jaccard(intersections)[tuple(torch.triu_indices(len(masks), len(masks), 1))]
    metrics = {"mean": float(pairs.mean()), "min": float(pairs.min()), "max": float(pairs.max())}
    return records.commit(store, OVERLAP, identity=mask_identity(experiment, experiment.tasks), metrics=metrics,
                          files={"overlap.safetensors": save({"intersections": intersections})})


def checkpoint_prefix(task: str) -> str:
    """Folder of a fine-tune that has not ended."""
    return f"{vector_prefix(task)}/checkpoint"


def write_checkpoint(store: Store, experiment: Experiment, task: TaskConfig, checkpoint: Checkpoint) -> None:
    """Keep a fine-tune's latest checkpoint; the one before goes when this one is whole."""
    prefix, name = checkpoint_prefix(task.name), f"step-{checkpoint.step:07d}.safetensors"
    metrics = {"step": checkpoint.step, "loss": checkpoint.loss, "seconds": checkpoint.seconds}
    records.commit(store, prefix, identity=vector_identity(experiment, task), metrics=metrics,
                   files={name: save(checkpoint.tensors)})
    for key in store.keys(prefix):
        if key not in (f"{prefix}/{name}", f"{prefix}/{records.RECORD}"):
            store.delete(key)


def load_checkpoint(store: Store, experiment: Experiment, task: TaskConfig) -> Checkpoint | None:
    """The checkpoint to go on from; None where there is none that is whole."""
    prefix = checkpoint_prefix(task.name)
    record = records.find(store, prefix, vector_identity(experiment, task))
    if record is None:
        return None
    (name, info), = record["files"].items()
    try:
        data = store.read(f"{prefix}/{name}")
    except StoreKeyError:
        return None
    if not FileInfo.from_json(info).is_of(data):
        return None
    return Checkpoint(**record["metrics"], tensors=load(data))


def vector_set(url: str, tasks: Sequence[str]) -> VectorSet:
    """The vectors of the given tasks, opened through the process's mirror."""
    return VectorSet([mirror(url).vector(vector_key(t)) for t in tasks])


def basis_vector_set(experiment: Experiment) -> VectorSet:
    """The vectors that the experiment's bases are made of, in the order of its tasks; opened as `vector_set` does."""
    keys = [basis_vector_key(experiment, t) for t in experiment.task_names]
    return VectorSet([mirror(experiment.store).vector(k) for k in keys])


def stored_basis(url: str, name: str) -> StoredBasis:
    """The vectors of a basis, opened through the process's mirror."""
    return mirror(url).basis(basis_prefix(name))


def write_coefficients(B: Tensor, W: Tensor) -> bytes:
    """The coefficient file of a basis: B (T, M) and W (M, T), float64."""
    # Copies: W may be a view of B, and safetensors refuses tensors that share memory.
    return save({"B": B.contiguous().clone(), "W": W.contiguous().clone()})


def load_coefficients(store: Store, name: str) -> tuple[Tensor, Tensor]:
    """B (T, M) and W (M, T) of a stored basis, float64."""
    tensors = load(store.read(f"{basis_prefix(name)}/coefficients.safetensors"))
    return tensors["B"], tensors["W"]


def stored_bytes(store: Store, experiment: Experiment, parameters: int) -> dict[str, int]:
    """Sizes on disk by kind, and what T dense float32 vectors would take."""
    sizes = {k: store.size(k) for k in store.keys()}

    def total(prefix: str, ending: str) -> int:
        return sum(s for k, s in sizes.items() if k.startswith(prefix) and k.endswith(ending))

    return {"dense_fp32": 4 * len(experiment.tasks) * parameters,
            "vectors": total("vectors/", "/vector.safetensors"), "masks": total("masks/", ".safetensors"),
            "heads": total("vectors/", "/head.safetensors"), "basis": total("basis/", ".safetensors")}


def check_files(store: Store, prefix: str, names: Sequence[str] | None = None) -> None:
    """Raise UserError for a file of the thing under `prefix` (or those of the names) that is not as recorded."""
    record = records.find(store, prefix)
    for name, info in ({} if record is None else record["files"]).items():
        if names is None or name in names:
            problem = _problem(store, f"{prefix}/{name}", info)
            if problem:
                raise UserError(f"{store.url}: {problem}")


def _problem(store: Store, key: str, info: Mapping[str, Any]) -> str | None:
    """What is wrong with a stored file, and the way out; None where it is as recorded."""
    try:
        data = store.read(key)
    except FileNotFoundError:
        found = "missing"
    else:
        if FileInfo.from_json(info).is_of(data):
            return None
        same = len(data) == info["size"]
        found = "its contents have changed" if same else f"{len(data)} bytes instead of {info['size']}"
    return f"{key}: {found}; delete the folder {key.rpartition('/')[0]} and run again to make it anew"


def verify(store: Store) -> tuple[int, list[str]]:
    """Check every recorded file against its checksum: (files checked, problems, each naming its file)."""
    checked, problems = 0, []
    for key in store.keys():
        if not key.endswith(f"/{records.RECORD}"):
            continue
        prefix = key.removesuffix(f"/{records.RECORD}")
        for name, info in store.read_json(key)["files"].items():
            path = f"{prefix}/{name}"
            checked += 1
            problem = _problem(store, path, info)
            if problem:
                problems.append(problem)
    return checked, problems


def check_finite(values: Mapping[str, Tensor], where: str) -> None:
    """Raise VectorError that names the tensors with NaN or infinite values."""
    bad = [n for n, t in sorted(values.items()) if not bool(torch.isfinite(t).all())]
    if bad:
        raise VectorError(f"{where}: NaN or infinite values in {', '.join(bad)}")
