"""How many requests a bucket gets, and which files are fetched from it. These are the costs of a
remote store.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vector_files import open_set, put_set

from raytvb.errors import VectorError
from raytvb.evaluation.evaluators import SplitArrays, make_evaluator
from raytvb.experiment.inventory import verify_store
from raytvb.experiment.layout import BASE, vector_prefix
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.stored import stored_bytes
from raytvb.experiment.stored_vectors import common_mask, vectors_of
from raytvb.search.candidates import FULL, candidate_bytes
from raytvb.storage import checked_file, records
from raytvb.storage.basis_writer import write_combinations
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.mirror import Mirror, mirror
from raytvb.storage.records import FileInfo
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VECTOR, VectorFile

ARCHIVE = Path(__file__).parent / "stores" / "format-1.tar.xz"
LISTING = ("list_objects_v2", "")
Requests = list[tuple[str, str]]

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_environment: str) -> Store:
    return Store(f"{s3_environment}/one")


@pytest.fixture
def requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> Requests:
    """The requests of this process so far, as (method, key)."""
    made: Requests = []
    plain = store.fs._call_s3

    async def counted(method: str, *options: Any, **arguments: Any) -> Any:
        made.append((method, arguments.get("Key", "").removeprefix("one/")))
        return await plain(method, *options, **arguments)

    monkeypatch.setattr(store.fs, "_call_s3", counted)
    return made


def test_a_record_is_found_by_one_request(store: Store, requests: Requests) -> None:
    records.commit(store, "things/one", identity={}, files={"a": b"1"})
    assert [method for method, _ in requests] == ["put_object", "put_object"]
    requests.clear()
    assert records.find(store, "things/one") is not None
    assert records.find(store, "things/two") is None
    assert store.find("things/two/b") is None
    assert requests == [
        ("get_object", "things/one/record.json"),
        ("get_object", "things/two/record.json"),
        ("get_object", "things/two/b"),
    ]


def test_sizes_and_all_records_take_one_listing(store: Store, requests: Requests) -> None:
    for prefix in ("things/one", "things/two"):
        records.commit(store, prefix, identity={}, files={"a": b"12"})
    requests.clear()
    sizes = store.sizes()
    assert sizes["things/one/a"] == 2 and len(sizes) == 4
    assert requests == [LISTING]
    requests.clear()
    assert len(records.find_all(store)) == 2
    assert requests.count(LISTING) == 1 and len(requests) == 3


def test_a_file_is_verified_in_pieces(
    store: Store, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.commit(store, "things/one", identity={}, files={"a": bytes(range(100))})
    monkeypatch.setattr("raytvb.storage.checked_file._STREAM", 40)
    requests.clear()
    assert verify_store(store).messages() == []
    assert [method for method, key in requests if key == "things/one/a"] == ["get_object"] * 3


def vector_key(task: str) -> str:
    return f"{vector_prefix(task)}/{VECTOR}"


def record_of(key: str) -> str:
    """Key of the record in the folder of a file."""
    return records.record_key(records.prefix_of(key))


def put_with_records(store: Store, kind: str) -> list[str]:
    """As `put_set`, as a run does: with a record for each vector and mask."""
    keys, _ = put_set(store, kind)
    for key in (*keys, *store.keys("masks")):
        written = {key.rpartition("/")[2]: FileInfo.of(store.read(key))}
        records.commit(store, records.prefix_of(key), identity={}, written=written)
    return keys


def test_vectors_with_the_same_mask_read_its_header_once(store: Store, requests: Requests) -> None:
    keys = put_with_records(store, "shared")
    requests.clear()
    vectors = VectorSet.open(store, keys)
    assert vectors.compact and [file.key for file in vectors.files] == keys
    expected = []
    for key in (*keys, "masks/shared/mask.safetensors"):  # the record says how long the file is
        expected += [("get_object", key), ("get_object", record_of(key))]
    assert sorted(requests) == sorted(expected)


def test_vectors_with_masks_of_their_own_read_each(store: Store, requests: Requests) -> None:
    keys = put_with_records(store, "per-task")
    requests.clear()
    assert VectorSet.open(store, keys).mask is None
    masks = {key for _, key in requests if key.startswith("masks/") and key != record_of(key)}
    assert masks == {f"masks/own-{number}/mask.safetensors" for number in range(3)}
    assert len(requests) == 2 * (len(keys) + len(masks))


def test_an_arrival_in_the_gram_matrix_is_two_requests(store: Store, requests: Requests) -> None:
    writer, state = GramWriter(store), GramState.read(store)
    assert requests == [
        ("get_object", "gram/owner.json"),
        ("put_object", "gram/owner.json"),
        ("get_object", "gram/record.json"),
        ("get_object", "gram/rows/000000.safetensors"),
    ]
    requests.clear()
    writer.append(state, [("a", "f00d")], torch.ones(1, 1, dtype=torch.float64), [])
    assert requests == [
        ("get_object", "gram/owner.json"),
        ("put_object", "gram/rows/000000.safetensors"),
    ]


def test_a_copied_vector_is_fetched_once_with_its_mask(store: Store, requests: Requests) -> None:
    keys = put_with_records(store, "shared")
    copies = Mirror(store)
    requests.clear()
    opened = VectorSet([copies.vector(key) for key in keys])
    assert opened.compact and opened.files[0].store.is_local
    fetched = [*keys, "masks/shared/mask.safetensors"]
    read = [key for method, key in requests if method == "get_object"]
    assert sorted(key for key in read if key != record_of(key)) == sorted(fetched)
    assert set(read) == {*fetched, *map(record_of, fetched)}
    for copy, remote in zip(opened.files, open_set(store, keys).files, strict=True):
        assert torch.equal(copy.values(0, copy.stored), remote.values(0, remote.stored))


def test_an_error_of_a_copied_vector_names_the_file_in_the_store(store: Store) -> None:
    keys, _ = put_set(store, "shared")
    store.write(keys[1], store.read(keys[1])[:-4])
    with pytest.raises(VectorError, match=f"{store.url}/{keys[1]} is not a whole"):
        Mirror(store).vector(keys[1])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-4],
    "longer": lambda data: data + b"1234",
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "header": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_in_the_bucket_and_no_copy_is_used(
    store: Store, damage: str
) -> None:
    """Vectors, masks and bases that are copied; the error names the object, not its copy."""
    keys = put_with_records(store, "shared")
    paths = [store.where(key) for key in keys]
    write_combinations(paths, {"basis/m2": torch.ones(len(keys), 2)}, store.url)
    basis = ["basis/m2/basis-00001-of-00001.safetensors", "basis/m2/basis.safetensors.index.json"]
    for key in (keys[1], "masks/shared/mask.safetensors", *basis):
        data = store.read(key)
        store.write(key, DAMAGE[damage](data))
        with pytest.raises(DamagedError, match=f"{store.url}/{key} is not as its record says"):
            if key in basis:
                list(Mirror(store).basis("basis/m2").blocks())
            else:
                Mirror(store).vector(keys[1])
        store.write(key, data)
    assert Mirror(store).vector(keys[1]).stored and Mirror(store).basis("basis/m2").size == 2


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_range_of_a_bucket_is_not_used(store: Store, damage: str) -> None:
    """What shards read: ranges of the object itself."""
    keys = put_with_records(store, "shared")
    whole = VectorFile(store, keys[0])
    expected = whole.values(0, whole.stored)
    checked_file._CHECKED.clear()
    for key in (keys[0], "masks/shared/mask.safetensors"):
        data = store.read(key)
        store.write(key, DAMAGE[damage](data))
        if damage == "longer":  # ranges end before what is too much
            vector = VectorFile(store, keys[0])
            assert torch.equal(vector.values(0, vector.stored), expected)
        else:
            with pytest.raises(VectorError, match=f"{store.url}/{key}"):
                vector = VectorFile(store, keys[0])
                assert vector.mask is not None
                vector.values(0, vector.stored), vector.mask.load()
        store.write(key, data)


# What evaluators fetch ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store, and the experiment file that it was made with."""
    folder = tmp_path_factory.mktemp("finished")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "format-1"


@pytest.fixture
def finished(store: Store, unpacked: Path) -> Store:
    """A copy of the finished store in a bucket."""
    local = Store(str(unpacked / "shared"))
    for key in local.keys():
        if not key.startswith(("evals/", "report/", "search/", "online/")):
            store.write(key, local.read(key))
    return store


def test_an_evaluator_fetches_no_vector(finished: Store, unpacked: Path) -> None:
    """An evaluator needs only the mask of the vectors, which their headers name."""
    experiment = load_experiment(unpacked / "shared.yaml", {"store": finished.url})
    base = records.find(finished, BASE)
    assert base is not None
    images = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    split = SplitArrays(images, np.zeros(2, dtype=np.int64), ("a", "b"))
    arrays = {experiment.task_names[0]: split}
    evaluator = make_evaluator(experiment, base.parents["fingerprint"], arrays)
    copied = mirror(finished.url).local.keys()
    assert "base/model.safetensors" in copied
    assert [key for key in copied if not key.startswith("base/")] == []
    mask = common_mask(list(vectors_of(experiment, experiment.task_names).values()))
    assert mask is not None
    evaluator.merge(torch.zeros(mask.kept), 1.0)  # directions have the mask's coordinates


def test_the_mask_in_common_is_read_from_one_header(
    finished: Store, unpacked: Path, requests: Requests
) -> None:
    experiment = load_experiment(unpacked / "shared.yaml", {"store": finished.url})
    keys = [vector_key(task) for task in experiment.task_names]
    stored = list(vectors_of(experiment, experiment.task_names).values())
    requests.clear()
    mask = common_mask(stored)
    assert mask is not None
    vectors = [(method, key) for method, key in requests if key in keys]
    assert vectors == [("get_object", keys[0])]
    expected = VectorSet.open(Store(str(unpacked / "shared")), keys).mask
    assert expected is not None and mask.fingerprint == expected.fingerprint
    assert torch.equal(mask.load().bits, expected.load().bits)


def test_sizes_of_what_is_stored_take_no_request_for_each_file(
    finished: Store, unpacked: Path, requests: Requests
) -> None:
    experiment = load_experiment(unpacked / "shared.yaml", {"store": finished.url})
    vectors = sum(finished.size(vector_key(task)) for task in experiment.task_names)
    requests.clear()
    sizes = stored_bytes(finished, experiment, 1000)
    assert requests == [LISTING]
    assert sizes["vectors"] == vectors and sizes["dense_fp32"] == 4000 * len(experiment.tasks)
    requests.clear()
    assert candidate_bytes(finished, experiment, [FULL]) == {"full": vectors}
    assert requests == [LISTING]
