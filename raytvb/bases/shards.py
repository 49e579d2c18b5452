"""A share of the coordinates of an experiment's task vectors: all D-sized work of the basis, block
by block.

A plain class; `remote` makes actors of several. Everything it knows is in the store: one that dies
is made anew and fetches its share again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from raytvb.errors import VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE, basis_vector_key
from raytvb.experiment.stored import basis_vector_record
from raytvb.maths.gram import BLOCK, gram_of_blocks
from raytvb.models.process import worker_setup
from raytvb.storage import records
from raytvb.storage.basis_layout import INDEX, SEGMENT, Layout, index_bytes
from raytvb.storage.basis_writer import write_pieces
from raytvb.storage.block_cache import BlockCache, check_header, damaged
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vector_set import block_columns, check_pair
from raytvb.storage.vectors import VectorFile

MEMORY_CACHE_BYTES = 2**30  # up to here `resources.cache: auto` keeps the vectors in memory


Known = Sequence[tuple[str, str]]  # tasks and the checksums of their vectors


Outputs = Sequence[
    tuple[str, Tensor]
]  # folders and weights (T, M) float64 of what is to be written there


class Shards(Protocol):
    """All coordinates: one `CoordinateShard`, or several behind one front (`remote.ShardGroup`)."""

    def fetch(self, known: Known) -> dict[str, str]:
        """Take the vectors in; task to reason for those that cannot be used."""

    def rows(self, known: Known, new: int) -> Tensor:
        """Inner products by segment, see `CoordinateShard.rows`."""

    def atoms_gram(self, source: str | None, known: Known) -> Tensor:
        """Gram matrices by segment, see `CoordinateShard.atoms_gram`."""

    def write(
        self, outputs: Outputs, known: Known, source: str | None = None
    ) -> dict[str, dict[str, FileInfo]]:
        """Write combinations, see `CoordinateShard.write`."""

    def cache(self) -> tuple[str, int]:
        """Where the vectors are kept (memory or disk), and how many bytes."""

    def layout(self, known: Known) -> Layout:
        """The coordinates, as an index tells them."""


class CoordinateShard:
    """Share `index` of `of` of the coordinates, in whole segments of 2^20.

    Sums are kept by segment and added by who asks, so they are the same bits however many shares
    there are. Memory: the cache where it is not on disk, 64 MB of values, and 32 MB for each basis
    that is written.
    """

    def __init__(self, experiment: Experiment, index: int = 0, of: int = 1) -> None:
        """Touches no storage."""
        worker_setup()
        self._experiment, self._store = experiment, Store(experiment.store)
        self._index, self._of = index, of
        self._dense = experiment.own_masks and len(experiment.tasks) > 1
        self._checksums: dict[str, str] = {}
        self._first: VectorFile | None = None
        self._layout: Layout | None = None
        self._cache: BlockCache | None = None

    def fetch(self, known: Known) -> dict[str, str]:
        """Take in those of the vectors that are not here, checking their bytes; task to reason for
        the unusable ones.

        Storage that fails otherwise raises its StoreError.
        """
        failed = {}
        for task, checksum in known:
            if self._checksums.get(task) != checksum:
                try:
                    self._take(task, checksum)
                except (VectorError, StoreKeyError) as error:
                    failed[task] = str(error)
        return failed

    def _take(self, task: str, checksum: str) -> None:
        key = basis_vector_key(self._experiment, task)
        record = basis_vector_record(self._store, self._experiment, task)
        if record is None:
            raise StoreKeyError(f"{self._store.where(key)} has not been committed")
        info = FileInfo.from_json(record["files"]["vector.safetensors"])
        vector = VectorFile(self._store, key)
        if info.sha256 != checksum or self._store.size(vector.key) != info.size:
            raise damaged(self._store, vector.key)
        if (
            self._first is None
        ):  # the others are compared with it, also where its header lies in another share
            check_header(vector, info)
        self._check(vector)
        layout = self._layout or self._layout_of(vector)
        cache = self._cache or self._make_cache(layout.count)
        cache.drop(task)
        self._checksums.pop(task, None)
        cache.add(task, vector, info)
        self._first, self._layout, self._cache = self._first or vector, layout, cache
        self._checksums[task] = checksum

    def _check(self, vector: VectorFile) -> None:
        """Raise VectorError unless the vector belongs to the experiment's model and to the first
        vector.
        """
        base = records.find(self._store, BASE)
        if base is not None and vector.info["base"] != base["parents"]["fingerprint"]:
            raise VectorError(
                f"{vector.where} is the difference from another pretrained model than "
                f"{self._store.where(BASE)}"
            )
        if self._first is not None:
            check_pair(self._first, vector, compact=not self._dense)

    def _layout_of(self, vector: VectorFile) -> Layout:
        shapes = vector.parameters if self._dense else vector.shapes
        shared = vector.mask if not self._dense else None
        return Layout(
            vector.info["base"],
            vector.parameters,
            shapes,
            vector.mask_key if shared else None,
            shared.fingerprint if shared else None,
        )

    def _make_cache(self, count: int) -> BlockCache:
        segments = max(1, -(-count // SEGMENT))
        edges = [
            min(count, segments * n // self._of * SEGMENT) for n in (self._index, self._index + 1)
        ]
        share = self._experiment.talos.density if self._dense else 1.0
        expected = 4 * len(self._experiment.tasks) * (edges[1] - edges[0]) * share
        wanted = self._experiment.resources.cache
        on_disk = wanted == "disk" or (wanted == "auto" and expected > MEMORY_CACHE_BYTES)
        return BlockCache(
            edges[0],
            edges[1],
            own_masks=self._dense,
            folder=tempfile.gettempdir() if on_disk else None,
        )

    def _ready(self, known: Known) -> tuple[BlockCache, Layout]:
        """All of the vectors are here. Raises VectorError that names those which cannot be used."""
        failed = self.fetch(known)
        if failed:
            raise VectorError("; ".join(failed.values()))
        assert self._cache is not None and self._layout is not None
        return self._cache, self._layout

    def cache(self) -> tuple[str, int]:
        """Where the vectors are kept (memory or disk), and how many bytes."""
        return ("memory", 0) if self._cache is None else (self._cache.kind, self._cache.bytes)

    def _segments(self, cache: BlockCache) -> list[tuple[int, int]]:
        return [(a, min(a + SEGMENT, cache.stop)) for a in range(cache.start, cache.stop, SEGMENT)]

    def rows(self, known: Known, new: int) -> Tensor:
        """Inner products of the last `new` of the vectors with all of them, (segments, new,
        len(known)) float64.

        Every pair is multiplied by itself (float32 over 65,536 coordinates, added pairwise, then in
        float64), so an entry is the same bits whatever the order in which vectors arrive. Time
        grows linearly with their number.
        """
        cache, _ = self._ready(known)
        names = [task for task, _ in known]
        old, fresh = names[: len(names) - new], names[len(names) - new :]
        segments = self._segments(cache)
        out = torch.zeros(len(segments), new, len(names), dtype=torch.float64)
        products = torch.empty(BLOCK)

        def inner(left: Tensor, right: Tensor) -> float:
            # torch.dot is twice as fast, but of bfloat16 values off by 4e-6: torch.sum adds
            # pairwise.
            return float(torch.mul(left, right, out=products[: len(left)]).sum())

        for number, (first, last) in enumerate(segments):
            sums = [[0.0] * len(names) for _ in range(new)]
            for start in range(first, last, BLOCK):
                stop = min(start + BLOCK, last)
                arrived = [cache.read(name, start, stop) for name in fresh]
                for position, name in enumerate(old):
                    values = cache.read(name, start, stop)
                    for row, other in zip(sums, arrived, strict=True):
                        row[position] += inner(values, other)
                for i, left in enumerate(arrived):
                    for j, right in enumerate(arrived[: i + 1]):
                        sums[i][len(old) + j] += inner(left, right)
            out[number] = torch.tensor(sums, dtype=torch.float64)
        corner = out[:, :, len(old) :]
        corner += corner.tril(-1).transpose(1, 2)
        return out

    def _blocks(
        self, cache: BlockCache, known: Known, source: str | None, ranges: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """(start, rows (m + t, n)): the vectors of the basis `source`, then the known ones, over
        the ranges.
        """
        basis = None if source is None else StoredBasis(self._store, source)
        before = 0 if basis is None else basis.size
        count = before + len(known)
        step = min(block_columns(count), SEGMENT)
        # Rows begin at multiples of 64 bytes in every share: sums must not depend on where.
        buffer = torch.empty(count, -(-min(step, cache.stop - cache.start) // 16) * 16)
        for first, last in ranges:
            for start in range(first, last, step):
                stop = min(start + step, last)
                rows = buffer[:, : stop - start]
                if basis is not None:
                    basis.read_into(start, rows[:before])
                for position, (task, _) in enumerate(known):
                    rows[before + position] = cache.read(task, start, stop)
                yield start, rows

    def atoms_gram(self, source: str | None, known: Known) -> Tensor:
        """Gram matrix of [S N], S the stored basis in the folder `source` and N the known vectors,
        by segment: (segments, m + t, m + t) float64."""
        cache, _ = self._ready(known)
        size = len(known) + (0 if source is None else StoredBasis(self._store, source).size)
        grams = torch.zeros(len(self._segments(cache)), size, size, dtype=torch.float64)
        for gram, segment in zip(grams, self._segments(cache), strict=True):
            gram += gram_of_blocks(size, self._blocks(cache, known, source, [segment]))
        return grams

    def write(
        self, outputs: Outputs, known: Known, source: str | None = None
    ) -> dict[str, dict[str, FileInfo]]:
        """Write this share of the files of [S N] @ weights for each (folder, weights), in one pass
        over N (and S).

        Returns checksums by folder and file.
        """
        cache, layout = self._ready(known)
        blocks = self._blocks(cache, known, source, self._segments(cache))
        return write_pieces(blocks, outputs, layout, self._store, cache.stop)

    def layout(self, known: Known) -> Layout:
        """The coordinates, as an index tells them."""
        return self._ready(known)[1]


def write_bases(
    store: Store,
    shards: Shards,
    outputs: Mapping[str, Tensor],
    known: Known,
    source: str | None = None,
) -> dict[str, dict[str, FileInfo]]:
    """Let the shards write [S N] @ weights for each (folder: weights), and add the indices; all but
    the records.
    """
    files = shards.write(list(outputs.items()), known, source)
    layout = shards.layout(known)
    for folder, weights in outputs.items():
        data = index_bytes(layout, weights.shape[1], folder)
        store.write(f"{folder}/{INDEX}", data)
        files[folder][INDEX] = FileInfo.of(data)
    return files
