"""Where the vectors of an experiment are, and which versions of them.

A vector lies in the store of the experiment, or, read-only, in the store that the experiment's
field `vectors` names. A vector that the own store has comes first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import basis_vector_prefix, vector_prefix
from raytvb.storage import records
from raytvb.storage.masks import MaskFile, OpenMasks
from raytvb.storage.mirror import mirror
from raytvb.storage.records import FileInfo, Record
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet, readers
from raytvb.storage.vectors import VectorFile, vector_file


@dataclass(frozen=True)
class StoredVector:
    """A committed vector, or the prepared twin of one: the version that its record describes."""

    task: str
    store: Store
    prefix: str
    """Folder of the vector in its store."""
    record: Record

    @property
    def name(self) -> str:
        """Name of the vector file in its folder."""
        return vector_file(self.record.files)

    @property
    def key(self) -> str:
        """Key of the vector file."""
        return records.file_key(self.prefix, self.name)

    @property
    def file(self) -> FileInfo:
        """Checksum and size of the vector file. DamagedError: the record does not list it."""
        return self.record.file(self.name, self.store.where(self.prefix))

    @property
    def checksum(self) -> str:
        """sha256 of the vector file."""
        return self.file.sha256

    @property
    def mask(self) -> str | None:
        """Fingerprint of the mask that it was trained on; None for a dense vector."""
        return self.record.parents.get("mask")

    @property
    def where(self) -> str:
        """The vector file's path, for messages."""
        return self.store.where(self.key)

    def open(self, masks: OpenMasks | None = None) -> VectorFile:
        """Open the file in its own store, which reads only headers. Raises as `VectorFile`."""
        return VectorFile(self.store, self.key, masks, self.file)

    def copied(self) -> VectorFile:
        """Open the file through the process's mirror, which copies it from a remote store."""
        return mirror(self.store.url).vector(self.key, self.file)


def library(experiment: Experiment) -> Store | None:
    """The store that the experiment takes vectors from, beside its own; None if there is none."""
    return None if experiment.vectors is None else Store(experiment.vectors)


def find_vector(own: Store, other: Store | None, task: str) -> StoredVector | None:
    """A task's vector in its own store, or else in the other one; None if there is none.

    Its settings may be other ones than the experiment's (see `vector_states`).
    """
    for store in (own, other):
        if store is not None:
            record = records.find(store, vector_prefix(task))
            if record is not None:
                return StoredVector(task, store, vector_prefix(task), record)
    return None


def find_vectors(own: Store, other: Store | None, tasks: Iterable[str]) -> dict[str, StoredVector]:
    """The vectors of several tasks, by task. One listing of each store, then parallel reads."""
    wanted = dict.fromkeys(tasks)
    found: dict[str, StoredVector] = {}
    for store in (own, other):
        rest = [task for task in wanted if task not in found]
        if store is not None and rest:
            found |= _of_store(store, {vector_prefix(task): task for task in rest}, "vectors")
    return {task: found[task] for task in wanted if task in found}


def _of_store(store: Store, tasks: Mapping[str, str], folder: str) -> dict[str, StoredVector]:
    """The vectors of one store by task. tasks: by the folders of their vectors."""
    keys = [key for key in records.record_keys(store, folder) if records.prefix_of(key) in tasks]
    found: dict[str, StoredVector] = {}
    for key, data in zip(keys, store.read_many(keys), strict=True):
        prefix = records.prefix_of(key)
        record = records.parse_record(data, store.where(key))
        found[tasks[prefix]] = StoredVector(tasks[prefix], store, prefix, record)
    return found


def vectors_of(experiment: Experiment, tasks: Iterable[str]) -> dict[str, StoredVector]:
    """`find_vectors` for an experiment."""
    return find_vectors(Store(experiment.store), library(experiment), tasks)


def basis_vectors_of(experiment: Experiment, tasks: Iterable[str]) -> dict[str, StoredVector]:
    """The vectors that bases are made of, by task: the task vectors, or their prepared twins.

    They are in the order of `tasks`. A twin of another version of its vector counts as not
    committed.
    """
    vectors = vectors_of(experiment, tasks)
    if experiment.basis.prepare == "none":
        return vectors
    prefixes = {basis_vector_prefix(experiment, task): task for task in vectors}
    twins = _of_store(Store(experiment.store), prefixes, "prepared")
    found = {}
    for task, vector in vectors.items():
        if task in twins and is_twin_of(twins[task], vector):
            found[task] = twins[task]
    return found


def find_basis_vector(experiment: Experiment, task: str) -> StoredVector | None:
    """As `basis_vectors_of`, for one task. Two requests, or three."""
    own = Store(experiment.store)
    vector = find_vector(own, library(experiment), task)
    if vector is None or experiment.basis.prepare == "none":
        return vector
    prefix = basis_vector_prefix(experiment, task)
    record = records.find(own, prefix)
    twin = None if record is None else StoredVector(task, own, prefix, record)
    return twin if twin is not None and is_twin_of(twin, vector) else None


def is_twin_of(twin: StoredVector, vector: StoredVector) -> bool:
    """Whether a twin was made of this version of the vector."""
    return twin.record.parent("vector", twin.store.where(twin.prefix)) == vector.checksum


def vector_set(vectors: Sequence[StoredVector]) -> VectorSet:
    """Vectors as a matrix, opened through the process's mirrors."""
    return VectorSet([vector.copied() for vector in vectors])


def common_mask(vectors: Sequence[StoredVector]) -> MaskFile | None:
    """The mask whose kept entries are the coordinates of these vectors.

    None if all entries are coordinates. Reads only headers; `vector_set` would copy every vector
    from a remote store.
    """
    masks = OpenMasks()
    # One vector tells for all that were trained on the same mask.
    first_of = {vector.mask or vector.task: vector for vector in reversed(vectors)}
    with ThreadPoolExecutor(max(readers(vector.store) for vector in vectors)) as pool:
        files = list(pool.map(lambda vector: vector.open(masks), first_of.values()))
    return VectorSet(files).mask
