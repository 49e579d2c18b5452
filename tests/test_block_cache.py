"""The local copy of vectors: the values it returns, its checks, and the bytes that it holds."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vector_files import (
    BIG,
    DTYPES,
    Shapes,
    flat,
    flip,
    put_set,
    put_vector,
    random_mask,
    truncate,
    values_of,
)

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.block_cache import BlockCache
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.records import PART, FileInfo
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.vectors import VectorFile

PLACES = ("memory", "disk")
D = 300 * 701 + 13  # of BIG
# [start, stop): all, the middle, the rest with a last block that is no multiple of 8, a single
# block, none
SHARES = [(0, D), (BLOCK, 3 * BLOCK), (2 * BLOCK, D), (0, BLOCK), (D, D)]
LONG: Shapes = {"a": (3_000_000,), "b": (1000,)}  # 12 MB: three parts, the last one small


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def cache_in(
    place: str, folder: Path, start: int, stop: int, *, own_masks: bool = False
) -> BlockCache:
    return BlockCache(
        start, stop, own_masks=own_masks, folder=None if place == "memory" else str(folder)
    )


def add(cache: BlockCache, store: Store, key: str) -> None:
    """Add a vector as a shard does, with the checksums recorded when the file was whole."""
    cache.add(key, VectorFile(store, key), FileInfo.of(store.read(key)))


def ranges_of(start: int, stop: int, seed: int = 0) -> list[tuple[int, int]]:
    """Ranges within a share that start at multiples of 8."""
    rng = np.random.default_rng(seed)
    firsts = start + 8 * rng.integers(0, (stop - start) // 8 + 1, 12)
    widths = rng.integers(0, BLOCK + 1, 12)
    blocks = [(a, min(a + BLOCK, stop)) for a in range(start, stop, BLOCK)]
    return [
        *blocks,
        (start, stop),
        *((int(a), min(int(a + w), stop)) for a, w in zip(firsts, widths, strict=True)),
    ]


@pytest.mark.parametrize(("start", "stop"), SHARES)
@pytest.mark.parametrize("kind", ["dense", "per-task", "mixed"])
def test_it_gives_the_vectors_on_its_share(
    store: Store, tmp_path: Path, kind: str, start: int, stop: int
) -> None:
    keys, V = put_set(store, kind, BIG, count=4, dtypes=DTYPES["both"])
    caches = [cache_in(place, tmp_path, start, stop, own_masks=kind != "dense") for place in PLACES]
    for key in keys:
        for cache in caches:
            assert key not in cache
            add(cache, store, key)
            assert key in cache
    store.delete("vectors")  # nothing is fetched twice
    store.delete("masks")
    for t, key in enumerate(keys):
        for first, last in ranges_of(start, stop, seed=t):
            for cache in caches:
                found = cache.read(key, first, last)
                assert found.dtype == torch.float32 and torch.equal(found, V[first:last, t].float())


@pytest.mark.parametrize("place", PLACES)
def test_a_shared_mask_needs_no_bits(store: Store, tmp_path: Path, place: str) -> None:
    """Coordinates are the stored values."""
    keys, V = put_set(store, "shared", BIG, count=2)
    kept = V[random_mask(BIG, 99).bits]
    cache = cache_in(place, tmp_path, 0, len(kept))
    for key in keys:
        add(cache, store, key)
    assert torch.equal(cache.read(keys[1], 8, 30_003), kept[8:30_003, 1].float())
    assert cache.bytes == 2 * 4 * len(kept)


@pytest.mark.s3
def test_vectors_in_a_bucket(s3_environment: str, tmp_path: Path) -> None:
    store = Store(f"{s3_environment}/one")
    values = values_of(LONG, seed=0)
    key = put_vector(store, "long", values)
    cache = cache_in("disk", tmp_path, 16 * BLOCK, 40 * BLOCK)
    add(cache, store, key)
    assert torch.equal(
        cache.read(key, 20 * BLOCK, 40 * BLOCK), flat(values)[20 * BLOCK : 40 * BLOCK].float()
    )


# Checksums ----------------------------------------------------------------------------------------


def long_vector(store: Store) -> tuple[str, VectorFile, FileInfo, Tensor]:
    values = values_of(LONG, seed=0)
    key = put_vector(store, "long", values)
    info = FileInfo.of(store.read(key))
    assert len(info.parts) == 3
    return key, VectorFile(store, key), info, flat(values).float()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 3_001_000), (0, 16 * BLOCK), (16 * BLOCK, 32 * BLOCK), (32 * BLOCK, 3_001_000)],
)
def test_every_flipped_bit_of_the_share_is_found_and_the_file_named(
    store: Store, tmp_path: Path, place: str, start: int, stop: int
) -> None:
    key, vector, info, expected = long_vector(store)
    cache = cache_in(place, tmp_path, start, stop)
    low, high = vector.byte_range(start, stop)
    for position, bit in ((low, 0), (high - 1, 7), ((low + high) // 2, 3), (low + 1, 5)):
        flip(store, key, position, bit)
        with pytest.raises(
            VectorError,
            match=r"vectors/long/vector\.safetensors .*its contents have changed",
        ):
            cache.add(key, vector, info)
        assert key not in cache and cache.bytes == 0
        flip(store, key, position, bit)
    cache.add(key, vector, info)
    assert (
        torch.equal(cache.read(key, start, stop), expected[start:stop])
        and cache.bytes == high - low
    )


@pytest.mark.parametrize(
    ("start", "stop", "elsewhere"),
    [
        (0, 8 * BLOCK, [PART, 2 * PART, -1]),  # the first part
        (17 * BLOCK, 31 * BLOCK, [0, PART - 1, 2 * PART, -1]),  # inside of the second
        (33 * BLOCK, 3_001_000, [0, 8, PART, 2 * PART - 1]),
    ],
)  # the third
def test_what_lies_in_other_parts_is_not_read(
    store: Store, tmp_path: Path, start: int, stop: int, elsewhere: list[int]
) -> None:
    key, vector, info, expected = long_vector(store)
    for position in elsewhere:
        flip(store, key, position)
    cache = cache_in("memory", tmp_path, start, stop)
    cache.add(key, vector, info)
    assert torch.equal(cache.read(key, start, stop), expected[start:stop])


@pytest.mark.parametrize("position", [0, 200, PART - 1, PART, 2 * PART + 1, -1])
def test_a_large_file_without_checksums_of_parts_is_checked_as_a_whole(
    store: Store, tmp_path: Path, position: int
) -> None:
    key, vector, info, expected = long_vector(store)
    cache = cache_in("memory", tmp_path, 16 * BLOCK, 17 * BLOCK)
    cache.add(key, vector, FileInfo(sha256=info.sha256, size=info.size))
    assert torch.equal(cache.read(key, 16 * BLOCK, 17 * BLOCK), expected[16 * BLOCK : 17 * BLOCK])
    flip(store, key, position)
    with pytest.raises(VectorError, match="vectors/long/vector"):
        cache.add(key, vector, FileInfo(sha256=info.sha256, size=info.size))


def test_a_small_file_is_checked_as_a_whole(store: Store, tmp_path: Path) -> None:
    keys, _ = put_set(store, "dense", BIG, count=1)
    vector, info = VectorFile(store, keys[0]), FileInfo.of(store.read(keys[0]))
    assert info.parts == ()
    cache = cache_in("memory", tmp_path, BLOCK, 2 * BLOCK)
    for position in (0, -1):
        flip(store, keys[0], position)
        with pytest.raises(VectorError, match="suite/task-0/vector"):
            cache.add(keys[0], vector, info)
        flip(store, keys[0], position)


def test_a_changed_header_is_found_from_any_share(store: Store) -> None:
    key, vector, info, _ = long_vector(store)
    flip(store, key, vector.data_start + PART)
    CheckedFile(vector.store, vector.key, info).check(0, vector.data_start)
    flip(store, key, 30)
    with pytest.raises(
        VectorError, match=r"vectors/long/vector\.safetensors is not as its record says"
    ):
        CheckedFile(vector.store, vector.key, info).check(0, vector.data_start)


@pytest.mark.parametrize(("start", "stop"), SHARES[:4])
def test_a_flipped_bit_of_a_mask_of_its_own_is_found_and_the_mask_named(
    store: Store, tmp_path: Path, start: int, stop: int
) -> None:
    """Damage the bits of a mask file. They are its last tensor, with D bits."""
    keys, V = put_set(store, "per-task", BIG, count=1)
    vector, info = VectorFile(store, keys[0]), FileInfo.of(store.read(keys[0]))
    mask, size = "masks/own-0/mask.safetensors", -(-D // 8)
    cache = cache_in("memory", tmp_path, start, stop, own_masks=True)
    for coordinate in (start, stop - 1, start + 12_345):
        flip(store, mask, coordinate // 8 - size, coordinate % 8)
        with pytest.raises(
            VectorError,
            match=r"masks/own-0/mask\.safetensors is not as .*: its bits and its counts differ",
        ):
            cache.add(keys[0], vector, info)
        assert keys[0] not in cache and cache.bytes == 0
        flip(store, mask, coordinate // 8 - size, coordinate % 8)
    cache.add(keys[0], vector, info)
    assert torch.equal(cache.read(keys[0], start, stop), V[start:stop, 0].float())


@pytest.mark.parametrize("place", PLACES)
def test_a_file_that_became_shorter_is_an_error_that_names_it(
    store: Store, tmp_path: Path, place: str
) -> None:
    key, vector, info, _ = long_vector(store)
    truncate(store, key, -4)
    cache = cache_in(place, tmp_path, 32 * BLOCK, 3_001_000)
    with pytest.raises(StoreError, match=r"vectors/long/vector\.safetensors"):
        cache.add(key, vector, info)
    assert key not in cache and cache.bytes == 0


# What is held -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_its_size_is_that_of_what_is_stored(store: Store, tmp_path: Path, place: str) -> None:
    """The cache holds kept values in their own dtype, and one bit for each coordinate for masks."""
    keys, _ = put_set(
        store, "mixed", BIG, count=4, dtypes=(torch.float32, torch.float32, torch.bfloat16)
    )
    cache = cache_in(place, tmp_path, BLOCK, 3 * BLOCK, own_masks=True)
    assert (cache.kind, cache.bytes) == (place, 0)
    bits = {t: random_mask(BIG, 100 + t // 2).bits[BLOCK : 3 * BLOCK] for t in (1, 3)}
    sizes = [
        4 * 2 * BLOCK,
        4 * int(bits[1].sum()) + 2 * BLOCK // 8,
        2 * 2 * BLOCK,
        4 * int(bits[3].sum()) + 2 * BLOCK // 8,
    ]
    for t, key in enumerate(keys):
        add(cache, store, key)
        assert cache.bytes == sum(sizes[: t + 1])


@pytest.mark.parametrize("place", PLACES)
def test_a_vector_that_was_dropped_can_come_again(store: Store, tmp_path: Path, place: str) -> None:
    keys, V = put_set(store, "dense", BIG, count=3)
    cache = cache_in(place, tmp_path, 0, D)
    for key in keys:
        add(cache, store, key)
    before = cache.bytes
    cache.drop(keys[1])
    cache.drop("never there")
    assert keys[1] not in cache and cache.bytes == (2 * 4 * D if place == "memory" else before)
    put_vector(store, "suite/task-1", {n: -v for n, v in values_of(BIG, seed=1).items()})
    add(cache, store, keys[1])
    for t, sign in enumerate((1, -1, 1)):
        assert torch.equal(cache.read(keys[t], 0, D), sign * V[:, t].float())
    assert cache.bytes == (before if place == "memory" else before + 4 * D)


@pytest.mark.parametrize("place", PLACES)
def test_a_vector_that_keeps_nothing_here_takes_nothing_from_the_others(
    store: Store, tmp_path: Path, place: str
) -> None:
    values, mask = values_of(BIG, seed=0), random_mask(BIG, seed=1)
    mask.bits[BLOCK : 2 * BLOCK] = False
    keys = [
        put_vector(store, "none", values, mask, "none"),
        put_vector(store, "some", values, random_mask(BIG, seed=2), "some"),
    ]
    cache = cache_in(place, tmp_path, BLOCK, 2 * BLOCK, own_masks=True)
    for key in keys:
        add(cache, store, key)
    assert not cache.read(keys[0], BLOCK, 2 * BLOCK).any()
    cache.drop(keys[0])
    expected = flat(values, random_mask(BIG, seed=2))[BLOCK : 2 * BLOCK].float()
    assert torch.equal(cache.read(keys[1], BLOCK, 2 * BLOCK), expected)


def test_a_file_on_disk_has_no_name_and_goes_with_the_cache(store: Store, tmp_path: Path) -> None:
    keys, _ = put_set(store, "dense", BIG, count=2)
    folder = tmp_path / "place"
    folder.mkdir()
    cache = cache_in("disk", folder, 0, D)
    for key in keys:
        add(cache, store, key)
    assert open_files(folder) == 1 and list(folder.iterdir()) == []
    del cache
    assert open_files(folder) == 0


def open_files(folder: Path) -> int:
    """Number of files of the folder that this process has open, including unnamed files."""
    held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(name.startswith(f"{folder}/") for name in held)
