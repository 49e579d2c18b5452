"""Mask files: whole and from the middle, their counts, and the errors for damaged files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from vector_files import (
    BIG,
    SHAPES,
    metadata,
    put_mask,
    put_vector,
    random_mask,
    truncate,
    values_of,
)

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.masks import Mask, MaskFile, mask_intersections
from raytvb.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_a_mask_comes_back_whole_and_from_the_middle(store: Store) -> None:
    mask = random_mask(BIG, seed=4, density=0.1)
    total = 300 * 701 + 13
    file = MaskFile(store, put_mask(store, "big", mask))
    assert (
        total > 3 * BLOCK and file.total == total and file.kept == mask.kept == int(mask.bits.sum())
    )
    assert torch.equal(file.load().bits, mask.bits)
    rng = np.random.default_rng(0)
    starts = [
        0,
        8,
        BLOCK - 8,
        BLOCK,
        BLOCK + 8,
        3 * BLOCK,
        total - total % 8,
        *(8 * rng.integers(0, total // 8, 25)),
    ]
    for start in map(int, starts):
        assert file.kept_before(start) == int(mask.bits[:start].sum())
        for stop in (start, min(start + 1, total), min(start + 70_001, total), total):
            found = file.bits(start, stop)
            assert found.dtype == torch.bool and torch.equal(found, mask.bits[start:stop])
            packed = file.packed(start, stop)
            assert packed.dtype == torch.uint8 and len(packed) == -(-(stop - start) // 8)
    assert file.kept_before(total) == mask.kept  # no multiple of 8


@pytest.mark.parametrize("total", [1, 8, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_masks_of_any_length(store: Store, total: int) -> None:
    bits = torch.rand(total, generator=torch.Generator().manual_seed(total)) < 0.5
    file = MaskFile(store, put_mask(store, "one", Mask({"a": (total,)}, bits)))
    assert torch.equal(file.load().bits, bits) and file.kept_before(total) == file.kept == int(
        bits.sum()
    )


def test_a_mask_knows_its_tensors_and_its_fingerprint(store: Store) -> None:
    mask = random_mask(SHAPES, seed=4)
    file = MaskFile(store, put_mask(store, "one", mask))
    loaded = file.load()
    assert (
        list(loaded.shapes) == sorted(SHAPES)
        and loaded.shapes == SHAPES
        and torch.equal(loaded.bits, mask.bits)
    )
    assert torch.equal(torch.cat([t.reshape(-1) for t in mask.tensors().values()]), mask.bits)
    assert all(
        torch.equal(t, loaded.tensors()[n]) and t.shape == SHAPES[n]
        for n, t in mask.tensors().items()
    )
    assert (
        file.fingerprint
        == loaded.fingerprint
        == mask.fingerprint
        == random_mask(SHAPES, seed=4).fingerprint
    )
    other = Mask(mask.shapes, mask.bits.clone())
    other.bits[0] = ~other.bits[0]
    renamed = Mask({n + "x": s for n, s in mask.shapes.items()}, mask.bits)
    assert len({mask.fingerprint, other.fingerprint, renamed.fingerprint}) == 3


def test_a_damaged_mask_is_not_loaded(store: Store) -> None:
    mask = random_mask(SHAPES, seed=4)
    data = bytearray(mask.to_bytes())
    data[-1] ^= 1  # the bits are the last tensor of the file
    store.write("mask.safetensors", bytes(data))
    with pytest.raises(VectorError, match="damaged"):
        MaskFile(store, "mask.safetensors").load()


@pytest.mark.parametrize("number", [0, 2, 3])
def test_damaged_counts_are_an_error_that_names_the_file(store: Store, number: int) -> None:
    """The counts say where the values of a block begin."""
    data = random_mask(BIG, seed=4).to_bytes()
    tensors = load(data)
    tensors["block_counts"][number] += 1
    store.write("mask.safetensors", save(tensors, metadata=metadata(data)))
    with pytest.raises(VectorError, match=r"mask\.safetensors.*counts.*damaged"):
        MaskFile(store, "mask.safetensors")


@pytest.mark.parametrize("size", [-1, -5000, 100, 8, 7, 0])
def test_a_truncated_mask_is_an_error_that_names_it(store: Store, size: int) -> None:
    key = put_mask(store, "one", random_mask(BIG, seed=4))
    truncate(store, key, size)
    with pytest.raises(VectorError, match=r"masks/one/mask\.safetensors is not a whole"):
        MaskFile(store, key)


def test_another_file_in_the_place_of_a_mask_is_an_error_that_names_it(store: Store) -> None:
    key = put_vector(store, "one", values_of(SHAPES, seed=0))
    with pytest.raises(VectorError, match=r"vectors/one/vector\.safetensors is not a mask file"):
        MaskFile(store, key)


def test_intersections_of_masks_are_counted_over_the_whole_length(store: Store) -> None:
    """Masks that go beyond the end of a block of 65,536, and of the 16 blocks that are read
    together.
    """
    total = 16 * 65536 + 70_003
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(total, generator=generator) < d for d in (0.1, 0.1, 0.9, 0.5)]
    for number, bits in enumerate(masks):
        store.write(f"{number}.safetensors", Mask({"a": (total,)}, bits).to_bytes())
    found = mask_intersections([MaskFile(store, f"{n}.safetensors") for n in range(4)])
    assert found.tolist() == [[int((a & b).sum()) for b in masks] for a in masks]
    store.write("other.safetensors", Mask({"a": (9,)}, torch.ones(9, dtype=torch.bool)).to_bytes())
    with pytest.raises(VectorError, match="different numbers of parameters"):
        mask_intersections([MaskFile(store, "0.safetensors"), MaskFile(store, "other.safetensors")])
