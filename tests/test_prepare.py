"""Bases that are made of prepared vectors: trimmed, dropped or sparsified, beside the task vectors
themselves.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_files import dense, flat, flip, glued, problems_of, random_mask, values_of, vector_data

from raytvb.bases.builder import BasisBuilder
from raytvb.errors import PartialRunError, UserError, VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import base_identity, mask_identity, vector_identity
from raytvb.experiment.layout import BASE, MASK, basis_vector_prefix, mask_prefix, vector_prefix
from raytvb.experiment.metrics import BaseMetrics, MaskMetrics
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.stored import load_coefficients
from raytvb.experiment.stored_vectors import StoredVector, basis_vectors_of, vector_set, vectors_of
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.finetuning.masks import load_mask
from raytvb.finetuning.twins import make_twin
from raytvb.maths.seeds import task_seed
from raytvb.maths.trimming import PREPARE
from raytvb.models.pretrained_model import store_base
from raytvb.storage import records
from raytvb.storage.gram_state import GramState
from raytvb.storage.masks import Mask
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VECTOR, VectorFile
from raytvb.suite.task_names import task_names

SHAPES = {"visual.a": (40, 30), "visual.b": (17,), "visual.c": (3, 5, 7), "visual.d": (1,)}
KINDS = ("dense", "shared", "per-task")
NAMES = ("trimmed", "dropped", "sparsified")
METHODS = ["ae-anchored", "svd"]


def experiment_in(
    folder: Path | str, kind: str, prepare: str, count: int = 4, **basis: Any
) -> Experiment:
    talos = {
        "density": 1.0 if kind == "dense" else 0.5,
        "mask": "per-task" if kind == "per-task" else "shared",
    }
    return parse_experiment(
        {
            "store": str(folder),
            "tasks": list(task_names()[:count]),
            "talos": talos,
            "seed": 7,
            "basis": {"method": METHODS, "prepare": prepare, **basis},
            "search": {"sizes": [2]},
        }
    )


def mask_of(kind: str, index: int) -> Mask | None:
    if kind == "dense":
        return None
    mask = random_mask(SHAPES, 99 if kind == "shared" else index, 0.5).tensors()
    generator = torch.Generator().manual_seed(index if kind == "per-task" else 99)
    mask["visual.a"] = (
        torch.rand(SHAPES["visual.a"], generator=generator) < 0.5
    )  # nothing of visual.b is kept
    return Mask.of(mask)


def commit(
    asked: Experiment, kind: str, index: int, values: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Store a vector as a fine-tune does. Returns its tensors before the mask."""
    store, task, mask = Store(asked.store), asked.tasks[index], mask_of(kind, index)
    mask_id = "shared" if kind == "shared" else task.name
    if mask is not None and not store.exists(f"masks/{mask_id}/mask.safetensors"):
        records.commit(
            store,
            mask_prefix(mask_id),
            identity=mask_identity(asked, [task]),
            metrics=MaskMetrics(kept=mask.kept, total=len(mask.bits)),
            files={MASK: mask.to_bytes()},
            parents={"mask": mask.fingerprint},
        )
    values = values_of(SHAPES, seed=index) if values is None else values
    records.commit(
        store,
        vector_prefix(task.name),
        identity=vector_identity(asked, task),
        parents={} if mask is None else {"mask": mask.fingerprint},
        files={"vector.safetensors": vector_data(task.name, values, mask, mask_id, "base-1")},
    )
    return values


def reference(asked: Experiment, kind: str, index: int, values: dict[str, Tensor]) -> Tensor:
    """The prepared vector (D,) float64, made of whole tensors in memory."""
    name, mask = asked.basis.prepare, mask_of(kind, index)
    seen = {
        n: values[n].reshape(-1) if mask is None else values[n][mask.tensors()[n]]
        for n in sorted(values)
    }
    sizes = torch.cat(list(seen.values())).abs().sort(descending=True).values
    seed = task_seed(asked.seed, f"{asked.tasks[index].name}/prepare")
    options: dict[str, Any] = {}
    if name == "trimmed":
        options = {"thresholds": sizes[None, round(0.2 * len(sizes)) - 1]}
    elif name == "dropped":
        options = {"generator": torch.Generator().manual_seed(seed)}
    made = {n: PREPARE[name](v[None], **options)[0] for n, v in seen.items()}
    if mask is None:
        return torch.cat(list(made.values())).double()
    out = {n: torch.zeros(m.shape) for n, m in mask.tensors().items()}
    for n, m in mask.tensors().items():
        out[n][m] = made[n]
    return flat(out)


def filled(folder: Path, kind: str, prepare: str, **basis: Any) -> tuple[Experiment, Tensor]:
    """A store with all vectors and their twins, and what the twins are (D, T) float64."""
    asked = experiment_in(folder, kind, prepare, **basis)
    columns = []
    for index, task in enumerate(asked.tasks):
        columns.append(reference(asked, kind, index, commit(asked, kind, index)))
        make_twin(asked, task)
    return asked, torch.stack(columns, dim=1)


def twin(asked: Experiment, index: int) -> str:
    """Key of the only twin of a task; as it is first called if there is none."""
    folder = f"prepared/{asked.task_names[index]}"
    keys = [key for key in Store(asked.store).keys(folder) if key.endswith(".safetensors")]
    assert len(keys) < 2
    return keys[0] if keys else f"{folder}/{VECTOR}"


def vector_key(task: str) -> str:
    """Key of a vector that has been made once."""
    return f"{vector_prefix(task)}/{VECTOR}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_twins_are_the_method_on_the_kept_entries(tmp_path: Path, kind: str, name: str) -> None:
    asked, V = filled(tmp_path, kind, name)
    store = Store(asked.store)
    for index, task in enumerate(asked.tasks):
        found = dense(store, twin(asked, index))
        assert torch.equal(found, V[:, index]) and not torch.equal(
            found, dense(store, f"vectors/{task.name}/vector.safetensors")
        )
        one, other = (VectorFile(store, k) for k in (twin(asked, index), vector_key(task.name)))
        no_path = {"mask": None}
        assert one.info.model_copy(update=no_path) == other.info.model_copy(update=no_path)
        assert one.shapes == other.shapes
        record = store.read_json(f"prepared/{task.name}/record.json")
        raw = store.read_json(f"vectors/{task.name}/record.json")
        assert record["identity"] == raw["identity"] | {"prepare": name}
        assert record["parents"]["vector"] == raw["files"]["vector.safetensors"]["sha256"]
        assert record["metrics"]["nonzero"] == int(found.count_nonzero()) > 0
        assert record["metrics"]["norm"] == pytest.approx(float(found.norm()), rel=1e-5)
    assert problems_of(store) == []


def matrix(vectors: dict[str, StoredVector]) -> VectorSet:
    return vector_set(list(vectors.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_bases_are_made_of_the_twins(tmp_path: Path, kind: str, name: str) -> None:
    asked, V = filled(tmp_path, kind, name, online=True)
    store, builder = Store(asked.store), BasisBuilder(asked)
    assert builder.add(asked.task_names).failed == {}
    torch.testing.assert_close(builder.gram(), V.T @ V, rtol=1e-5, atol=1e-4)
    builder.write_bases()
    mask, raw = mask_of(kind, 0), matrix(vectors_of(asked, asked.task_names))
    rows = V[mask.bits] if kind == "shared" and mask is not None else V
    torch.testing.assert_close(
        matrix(basis_vectors_of(asked, asked.task_names)).read_all(0, len(rows)).T.double(), rows
    )
    assert not torch.equal(raw.read_all(0, len(rows)).T.double(), rows)
    for basis in ("ae-anchored-m2", "svd-m2", "ae-anchored-m2-online", "svd-m2-online"):
        B, W = load_coefficients(store, basis)
        torch.testing.assert_close(glued(store, f"basis/{basis}"), rows @ B, rtol=1e-4, atol=1e-4)
        record = store.read_json(f"basis/{basis}/record.json")
        loss = float(((V @ B @ W - V) ** 2).sum() / (V**2).sum())
        assert record["metrics"]["relative_error"] == pytest.approx(loss, rel=1e-3)
        assert record["identity"]["prepare"] == name
        assert set(record["parents"]) == {f"prepared/{t}" for t in asked.task_names}
    assert builder.write_bases().names == () and problems_of(store) == []


def test_nothing_is_prepared_unless_it_is_asked_for(tmp_path: Path) -> None:
    asked = experiment_in(tmp_path, "shared", "none")
    for index, task in enumerate(asked.tasks):
        commit(asked, "shared", index)
        make_twin(asked, task)
    builder = BasisBuilder(asked)
    builder.add(asked.task_names)
    builder.write_bases()
    store = Store(asked.store)
    assert store.keys("prepared") == []
    record = store.read_json("basis/svd-m2/record.json")
    assert "prepare" not in record["identity"] and set(record["parents"]) == {
        f"vectors/{t}" for t in asked.task_names
    }
    name = asked.task_names[0]
    assert basis_vector_prefix(asked, name) == vector_prefix(name)


def test_a_twin_is_made_once_and_again_when_its_vector_changes(tmp_path: Path) -> None:
    asked, V = filled(tmp_path, "shared", "dropped")
    store, builder = Store(asked.store), BasisBuilder(asked)
    builder.add(asked.task_names)
    file = tmp_path / twin(asked, 1)
    before, written = file.read_bytes(), file.stat().st_mtime_ns
    make_twin(asked, asked.tasks[1])
    assert file.stat().st_mtime_ns == written
    store.delete(f"prepared/{asked.task_names[1]}")
    make_twin(asked, asked.tasks[1])
    assert file.read_bytes() == before
    V[:, 1] = reference(asked, "shared", 1, commit(asked, "shared", 1, values_of(SHAPES, seed=55)))
    # The twin of the version before does not count as one.
    failed = builder.add(asked.task_names).failed
    assert list(failed) == [asked.task_names[1]] and twin(asked, 1) in failed[asked.task_names[1]]
    make_twin(asked, asked.tasks[1])
    assert torch.equal(dense(store, twin(asked, 1)), V[:, 1])
    assert builder.add(asked.task_names).failed == {}
    torch.testing.assert_close(builder.gram(), V.T @ V, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["dense", "per-task"])
def test_any_store_has_the_twin_of_the_present_vector(store_url: str, kind: str) -> None:
    asked = experiment_in(store_url, kind, "trimmed", 2)
    store, task = Store(asked.store), asked.tasks[1]
    for seed in (1, 2):
        expected = reference(asked, kind, 1, commit(asked, kind, 1, values_of(SHAPES, seed=seed)))
        make_twin(asked, task)
        assert torch.equal(dense(store, twin(asked, 1)), expected)
    assert problems_of(store) == []


@pytest.mark.filterwarnings("ignore:the vectors have rank 1")
@pytest.mark.parametrize("name", NAMES)
def test_twins_of_zeros(tmp_path: Path, name: str) -> None:
    """Some vectors are zero; if all are zero, the error says so."""
    asked, V = filled(tmp_path, "shared", name, online=True)
    store, mask = Store(asked.store), mask_of("shared", 0)
    zeros = {n: torch.zeros(s) for n, s in SHAPES.items()}
    assert mask is not None
    for index in range(3):
        commit(asked, "shared", index, zeros)
        make_twin(asked, asked.tasks[index])
        V[:, index] = 0
        builder = BasisBuilder(asked)
        builder.add(asked.task_names)
        gram = builder.gram()
        assert set(gram.diagonal().nonzero().flatten().tolist()) == set(range(index + 1, 4))
        builder.write_bases()
        B = load_coefficients(store, "svd-m2")[0]
        torch.testing.assert_close(
            glued(store, "basis/svd-m2"), V[mask.bits] @ B, rtol=1e-4, atol=1e-4
        )
        assert store.exists("basis/ae-anchored-m2-online/record.json")
        store.delete("basis")
    commit(asked, "shared", 3, zeros)
    make_twin(asked, asked.tasks[3])
    assert not dense(store, twin(asked, 3)).any()
    builder.add(asked.task_names)
    with pytest.raises(ValueError, match="all zero: there is nothing to fit"):
        builder.write_bases()


def test_damaged_and_missing_vectors_are_named(tmp_path: Path) -> None:
    asked, _ = filled(tmp_path, "shared", "trimmed")
    store, task = Store(asked.store), asked.tasks[2]
    flip(store, twin(asked, 2), -3)
    failed = BasisBuilder(asked).add(asked.task_names).failed
    problem = f"{twin(asked, 2)} is not as its record says"
    assert list(failed) == [task.name] and problem in failed[task.name]
    store.delete(f"prepared/{task.name}")
    flip(store, vector_key(task.name), -3)
    with pytest.raises(VectorError, match=f"{vector_key(task.name)} is not as its record says"):
        make_twin(asked, task)
    store.delete(f"vectors/{task.name}")
    with pytest.raises(UserError, match="run `raytvb finetune` first"):
        make_twin(asked, task)
    assert store.keys(f"prepared/{task.name}") == []


def test_a_fine_tune_leaves_the_twin(
    tmp_path: Path, suite_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fine-tune trains, and the other one finds its vector in the store."""
    monkeypatch.setenv("RAYTVB_CACHE", suite_cache)
    asked = parse_experiment(
        {
            "store": str(tmp_path),
            "tasks": ["glyphs/greek-blur"],
            "basis": {"prepare": "trimmed"},
            "talos": {"mask": "per-task", "images": 16, "rounds": 1},
            "finetune": {"epochs": 1, "batch_size": 256},
        }
    )
    fingerprint, task = store_base(asked).parents["fingerprint"], asked.tasks[0]
    store = Store(asked.store)
    record = finetune_task(asked, fingerprint, task)
    made = dense(store, twin(asked, 0))
    whole = dense(store, vector_key(task.name))
    assert 0 < made.count_nonzero() < whole.count_nonzero() and torch.equal(
        made[made != 0], whole[made != 0]
    )
    assert made.count_nonzero() == pytest.approx(
        0.2 * load_mask(store, f"masks/{task.name}/{MASK}").kept, abs=2
    )
    store.delete(f"prepared/{task.name}")
    assert finetune_task(asked, fingerprint, task) == record
    assert torch.equal(dense(store, twin(asked, 0)), made)


def run(asked: Experiment, *stages: str) -> None:
    from raytvb.orchestration.pipeline import Pipeline, planned_changes
    from raytvb.orchestration.progress import Reporter

    Pipeline(asked, Reporter(quiet=True), planned_changes(asked, stages)).run(stages)


@pytest.mark.ray
def test_stages_prepare_what_is_missing(ray_cluster: None, tmp_path: Path) -> None:
    """Fine-tuning that feeds the basis, and the basis stage by itself."""
    asked = experiment_in(tmp_path, "shared", "sparsified")
    store, names = Store(asked.store), asked.task_names
    columns = [reference(asked, "shared", i, commit(asked, "shared", i)) for i in range(4)]
    records.commit(
        store,
        BASE,
        identity=base_identity(asked),
        parents={"fingerprint": "base-1"},
        metrics=BaseMetrics(parameters=1),
    )
    flip(store, vector_key(names[2]), -3)
    with pytest.raises(PartialRunError, match=f"{names[2]}: .*its contents have changed"):
        run(asked, "finetune", "basis")
    assert GramState.read(store).tasks == [names[i] for i in (0, 1, 3)]
    commit(asked, "shared", 2)
    run(asked, "basis")
    assert all(torch.equal(dense(store, twin(asked, i)), columns[i]) for i in range(4))
    mask = mask_of("shared", 0)
    assert mask is not None
    B = load_coefficients(store, "svd-m2")[0]
    V = torch.stack(columns, dim=1)[mask.bits]
    torch.testing.assert_close(glued(store, "basis/svd-m2"), V @ B, rtol=1e-4, atol=1e-4)
