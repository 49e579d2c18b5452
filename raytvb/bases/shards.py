"""A share of the coordinates of an experiment's task vectors. It does all D-sized work for a basis.

`CoordinateShard` is a plain class; `orchestration` turns several shards into actors. All data of a
shard is in the store. So a shard that dies is replaced by a new one, which fetches its share again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from raytvb.bases.messages import CacheUse, FilesByFolder, Outputs, Shards, VectorVersion, Versions
from raytvb.errors import VectorError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE
from raytvb.maths.gram_blocks import BLOCK, gram_of_blocks
from raytvb.models.worker_process import worker_setup
from raytvb.storage import records
from raytvb.storage.basis_layout import INDEX, SEGMENT, Layout, index_bytes
from raytvb.storage.basis_writer import NO_TAGS, write_pieces
from raytvb.storage.block_cache import BlockCache
from raytvb.storage.damage import differs
from raytvb.storage.masks import OpenMasks
from raytvb.storage.records import FileInfo
from raytvb.storage.replacing import new_tag, tagged
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vector_set import block_columns, check_pair
from raytvb.storage.vectors import VectorFile

MEMORY_CACHE_BYTES = 2**30  # up to here `resources.cache: auto` keeps the vectors in memory


class CoordinateShard:
    """Share number `index` out of `of` shares of the coordinates, in whole segments of 2^20.

    Sums are kept for each segment, and the caller adds them up. So the total has the same bits for
    any number of shares. Memory: the cache unless it is on disk, 64 MB of values, and 32 MB for
    each basis that is written.
    """

    def __init__(self, experiment: Experiment, index: int = 0, of: int = 1) -> None:
        """Touches no storage."""
        worker_setup()
        experiment.resources.apply_to_storage()
        self._experiment, self._store = experiment, Store(experiment.store)
        self._index, self._of = index, of
        self._dense = experiment.own_masks and len(experiment.tasks) > 1
        self._checksums: dict[str, str] = {}
        self._fingerprint: str | None = None
        self._masks = OpenMasks()
        self._first: VectorFile | None = None
        self._layout: Layout | None = None
        self._cache: BlockCache | None = None

    # Taking vectors in ----------------------------------------------------------------------------

    def fetch(self, versions: Versions) -> dict[str, VectorError]:
        """Take in the vectors that this shard does not have yet, and check their bytes.

        Returns, by task, the error for each vector that cannot be used. Raises StoreError if the
        storage fails in another way.
        """
        failed: dict[str, VectorError] = {}
        for version in versions:
            if self._checksums.get(version.task) == version.checksum:
                continue
            try:
                self._take(version)
            except VectorError as error:
                failed[version.task] = error
            except StoreKeyError as error:
                failed[version.task] = VectorError(str(error))
        return failed

    def _take(self, version: VectorVersion) -> None:
        task, file, store = version.task, version.file, Store(version.url)
        vector = VectorFile(store, version.key, self._masks, file)
        if vector.file_size != file.size:
            raise differs(vector.where, store.url, "its contents have changed")
        if self._first is None:
            # All others are compared with this header, so it is checked even if its bytes lie in
            # another share.
            vector.check_header()
        self._check(vector)
        layout = self._layout or self._layout_of(vector)
        cache = self._cache or self._make_cache(layout.count)
        cache.drop(task)
        self._checksums.pop(task, None)
        cache.add(task, vector, file)
        self._first, self._layout, self._cache = self._first or vector, layout, cache
        self._checksums[task] = version.checksum

    def _check(self, vector: VectorFile) -> None:
        """Raise VectorError unless the vector is of the experiment's model and fits the others."""
        fingerprint = self._base_fingerprint()
        if fingerprint is not None and vector.info.base != fingerprint:
            raise VectorError(
                f"{vector.where} is the difference from another pretrained model than "
                f"{self._store.where(BASE)}"
            )
        if self._first is not None:
            check_pair(self._first, vector, compact=not self._dense)

    def _base_fingerprint(self) -> str | None:
        """Fingerprint of the stored pretrained model, read once; None if there is no model yet."""
        if self._fingerprint is None:
            record = records.find(self._store, BASE)
            if record is not None:
                self._fingerprint = record.parent("fingerprint", self._store.where(BASE))
        return self._fingerprint

    def _layout_of(self, vector: VectorFile) -> Layout:
        if self._dense:
            return Layout(vector.info.base, vector.parameters, vector.parameters)
        if vector.mask is None:
            return Layout(vector.info.base, vector.parameters, vector.shapes)
        return Layout(
            vector.info.base,
            vector.parameters,
            vector.shapes,
            vector.mask_key,
            vector.mask.fingerprint,
        )

    def _make_cache(self, count: int) -> BlockCache:
        """An empty cache for this share of `count` coordinates."""
        segments = max(1, -(-count // SEGMENT))
        start = min(count, segments * self._index // self._of * SEGMENT)
        stop = min(count, segments * (self._index + 1) // self._of * SEGMENT)
        share = self._experiment.talos.density if self._dense else 1.0
        expected_bytes = 4 * len(self._experiment.tasks) * (stop - start) * share
        setting = self._experiment.resources.cache
        on_disk = setting == "disk" or (setting == "auto" and expected_bytes > MEMORY_CACHE_BYTES)
        folder = tempfile.gettempdir() if on_disk else None
        return BlockCache(start, stop, own_masks=self._dense, folder=folder)

    def _ready(self, versions: Versions) -> tuple[BlockCache, Layout]:
        """Cache and layout, after the vectors have been taken in.

        Raises VectorError that names the vectors that cannot be used.
        """
        failed = self.fetch(versions)
        if failed:
            raise VectorError("; ".join(map(str, failed.values())))
        assert self._cache is not None and self._layout is not None
        return self._cache, self._layout

    def cache(self) -> CacheUse:
        """Where the vectors' values are kept."""
        if self._cache is None:
            return CacheUse()
        return CacheUse(self._cache.kind, self._cache.bytes)

    def layout(self, versions: Versions) -> Layout:
        """The coordinates, as the index of a basis describes them."""
        return self._ready(versions)[1]

    # Inner products -------------------------------------------------------------------------------

    def rows(self, versions: Versions, new: int) -> Tensor:
        """Inner products of the last `new` of the T vectors with all: (segments, new, T) float64.

        Each pair of vectors is multiplied on its own: in float32 over 65,536 coordinates, added
        pairwise, and these sums are added in float64. So an entry has the same bits in whatever
        order the vectors arrive. Time grows linearly with T.
        """
        cache, _ = self._ready(versions)
        names = [version.task for version in versions]
        before = len(names) - new
        segments = _segments(cache)
        out = torch.zeros(len(segments), new, len(names), dtype=torch.float64)
        for number, (start, stop) in enumerate(segments):
            sums = _inner_products(cache, names[:before], names[before:], start, stop)
            out[number] = torch.tensor(sums, dtype=torch.float64)
        corner = out[:, :, before:]
        corner += corner.tril(-1).transpose(1, 2)
        return out

    def atoms_gram(self, source: str | None, versions: Versions) -> Tensor:
        """Gram matrix of [S N] by segment: (segments, m + t, m + t) float64.

        S are the m vectors of the basis in the folder `source` (None: m = 0), and N are the t given
        vectors.
        """
        cache, _ = self._ready(versions)
        basis = None if source is None else StoredBasis(self._store, source)
        size = len(versions) + (0 if basis is None else basis.size)
        segments = _segments(cache)
        grams = torch.zeros(len(segments), size, size, dtype=torch.float64)
        for gram, segment in zip(grams, segments, strict=True):
            gram += gram_of_blocks(size, _blocks(cache, basis, versions, [segment]))
        return grams

    # Writing bases --------------------------------------------------------------------------------

    def write(
        self,
        outputs: Outputs,
        versions: Versions,
        source: str | None = None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FilesByFolder:
        """Write this share of the files of [S N] @ weights for each (folder, weights).

        tags: as in `write_pieces`. This takes one pass over N (and S). Returns checksums by folder
        and file.
        """
        cache, layout = self._ready(versions)
        basis = None if source is None else StoredBasis(self._store, source)
        blocks = _blocks(cache, basis, versions, _segments(cache))
        return write_pieces(blocks, outputs, layout, self._store, cache.stop, tags)


def _segments(cache: BlockCache) -> list[tuple[int, int]]:
    """(start, stop) of each segment of a share."""
    return [(a, min(a + SEGMENT, cache.stop)) for a in range(cache.start, cache.stop, SEGMENT)]


def _inner_products(
    cache: BlockCache, old: Sequence[str], new: Sequence[str], start: int, stop: int
) -> list[list[float]]:
    """Inner products over coordinates start..stop of each new vector with all, old ones first.

    Each pair of new vectors is computed once, in the row of the later vector.
    """
    products = torch.empty(BLOCK)

    def inner(left: Tensor, right: Tensor) -> float:
        # torch.sum adds pairwise. torch.dot is twice as fast, but off by 4e-6 for bfloat16 values.
        return float(torch.mul(left, right, out=products[: len(left)]).sum())

    sums = [[0.0] * (len(old) + len(new)) for _ in new]
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        arrived = [cache.read(name, first, last) for name in new]
        for position, name in enumerate(old):
            values = cache.read(name, first, last)
            for row, other in zip(sums, arrived, strict=True):
                row[position] += inner(values, other)
        for i, left in enumerate(arrived):
            for j, right in enumerate(arrived[: i + 1]):
                sums[i][len(old) + j] += inner(left, right)
    return sums


def _blocks(
    cache: BlockCache,
    basis: StoredBasis | None,
    versions: Versions,
    ranges: Sequence[tuple[int, int]],
) -> Iterator[tuple[int, Tensor]]:
    """(start, rows (m + t, n)) over the ranges: the m basis vectors, then the t given vectors."""
    before = 0 if basis is None else basis.size
    count = before + len(versions)
    step = min(block_columns(count), SEGMENT)
    # Sums must not depend on the address of a row: rows begin at multiples of 64 bytes everywhere.
    buffer = torch.empty(count, -(-min(step, cache.stop - cache.start) // 16) * 16)
    for first, last in ranges:
        for start in range(first, last, step):
            stop = min(start + step, last)
            rows = buffer[:, : stop - start]
            if basis is not None:
                basis.read_into(start, rows[:before])
            for position, version in enumerate(versions):
                rows[before + position] = cache.read(version.task, start, stop)
            yield start, rows


def write_bases(
    store: Store,
    shards: Shards,
    outputs: Mapping[str, Tensor],
    versions: Versions,
    source: str | None = None,
) -> FilesByFolder:
    """Write the basis [S N] @ weights into each folder of `outputs` (folder to weights).

    The shards write the vectors, and this function writes the indices. The caller then writes the
    records with `commit_over`. If a folder holds a basis already, the files get other names than
    those of that basis, which stays as it is until then. source: the folder of S; None: there is no
    S. Returns checksums by folder and file. Raises VectorError for values that are not finite.
    """
    tags: dict[str, str] = {}
    for folder, weights in outputs.items():
        tags[folder] = new_tag(store, folder, weights.double().contiguous().numpy().tobytes())
    files = shards.write(list(outputs.items()), versions, source, tags)
    layout = shards.layout(versions)
    for folder, weights in outputs.items():
        name = tagged(INDEX, tags[folder])
        data = index_bytes(layout, weights.shape[1], folder, tags[folder])
        store.write(f"{folder}/{name}", data)
        files[folder][name] = FileInfo.of(data)
    return files
