"""Shares of the coordinates: bits and files do not depend on the number of shares, the order of
arrival or the cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_files import (
    DTYPES,
    Shapes,
    close_to,
    flat,
    flip,
    glued,
    random_mask,
    truncate,
    values_of,
    vector_data,
)

from raytvb.bases.messages import CacheUse, FilesByFolder, Outputs, VectorVersion, Versions
from raytvb.bases.shards import CoordinateShard, write_bases
from raytvb.errors import VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import mask_identity, vector_identity
from raytvb.experiment.layout import BASE, MASK, mask_prefix, vector_prefix
from raytvb.experiment.metrics import MaskMetrics
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.stored_vectors import vectors_of
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage import records
from raytvb.storage.basis_layout import Layout
from raytvb.storage.basis_writer import NO_TAGS, write_combinations
from raytvb.storage.masks import Mask
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VECTOR
from raytvb.suite.task_names import task_names

SEGMENT = 2 * BLOCK
SHAPES: Shapes = {"visual.w": (500, 1001), "visual.b": (7, 3)}  # D = 7.6 blocks, 4 segments
DENSITY = 0.9  # a shared mask leaves 4 segments too
KINDS = ("dense", "shared", "per-task")
COUNT = 5


def vector_key(task: str) -> str:
    return f"{vector_prefix(task)}/{VECTOR}"


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("bases.shards", "storage.basis_layout"):
        monkeypatch.setattr(f"raytvb.{module}.SEGMENT", SEGMENT)


def experiment_in(folder: str, kind: str, count: int = COUNT, **fields: Any) -> Experiment:
    talos = {
        "density": 1.0 if kind == "dense" else DENSITY,
        "mask": "per-task" if kind == "per-task" else "shared",
    }
    return parse_experiment(
        {"store": folder, "tasks": list(task_names()[:count]), "talos": talos, **fields}
    )


def mask_of(kind: str, index: int, shapes: Shapes = SHAPES) -> Mask | None:
    return (
        None if kind == "dense" else random_mask(shapes, 99 if kind == "shared" else index, DENSITY)
    )


def commit(
    experiment: Experiment,
    kind: str,
    index: int,
    *,
    seed: int | None = None,
    base: str = "base-1",
    shapes: Shapes = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Store a vector as a fine-tune does. Returns the dense vector (D,) float64."""
    store, task = Store(experiment.store), experiment.tasks[index]
    mask, mask_id = mask_of(kind, index, shapes), "shared" if kind == "shared" else task.name
    if mask is not None and not store.exists(f"masks/{mask_id}/mask.safetensors"):
        records.commit(
            store,
            mask_prefix(mask_id),
            identity=mask_identity(experiment, [task]),
            metrics=MaskMetrics(kept=mask.kept, total=len(mask.bits)),
            files={MASK: mask.to_bytes()},
            parents={"mask": mask.fingerprint},
        )
    values = values_of(shapes, seed=index if seed is None else seed, dtype=dtype)
    records.commit(
        store,
        vector_prefix(task.name),
        identity=vector_identity(experiment, task),
        files={VECTOR: vector_data(task.name, values, mask, mask_id, base)},
        parents={} if mask is None else {"mask": mask.fingerprint},
    )
    return flat(values, mask)


def filled(folder: Path, kind: str, count: int = COUNT) -> tuple[Experiment, Tensor]:
    """A store with all vectors, and V (D, T) float64; every second vector is bfloat16."""
    experiment = experiment_in(str(folder), kind, count)
    columns = [commit(experiment, kind, i, dtype=DTYPES["both"][i % 2]) for i in range(count)]
    return experiment, torch.stack(columns, dim=1)


def coordinates(kind: str, V: Tensor) -> Tensor:
    mask = mask_of(kind, 0)
    return V[mask.bits] if mask is not None and kind == "shared" else V


def versions_of(experiment: Experiment, tasks: Sequence[int] | None = None) -> list[VectorVersion]:
    """The present versions of the vectors of all or some tasks."""
    names = experiment.task_names
    chosen = names if tasks is None else [names[i] for i in tasks]
    vectors = vectors_of(experiment, chosen)
    return [VectorVersion.of(vectors[name]) for name in chosen]


@dataclass
class Several:
    """Several shares in the role of one: their results for segments are put one after the other."""

    shares: list[CoordinateShard]

    @classmethod
    def of(cls, experiment: Experiment, count: int) -> "Several":
        return cls([CoordinateShard(experiment, n, count) for n in range(count)])

    def fetch(self, versions: Versions) -> dict[str, VectorError]:
        failed: dict[str, VectorError] = {}
        for share in self.shares:
            failed |= share.fetch(versions)
        return failed

    def rows(self, versions: Versions, new: int) -> Tensor:
        return torch.cat([s.rows(versions, new) for s in self.shares])

    def atoms_gram(self, source: str | None, versions: Versions) -> Tensor:
        return torch.cat([s.atoms_gram(source, versions) for s in self.shares])

    def write(
        self,
        outputs: Outputs,
        versions: Versions,
        source: str | None = None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FilesByFolder:
        written: FilesByFolder = {folder: {} for folder, _ in outputs}
        for share in self.shares:
            for folder, files in share.write(outputs, versions, source, tags).items():
                written[folder] |= files
        return written

    def cache(self) -> CacheUse:
        caches = [share.cache() for share in self.shares]
        return CacheUse(caches[0].kind, sum(cache.bytes for cache in caches))

    def layout(self, versions: Versions) -> Layout:
        return self.shares[-1].layout(versions)


def weights_of(rows: int, *sizes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"basis/m{m}": torch.randn(rows, m, dtype=torch.float64, generator=generator) for m in sizes
    }


# Inner products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_inner_products_by_segment(tmp_path: Path, kind: str) -> None:
    experiment, V = filled(tmp_path, kind)
    shard, known, S = CoordinateShard(experiment), versions_of(experiment), coordinates(kind, V)
    for new in (5, 1, 2):
        rows = shard.rows(known, new)
        assert rows.shape == (4, new, COUNT) and rows.dtype == torch.float64
        for number, part in enumerate(S.split(SEGMENT)):
            expected = part.T @ part
            norms = expected.diagonal().sqrt()
            error = (rows[number] - expected[COUNT - new :]).abs() / torch.outer(
                norms[COUNT - new :], norms
            )
            assert (error < 1e-6).all()
    whole = shard.rows(known, COUNT)
    assert torch.equal(whole, whole.transpose(1, 2)) and close_to(whole.sum(dim=0), V.T @ V, 3e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_shares_order_batches_and_cache_change_no_bit(tmp_path: Path, kind: str) -> None:
    experiment, _ = filled(tmp_path, kind)
    expected = CoordinateShard(experiment).rows(versions_of(experiment), COUNT)
    for cache, count, batches in (
        ("memory", 1, [[0], [1], [2], [3], [4]]),
        ("disk", 1, [[4], [2, 0], [3, 1]]),
        ("memory", 2, [[3, 1, 4], [0, 2]]),
        ("disk", 3, [[4], [3], [2], [1], [0]]),
        ("auto", 4, [[1, 2, 3, 4, 0]]),
        ("memory", 5, [[0, 1, 2, 3], [4]]),
    ):
        asked = experiment_in(str(tmp_path), kind, resources={"cache": cache})
        shards, order = Several.of(asked, count), []
        found = torch.full((4, COUNT, COUNT), torch.nan, dtype=torch.float64)
        for batch in batches:
            order += batch
            rows = shards.rows(versions_of(asked, order), len(batch))
            for position, t in enumerate(batch):
                found[:, t, order], found[:, order, t] = rows[:, position], rows[:, position]
        assert torch.equal(found, expected)
        assert shards.cache().kind == ("disk" if cache == "disk" else "memory")


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_what_is_stored_on_the_share(tmp_path: Path, kind: str) -> None:
    experiment, V = filled(tmp_path, kind)
    kept = [
        int(mask.bits.sum()) if mask is not None else len(V)
        for mask in (mask_of(kind, i) for i in range(COUNT))
    ]
    values = sum(count * (2 if i % 2 else 4) for i, count in enumerate(kept))
    bits = COUNT * -(-len(V) // 8) if kind == "per-task" else 0
    for count in (1, 3):
        shards = Several.of(experiment, count)
        assert shards.cache() == CacheUse() and shards.fetch(versions_of(experiment)) == {}
        assert shards.cache() == CacheUse("memory", values + bits)


def test_each_vector_is_fetched_once(tmp_path: Path) -> None:
    experiment, V = filled(tmp_path, "shared")
    shard, known = CoordinateShard(experiment), versions_of(experiment)
    assert shard.fetch(known) == {}
    Store(experiment.store).delete("vectors")
    assert shard.fetch(known) == {} and close_to(shard.rows(known, COUNT).sum(dim=0), V.T @ V)


# Bases --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_the_same_bytes_for_any_number_of_shares(tmp_path: Path, kind: str) -> None:
    experiment, V = filled(tmp_path, kind)
    store, known, outputs = (
        Store(experiment.store),
        versions_of(experiment),
        weights_of(COUNT, 1, 2, 4),
    )
    made = []
    for cache, count in (("memory", 1), ("disk", 2), ("memory", 3)):
        asked = experiment_in(str(tmp_path), kind, resources={"cache": cache})
        infos = write_bases(store, Several.of(asked, count), outputs, known)
        assert all(
            info == FileInfo.of(store.read(f"{folder}/{name}"))
            for folder, files in infos.items()
            for name, info in files.items()
        )
        made.append({key: store.read(key) for key in store.keys("basis")})
        if count < 3:
            store.delete("basis")
    assert made[0] == made[1] == made[2] and len(made[0]) >= 3 * 5
    for folder, B in outputs.items():
        torch.testing.assert_close(
            glued(store, folder), coordinates(kind, V) @ B, rtol=1e-5, atol=1e-5
        )
        basis = StoredBasis(store, folder)
        assert (basis.mask is not None) == (kind == "shared") and basis.parameters == SHAPES


@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_the_numbers_that_one_pass_over_the_files_gives(
    tmp_path: Path, kind: str
) -> None:
    experiment, _ = filled(tmp_path / "store", kind)
    store, outputs, known = Store(experiment.store), weights_of(COUNT, 3), versions_of(experiment)
    write_bases(store, Several.of(experiment, 3), outputs, known)
    paths = [store.where(vector_key(t)) for t in experiment.task_names]
    write_combinations(paths, outputs, str(tmp_path / "made"))
    assert torch.equal(glued(store, "basis/m3"), glued(Store(str(tmp_path / "made")), "basis/m3"))


@pytest.mark.parametrize("rest", [1, 2, 17])
def test_a_last_share_of_few_coordinates_changes_no_bit(tmp_path: Path, rest: int) -> None:
    """The width of the buffers must not matter."""
    experiment, shapes = experiment_in(str(tmp_path), "dense"), Shapes(a=(2 * SEGMENT + rest,))
    for index in range(COUNT):
        commit(experiment, "dense", index, shapes=shapes)
    store, known, outputs = (
        Store(experiment.store),
        versions_of(experiment),
        weights_of(COUNT, 2, 3),
    )
    write_bases(store, CoordinateShard(experiment), weights_of(COUNT, 4), known)
    grams, files = [], []
    for count in (1, 2, 3):
        shards = Several.of(experiment, count)
        files.append(shards.write(list(outputs.items()), known))
        grams.append((shards.rows(known, COUNT), shards.atoms_gram("basis/m4", known)))
    assert files[0] == files[1] == files[2]
    assert all(torch.equal(a, b) for gram in grams[1:] for a, b in zip(gram, grams[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_atoms_are_a_stored_basis_and_vectors(tmp_path: Path, kind: str) -> None:
    """The Gram matrix of [S N], and the basis that is written from it."""
    experiment, V = filled(tmp_path, kind)
    store, known = Store(experiment.store), versions_of(experiment)
    write_bases(store, CoordinateShard(experiment), weights_of(3, 2), known[:3])
    S = glued(store, "basis/m2")
    A = torch.cat([S, coordinates(kind, V[:, 3:])], dim=1)
    mix = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grams, files = [], []
    for count in (1, 2, 3):
        shards = Several.of(experiment, count)
        grams.append(shards.atoms_gram("basis/m2", known[3:]))
        files.append(write_bases(store, shards, {"basis/next": mix}, known[3:], "basis/m2"))
        assert torch.equal(grams[-1], grams[0]) and files[-1] == files[0]
    assert grams[0].shape == (4, 4, 4) and close_to(grams[0].sum(dim=0), A.T @ A)
    torch.testing.assert_close(glued(store, "basis/next"), A @ mix, rtol=1e-5, atol=1e-5)


def test_atoms_without_a_basis_are_the_vectors(tmp_path: Path) -> None:
    experiment, V = filled(tmp_path, "shared")
    found = Several.of(experiment, 2).atoms_gram(None, versions_of(experiment, [1, 4]))
    assert close_to(found.sum(dim=0), V[:, [1, 4]].T @ V[:, [1, 4]])


@pytest.mark.s3
def test_in_a_bucket(s3_environment: str) -> None:
    experiment = experiment_in(f"{s3_environment}/one", "per-task", count=2)
    shapes = Shapes(w=(SEGMENT + BLOCK + 3,))
    V = torch.stack([commit(experiment, "per-task", i, shapes=shapes) for i in range(2)], dim=1)
    shards, known, B = Several.of(experiment, 2), versions_of(experiment), weights_of(2, 1)
    assert close_to(shards.rows(known, 2).sum(dim=0), V.T @ V)
    store = Store(experiment.store)
    write_bases(store, shards, B, known)
    torch.testing.assert_close(glued(store, "basis/m1"), V @ B["basis/m1"], rtol=1e-5, atol=1e-5)


# Vectors that cannot be used ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "bad", "damage"),
    [
        *(
            ("dense", 0, damage)
            for damage in ("value", "last byte", "header", "cut", "stub", "empty", "gone")
        ),
        *(("shared", 0, damage) for damage in ("value", "header", "cut")),
        ("shared", 2, "value"),
        ("shared", 1, "empty"),
        *(("per-task", 0, damage) for damage in ("value", "header", "gone")),
        ("per-task", 2, "last byte"),
    ],
)
def test_a_damaged_vector_is_reported_and_the_others_are_usable(
    tmp_path: Path, kind: str, bad: int, damage: str
) -> None:
    """This holds for the first vector too, with which the others are compared."""
    experiment, V = filled(tmp_path, kind, 3)
    store, known, task = (
        Store(experiment.store),
        versions_of(experiment),
        experiment.task_names[bad],
    )
    key = vector_key(task)
    if damage in ("value", "last byte", "header"):
        flip(store, key, {"value": store.size(key) // 2, "last byte": -1, "header": 40}[damage])
    elif damage == "gone":
        store.delete(key)
    else:
        truncate(store, key, {"cut": -4, "stub": 5, "empty": 0}[damage])
    shards = Several.of(experiment, 2)
    failed = shards.fetch(known)
    assert list(failed) == [task] and key in str(failed[task])
    with pytest.raises(VectorError, match=key):
        shards.rows(known, 1)
    good = [i for i in range(3) if i != bad]
    rows = shards.rows([known[i] for i in good], 2)
    assert close_to(rows.sum(dim=0), V[:, good].T @ V[:, good])
    commit(experiment, kind, bad, dtype=DTYPES["both"][bad % 2])
    assert shards.fetch(known) == {} and close_to(shards.rows(known, 3).sum(dim=0), V.T @ V)


def test_a_damaged_header_that_lies_in_another_share_is_found(tmp_path: Path) -> None:
    """Vectors of three parts of 4 MiB: the second share reads none of the first part."""
    experiment, shapes = experiment_in(str(tmp_path), "dense", count=2), Shapes(a=(17 * SEGMENT,))
    for index in range(2):
        commit(experiment, "dense", index, shapes=shapes)
    store, known = Store(experiment.store), versions_of(experiment)
    data = store.read(vector_key(known[0].task))
    flip(store, vector_key(known[0].task), data.index(b'"a"') + 1)
    shard = CoordinateShard(experiment, 1, 2)
    failed = shard.fetch(known)
    assert list(failed) == [known[0].task] and shard.fetch(known[1:]) == {}


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone", "other"])
def test_a_damaged_mask_is_reported_with_its_vector(tmp_path: Path, damage: str) -> None:
    experiment, V = filled(tmp_path, "per-task", 3)
    store, known, task = Store(experiment.store), versions_of(experiment), experiment.task_names[0]
    key = f"masks/{task}/mask.safetensors"
    if damage == "flipped":
        flip(store, key, -1000)
    elif damage == "gone":
        store.delete(key)
    elif damage == "other":
        store.write(key, random_mask(SHAPES, 77, DENSITY).to_bytes())
    else:
        truncate(store, key, {"cut": -1, "empty": 0}[damage])
    shard = CoordinateShard(experiment)
    failed = shard.fetch(known)
    assert list(failed) == [task] and key in str(failed[task])
    assert close_to(shard.rows(known[1:], 2).sum(dim=0), V[:, 1:].T @ V[:, 1:])


@pytest.mark.parametrize("stranger", [0, 2])
def test_a_vector_of_another_base_is_named(tmp_path: Path, stranger: int) -> None:
    """Vectors are compared with the record of the pretrained model, whichever is stored first."""
    experiment, _ = filled(tmp_path, "shared", 3)
    records.commit(Store(experiment.store), BASE, identity={}, parents={"fingerprint": "base-1"})
    commit(experiment, "shared", stranger, base="base-2")
    known, task = versions_of(experiment), experiment.task_names[stranger]
    failed = CoordinateShard(experiment).fetch(known)
    assert list(failed) == [task] and vector_key(task) in str(failed[task])
    assert "another pretrained model" in str(failed[task])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strange", ["base", "shapes"])
def test_vectors_that_do_not_belong_to_the_first_are_named_with_it(
    tmp_path: Path, kind: str, strange: str
) -> None:
    experiment, _ = filled(tmp_path, kind, 3)
    if strange == "base":
        commit(experiment, kind, 2, base="base-2")
    else:
        Store(experiment.store).delete(f"masks/{experiment.task_names[2]}")
        commit(
            experiment, "dense" if kind == "shared" else kind, 2, shapes={"visual.w": (1001, 500)}
        )
    first, task = experiment.task_names[0], experiment.task_names[2]
    failed = CoordinateShard(experiment).fetch(versions_of(experiment))
    assert list(failed) == [task]
    assert vector_key(first) in str(failed[task]) and vector_key(task) in str(failed[task])


def test_a_vector_that_was_made_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    experiment, V = filled(tmp_path, "shared")
    shards, before = Several.of(experiment, 2), versions_of(experiment)
    shards.rows(before, COUNT)
    size = shards.cache().bytes
    V[:, 2] = commit(experiment, "shared", 2, seed=55)
    known = versions_of(experiment)
    assert known != before and close_to(shards.rows(known, COUNT).sum(dim=0), V.T @ V)
    assert shards.cache().bytes == size
    failed = shards.fetch(before)  # the version with the old checksum no longer exists
    assert list(failed) == [known[2].task]
    assert vector_key(known[2].task) in str(failed[known[2].task])


def test_values_that_are_not_finite_are_those_of_one_vector(tmp_path: Path) -> None:
    """The row of a bad vector shows it: its product with itself is not finite."""
    experiment, V = filled(tmp_path, "dense")
    store, task = Store(experiment.store), experiment.tasks[3]
    values = values_of(SHAPES, seed=3)
    values["visual.b"][2, 2] = float("nan")
    records.commit(
        store,
        vector_prefix(task.name),
        identity={},
        files={"vector.safetensors": vector_data(task.name, values, None, "", "base-1")},
    )
    gram = CoordinateShard(experiment).rows(versions_of(experiment), COUNT).sum(dim=0)
    good = [0, 1, 2, 4]
    assert gram.diagonal().isnan().tolist() == [False, False, False, True, False]
    assert close_to(gram[good][:, good], V[:, good].T @ V[:, good])
