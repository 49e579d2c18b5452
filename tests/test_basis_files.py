"""Bases on disk, compared with products of vectors and weights in float64: files, index, reading by
ranges, and damaged files.
"""

import json
import posixpath
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from vector_files import (
    BIG,
    DTYPES,
    KINDS,
    SHAPES,
    common,
    flip,
    glued,
    metadata,
    paths_of,
    put_set,
    put_vector,
    random_mask,
    truncate,
    values_of,
)

from raytvb.errors import UserError, VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage import records
from raytvb.storage.basis_layout import INDEX, SEGMENT, Layout, file_columns, file_names
from raytvb.storage.basis_writer import write_combinations, write_pieces
from raytvb.storage.damage import DamagedError
from raytvb.storage.records import RECORD, FileInfo
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VectorFile
from raytvb.storage.verify import ALTERED, verify_records

SMALL = 2**16  # bytes of a file: files of three vectors then have 4096 coordinates


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def made(tmp_path: Path) -> Store:
    """The store in which bases are written."""
    return Store(str(tmp_path / "made"))


def weights_of(count: int, *sizes: int) -> dict[str, Tensor]:
    """Weights (count, M) float64 by name, with a zero here and there."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"basis/m{m}": torch.randn(count, m, dtype=torch.float64, generator=generator)
        for m in sizes
    }
    for weights in found.values():
        weights[weights.abs() < 0.1] = 0.0
    return found


def written(folder: str, files: dict[str, dict[str, FileInfo]]) -> list[str]:
    """Checksums of the pieces in their order; a basis that is written again has other names."""
    return [info.sha256 for _, info in sorted(files[folder].items())]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_bases_are_the_products_of_vectors_and_weights(
    store: Store, made: Store, kind: str, dtypes: str
) -> None:
    keys, V = put_set(store, kind, dtypes=DTYPES[dtypes])
    outputs = weights_of(5, 1, 3, 5)
    files = write_combinations(paths_of(store, keys), outputs, made.url)
    assert files.keys() == outputs.keys()
    for folder, B in outputs.items():
        S = common(kind, V) @ B
        torch.testing.assert_close(glued(made, folder), S, rtol=1e-5, atol=1e-5)
        basis = StoredBasis(made, folder)
        assert (basis.size, basis.count) == (B.shape[1], len(S)) and basis.parameters == SHAPES
        torch.testing.assert_close(
            load(made.read(f"{folder}/coefficients.safetensors"))["B"], B, rtol=0, atol=0
        )
        record = records.find(made, folder)
        assert record is not None
        for name, info in record.files.items():
            assert info == FileInfo.of(made.read(f"{folder}/{name}"))
        for name, info in files[folder].items():
            assert record.files[name] == info
        assert set(record.files) == {*files[folder], INDEX, "coefficients.safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_bounded_and_tensors_are_cut(
    store: Store, made: Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.storage.basis_layout._FILE_BYTES", SMALL)
    keys, V = put_set(store, kind, BIG, count=4)
    outputs = weights_of(4, 1, 3, 4)
    write_combinations(paths_of(store, keys), outputs, made.url)
    for folder, B in outputs.items():
        S = common(kind, V, BIG) @ B
        basis = StoredBasis(made, folder)
        assert len(basis.files) == -(-len(S) // file_columns(B.shape[1])) > 3
        assert [f"{folder}/{n}" for n in file_names(B.shape[1], len(S))] == basis.files
        for key in basis.files:
            assert made.size(key) <= SMALL + 1000
        torch.testing.assert_close(glued(made, folder), S, rtol=1e-5, atol=1e-5)
        end = 0
        for key in basis.files:  # a file says which coordinates it has
            data = made.read(key)
            start, stop = json.loads(metadata(data)["raytvb"])["coordinates"]
            assert (
                start == end
                and sum(t.numel() for t in load(data).values()) == (stop - start) * B.shape[1]
            )
            end = stop
        assert end == len(S)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20, 100, 1000])
def test_no_file_lies_across_a_border_of_segments(size: int) -> None:
    """Writers share a basis by segments, and names say how many files there are in all."""
    columns = file_columns(size)
    assert SEGMENT % columns == 0 and SEGMENT % BLOCK == 0
    assert 4 * size * columns <= 32 * 2**20
    for count in (1, columns, columns + 1, 5 * columns):
        names = file_names(size, count)
        assert len(names) == -(-count // columns) and names == sorted(names)


def test_all_are_made_in_one_pass(
    store: Store, made: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, V = put_set(store, "shared", BIG)
    read, read_into = list[int](), VectorFile.read_into

    def counted(self: VectorFile, start: int, out: Tensor) -> None:
        read.append(len(out))
        read_into(self, start, out)

    monkeypatch.setattr(VectorFile, "read_into", counted)
    write_combinations(paths_of(store, keys), weights_of(5, 1, 2, 3, 4), made.url)
    assert sum(read) == 5 * len(common("shared", V, BIG))


def test_merges_are_columns(store: Store, made: Store) -> None:
    """K merges of the same vectors: additions of subsets and a negation."""
    keys, V = put_set(store, "mixed")
    merges = torch.tensor(
        [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, -1]], dtype=torch.float64
    ).T
    write_combinations(paths_of(store, keys), {"merges": merges}, made.url)
    S = glued(made, "merges")
    torch.testing.assert_close(S, V @ merges, rtol=1e-5, atol=1e-5)
    assert torch.equal(S[:, 2], -V[:, 4])


@pytest.mark.parametrize("kind", ["dense", "shared", "per-task"])
def test_the_bits_of_a_basis_do_not_depend_on_the_others(
    store: Store, made: Store, kind: str
) -> None:
    keys, _ = put_set(store, kind, BIG, count=4)
    paths, outputs = paths_of(store, keys), weights_of(4, 1, 2, 3, 4)
    together = write_combinations(paths, outputs, made.url)
    backwards = write_combinations(paths, dict(reversed(outputs.items())), made.url)
    for folder, B in outputs.items():
        alone = write_combinations(paths, {folder: B}, made.url)
        assert written(folder, alone) == written(folder, together) == written(folder, backwards)


@pytest.mark.parametrize("rest", [0, 1, 2, 4095])
def test_the_bits_of_a_basis_do_not_depend_on_the_width_of_the_blocks(
    made: Store, rest: int
) -> None:
    """Writers that share a basis have other blocks. The hard case is a last block of a single
    column.
    """
    count = 2 * BLOCK + rest
    V = torch.randn(12, count, generator=torch.Generator().manual_seed(0))
    layout = Layout("base", {"a": (count,)}, {"a": (count,)})

    def cut(width: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, count, width):
            yield start, V[:, start : start + width].contiguous()

    found = [
        write_pieces(cut(width), list(weights_of(12, 1, 2, 3, 12).items()), layout, made, count)
        for width in (BLOCK, 2 * BLOCK, 3 * BLOCK)
    ]
    assert found[0] == found[1] == found[2]


def test_the_mask_that_all_share_travels(store: Store, made: Store) -> None:
    keys, _ = put_set(store, "shared")
    write_combinations(paths_of(store, keys), weights_of(5, 2), made.url)
    store.delete("masks")
    basis, mask = StoredBasis(made, "basis/m2"), random_mask(SHAPES, 99)
    assert (
        basis.mask is not None
        and torch.equal(basis.mask.load().bits, mask.bits)
        and basis.count == mask.kept
    )
    info = json.loads(metadata(made.read(basis.files[0]))["raytvb"])
    assert (
        made.exists(posixpath.normpath(f"basis/m2/{info['mask']}"))
        and info["mask_fingerprint"] == mask.fingerprint
    )


@pytest.mark.parametrize("kind", ["dense", "per-task", "mixed"])
def test_without_a_common_mask_all_entries_are_coordinates(
    store: Store, made: Store, kind: str
) -> None:
    keys, V = put_set(store, kind)
    write_combinations(paths_of(store, keys), weights_of(5, 2), made.url)
    basis = StoredBasis(made, "basis/m2")
    assert basis.mask is None and basis.count == len(V) and not made.keys("masks")
    shapes = {n: (2, *s) for n, s in SHAPES.items()}
    assert {n: tuple(t.shape) for n, t in load(made.read(basis.files[0])).items()} == shapes


@pytest.mark.s3
def test_from_a_bucket_into_a_bucket(s3_environment: str, store: Store, made: Store) -> None:
    remote = Store(f"{s3_environment}/experiments/one")
    put_set(remote, "shared", BIG, count=3)
    keys, V = put_set(store, "shared", BIG, count=3)
    outputs = weights_of(3, 1, 2)
    files = write_combinations(paths_of(remote, keys), outputs, f"{s3_environment}/made")
    there = Store(f"{s3_environment}/made")
    for folder, B in outputs.items():
        torch.testing.assert_close(
            glued(there, folder), common("shared", V, BIG) @ B, rtol=1e-5, atol=1e-5
        )
        assert StoredBasis(there, folder).size == B.shape[1]
    assert files == write_combinations(paths_of(store, keys), outputs, made.url)


# Records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "obstacle", ["basis-00001-of-00001.safetensors", INDEX, "coefficients.safetensors"]
)
def test_a_pass_that_fails_leaves_no_record(store: Store, made: Store, obstacle: str) -> None:
    """A folder lies where a file must be written."""
    paths, outputs = paths_of(store, put_set(store, "dense")[0]), weights_of(5, 3, 2)
    made.write(f"basis/m2/{obstacle}/in-the-way", b"")
    with pytest.raises(StoreError, match=rf"basis/m2/{obstacle}"):
        write_combinations(paths, outputs, made.url)
    assert not made.exists("basis/m2/record.json")
    assert made.exists("basis/m3/record.json") == (obstacle != "basis-00001-of-00001.safetensors")


class Full(Store):
    """A store whose disk is full after some more writes. Deletions still work."""

    left: int | None = None

    def write(self, key: str, data: bytes) -> None:
        if self.left is not None:
            if self.left == 0:
                raise StoreError(f"cannot write {self.where(key)}: no space left")
            self.left -= 1
        super().write(key, data)


def test_a_pass_that_fails_at_any_write_leaves_the_basis_that_was_there(
    store: Store, made: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after any number of writes, then again has room."""
    monkeypatch.setattr("raytvb.storage.basis_layout._FILE_BYTES", 2**18)
    keys, V = put_set(store, "shared", BIG, count=3)
    V, paths = common("shared", V, BIG), paths_of(store, keys)
    old, new = weights_of(3, 3)["basis/m3"], weights_of(3, 2)["basis/m2"]
    write_combinations(paths, {"basis/one": old}, made.url)
    before = {key: made.read(key) for key in made.keys()}
    steps = len(file_names(2, len(V))) + 4  # pieces, mask, index, coefficients, record
    for left in range(steps):
        monkeypatch.setattr(Full, "left", left)
        monkeypatch.setattr("raytvb.storage.basis_writer.Store", Full)
        with pytest.raises(StoreError, match="no space left"):
            write_combinations(paths, {"basis/one": new}, made.url)
        after = {key: made.read(key) for key in made.keys()}
        assert after.items() >= before.items()
        torch.testing.assert_close(glued_rows(made, "basis/one"), V @ old, rtol=1e-5, atol=1e-5)
        if left < steps - 4:  # in the pass itself, what was written is taken back
            assert after == before
    monkeypatch.setattr(Full, "left", steps)
    write_combinations(paths, {"basis/one": new}, made.url)
    torch.testing.assert_close(glued(made, "basis/one"), V @ new, rtol=1e-5, atol=1e-5)
    record = records.find(made, "basis/one")
    assert record is not None
    assert {f"basis/one/{n}" for n in (*record.files, RECORD)} == set(made.keys("basis"))


def glued_rows(store: Store, folder: str) -> Tensor:
    """The vectors (D, M) float64 of a basis as `StoredBasis` reads them, with their checksums."""
    return torch.cat([rows for _, rows in StoredBasis(store, folder).blocks()], dim=1).T.double()


def test_old_files_that_could_not_be_deleted_do_no_harm(
    store: Store, made: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is killed after the record leaves the new basis, and the old one's files."""
    keys, V = put_set(store, "dense")
    old, new, third = (weights_of(5, size)[f"basis/m{size}"] for size in (3, 2, 4))
    write_combinations(paths_of(store, keys), {"basis/one": old}, made.url)

    def killed(self: Store, key: str) -> None:
        raise StoreError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", killed)
        with pytest.raises(StoreError, match="killed"):
            write_combinations(paths_of(store, keys), {"basis/one": new}, made.url)
    torch.testing.assert_close(glued_rows(made, "basis/one"), V @ new, rtol=1e-5, atol=1e-5)
    write_combinations(paths_of(store, keys), {"basis/one": third}, made.url)
    torch.testing.assert_close(glued_rows(made, "basis/one"), V @ third, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("exists", [False, True])
def test_weights_that_are_not_finite_change_nothing(
    store: Store, made: Store, exists: bool, value: float
) -> None:
    """1e300 is finite in float64, but not in the float32 of the products."""
    keys, _ = put_set(store, "shared")
    good = weights_of(5, 2)
    if exists:
        write_combinations(paths_of(store, keys), good, made.url)
    before = {key: made.read(key) for key in made.keys()}
    bad = good["basis/m2"].clone()
    bad[3, 1] = value
    words = "basis/m2 would have NaN or infinite values in visual" if value == 1e300 else "1 of 10"
    with pytest.raises(VectorError, match=words):
        write_combinations(
            paths_of(store, keys), {"basis/m1": good["basis/m2"], "basis/m2": bad}, made.url
        )
    assert {key: made.read(key) for key in made.keys()} == before


def test_a_vector_that_is_not_finite_is_named_and_changes_nothing(
    store: Store, made: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.storage.basis_layout._FILE_BYTES", SMALL)
    keys, _ = put_set(store, "dense", BIG, count=3)
    write_combinations(paths_of(store, keys), weights_of(3, 2), made.url)
    before = {key: made.read(key) for key in made.keys()}
    values = values_of(BIG, seed=1)
    values["visual.weight"][-1, -1] = float("nan")  # in the last of many files
    keys[1] = put_vector(store, "suite/task-1", values)
    words = r"task-1/vector.safetensors has NaN or infinite values in visual.weight; make the vec"
    with pytest.raises(VectorError, match=words):
        write_combinations(paths_of(store, keys), weights_of(3, 2), made.url)
    assert {key: made.read(key) for key in made.keys()} == before


def test_a_damaged_vector_leaves_no_record(store: Store, made: Store) -> None:
    keys, _ = put_set(store, "dense")
    truncate(store, keys[-1], -4)
    with pytest.raises(VectorError, match="task-4"):
        write_combinations(paths_of(store, keys), weights_of(5, 1), made.url)
    assert made.keys() == []


def test_a_basis_is_replaced_by_one_of_another_size(
    store: Store, made: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.storage.basis_layout._FILE_BYTES", SMALL)
    keys, V = put_set(store, "dense", BIG, count=3)
    for size in (3, 1, 2):
        B = weights_of(3, size)[f"basis/m{size}"]
        write_combinations(paths_of(store, keys), {"basis/one": B}, made.url)
        torch.testing.assert_close(glued(made, "basis/one"), V @ B, rtol=1e-5, atol=1e-5)


def test_what_is_no_such_basis_is_not_replaced(store: Store) -> None:
    keys, _ = put_set(store, "dense")
    records.commit(store, "vectors/suite/task-0", identity={"task": "one"}, files={"head": b"1"})
    with pytest.raises(UserError, match="vectors/suite/task-0 belongs to another experiment"):
        write_combinations(paths_of(store, keys), {"vectors/suite/task-0": torch.eye(5)}, store.url)
    assert store.exists("vectors/suite/task-0/head") and store.exists(keys[0])


@pytest.mark.parametrize("shape", [(4, 2), (6, 2), (5, 0), (5,), (5, 2, 1)])
def test_weights_have_a_row_for_each_vector(
    store: Store, made: Store, shape: tuple[int, ...]
) -> None:
    paths = paths_of(store, put_set(store, "dense")[0])
    with pytest.raises(ValueError, match=r"weights of basis/odd must be \(5, M\)"):
        write_combinations(
            paths, {"basis/m1": torch.ones(5, 1), "basis/odd": torch.ones(shape)}, made.url
        )
    assert made.keys() == []


def test_vectors_that_do_not_belong_together_are_named(store: Store, made: Store) -> None:
    keys, _ = put_set(store, "dense")
    keys.append(put_vector(store, "stranger", values_of(SHAPES, seed=7), base="base-2"))
    with pytest.raises(VectorError, match=r"task-0/vector.*stranger/vector"):
        write_combinations(paths_of(store, keys), weights_of(6, 1), made.url)


# Reading ------------------------------------------------------------------------------------------


@pytest.fixture
def cut_basis(
    store: Store, made: Store, monkeypatch: pytest.MonkeyPatch
) -> tuple[StoredBasis, Tensor]:
    """A basis of many files, and its vectors S (D, 3) float64 as the files hold them."""
    monkeypatch.setattr("raytvb.storage.basis_layout._FILE_BYTES", SMALL)
    keys, _ = put_set(store, "per-task", BIG, count=4)
    write_combinations(paths_of(store, keys), weights_of(4, 3), made.url)
    return StoredBasis(made, "basis/m3"), glued(made, "basis/m3")


def test_blocks_are_files_in_their_order(cut_basis: tuple[StoredBasis, Tensor]) -> None:
    basis, S = cut_basis
    columns = file_columns(3)
    found = list(basis.blocks())
    assert [start for start, _ in found] == list(range(0, basis.count, columns)) and len(
        found
    ) == len(basis.files)
    assert torch.equal(torch.cat([rows for _, rows in found], dim=1).double(), S.T)
    part = list(basis.blocks(2 * columns, 5 * columns))
    assert [start for start, _ in part] == [2 * columns, 3 * columns, 4 * columns]
    assert torch.equal(
        torch.cat([rows for _, rows in part], dim=1).double(), S.T[:, 2 * columns : 5 * columns]
    )


def test_any_range_can_be_read_across_files(cut_basis: tuple[StoredBasis, Tensor]) -> None:
    basis, S = cut_basis
    columns, rng = file_columns(3), np.random.default_rng(0)
    ranges = [
        (0, basis.count),
        (0, 0),
        (basis.count, basis.count),
        (columns - 1, columns + 1),
        (columns, 2 * columns),
        (5, 3 * columns + 7),
        (basis.count - 1, basis.count),
        *np.sort(rng.integers(0, basis.count + 1, (20, 2))).tolist(),
    ]
    for start, stop in ranges:
        out = torch.full((5, stop - start), 7.0)
        basis.read_into(start, out[1:4])
        assert (
            torch.equal(out[1:4].double(), S.T[:, start:stop])
            and (out[0] == 7).all()
            and (out[4] == 7).all()
        )
    for start, width in ((basis.count - 1, 2), (-1, 2), (basis.count + 8, 0)):
        with pytest.raises(ValueError, match="basis/m3 has 210313 coordinates"):
            basis.read_into(start, torch.empty(3, width))


def test_combinations_of_basis_vectors(
    cut_basis: tuple[StoredBasis, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    basis, S = cut_basis
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights[:, 1] = 0.0
    for held in (4, 1):
        monkeypatch.setattr("raytvb.storage.vector_set.COMBINED_BYTES", 4 * basis.count * held)
        found = torch.stack([f.clone() for f in basis.combinations(weights)], dim=1)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), S @ weights, rtol=1e-5, atol=1e-5)


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [-1, 100, 7, 0])
def test_a_truncated_file_is_an_error_that_names_it(
    cut_basis: tuple[StoredBasis, Tensor], size: int
) -> None:
    basis, _ = cut_basis
    truncate(basis.store, basis.files[2], size)
    with pytest.raises(VectorError, match=rf"{basis.files[2]} is not as its record says"):
        list(basis.combinations(torch.ones(3, 1)))


@pytest.mark.parametrize("change", ["name", "shape", "size"])
def test_a_file_that_does_not_hold_what_the_index_says_is_an_error(
    cut_basis: tuple[StoredBasis, Tensor], change: str
) -> None:
    basis, _ = cut_basis
    data = basis.store.read(basis.files[1])
    ((name, values),) = load(data).items()
    changed = {
        "name": {"other": values},
        "shape": {name: values[:, :-8].contiguous()},
        "size": {name: values[:2]},
    }
    basis.store.write(basis.files[1], save(changed[change], metadata=metadata(data)))
    with pytest.raises(VectorError, match=rf"{basis.files[1]} is not as its record says"):
        basis.read_into(file_columns(3) + 8, torch.empty(3, 8))
    basis.store.delete(f"{basis.prefix}/record.json")
    with pytest.raises(VectorError, match=rf"{basis.files[1]} cannot be read"):
        StoredBasis(basis.store, basis.prefix).read_into(file_columns(3) + 8, torch.empty(3, 8))


def test_a_missing_file_is_an_error_that_names_it(cut_basis: tuple[StoredBasis, Tensor]) -> None:
    basis, _ = cut_basis
    basis.store.delete(basis.files[3])
    with pytest.raises(VectorError, match=rf"{basis.files[3]} is not as its .*: it is missing"):
        list(basis.blocks())


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"no json",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'"text"',
        b"null",
        b'{"metadata": {}}',
        b'{"metadata": {"raytvb": {}, "size": 1, "parameters": {}, "shapes": {}}}',
        b'{"metadata": {"raytvb": {"base": "b"}, "size": 1, "parameters": [], "shapes": {}}}',
        b'{"metadata": {"raytvb": {"base": "b"}, "size": 0, "parameters": {}, "shapes": {}}}',
    ],
)
def test_what_is_no_index_is_an_error_that_names_it(made: Store, index: bytes) -> None:
    made.write(f"basis/one/{INDEX}", index)
    problem = "(is not the index of a basis|cannot be read: it is not JSON)"
    with pytest.raises(VectorError, match=rf"basis/one/{INDEX} {problem}"):
        StoredBasis(made, "basis/one")


def test_a_missing_index_is_an_error_that_names_it(made: Store) -> None:
    with pytest.raises(FileNotFoundError, match=rf"basis/one/{INDEX}"):
        StoredBasis(made, "basis/one")


def test_a_missing_or_other_mask_is_an_error_that_names_it(store: Store, made: Store) -> None:
    keys, _ = put_set(store, "shared")
    write_combinations(paths_of(store, keys), weights_of(5, 2), made.url)
    (key,) = made.keys("masks")
    made.write(key, random_mask(SHAPES, 5).to_bytes())
    with pytest.raises(VectorError, match=rf"basis/m2 was made with another mask than .*{key}"):
        StoredBasis(made, "basis/m2")
    made.delete(key)
    with pytest.raises(FileNotFoundError, match=key):
        StoredBasis(made, "basis/m2")


def test_changed_numbers_are_found_by_their_checksums(
    cut_basis: tuple[StoredBasis, Tensor],
) -> None:
    """A reader compares each file with the record, and so does `verify`."""
    basis, _ = cut_basis
    flip(basis.store, basis.files[1], -1)
    with pytest.raises(DamagedError, match=f"{basis.files[1]} is not as its record says"):
        list(basis.blocks())
    findings, _ = verify_records(basis.store, ["basis/m3/record.json"])
    assert [(problem.key, problem.kind) for problem in findings.problems] == [
        (basis.files[1], ALTERED)
    ]


@pytest.mark.s3
def test_a_storage_that_fails_is_not_taken_for_damage(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an error may be temporary, so the caller tries again."""
    store = Store(f"{s3_environment}/one")
    keys, _ = put_set(store, "dense")
    write_combinations(paths_of(store, keys), weights_of(5, 2), store.url)
    basis = StoredBasis(store, "basis/m2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(
        StoreError, match=r"basis/m2/basis-00001-of-00001\.safetensors: wrong access key"
    ):
        list(basis.blocks())
