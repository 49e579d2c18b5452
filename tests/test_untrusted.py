"""Files that somebody else may have written: hypothesis changes every kind of file of a store, with
and without a record that vouches for it. A reader then gives a value, or one of the documented
errors; it never raises anything else, and never takes much memory for what a file only claims.
"""

from __future__ import annotations

import datetime
import json
import resource
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_files import YAMLS, altered, as_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_split_cache import PREPROCESS, task_of, write_data

from raytvb.bases.online import OnlineBasis
from raytvb.bases.shards import CoordinateShard
from raytvb.data.split_cache import cached_split, split_prefix
from raytvb.errors import UserError, VectorError
from raytvb.evaluation.rows import Row, has_rows, read_pair_rows, read_rows, write_rows
from raytvb.experiment.basis_specs import basis_specs
from raytvb.experiment.changes import changes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.inventory import verify_store
from raytvb.experiment.layout import EXPERIMENTS, checkpoint_prefix
from raytvb.experiment.metrics import BasisMetrics, OnlineMetrics, VectorMetrics
from raytvb.experiment.parsing import load_experiment, parse_experiment
from raytvb.experiment.places import is_store
from raytvb.experiment.present_experiments import (
    check_model,
    present_experiments,
    record_experiment,
    store_metrics,
    stored_experiment,
)
from raytvb.experiment.present_versions import present_versions
from raytvb.experiment.shared_masks import find_shared_mask
from raytvb.experiment.stored import existing_basis
from raytvb.experiment.stored_vectors import find_basis_vector, vector_set, vectors_of
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.checkpoints import CheckpointFolder
from raytvb.finetuning.training_loop import Checkpoint
from raytvb.maths.counts import Count
from raytvb.merging.addends import Tasks
from raytvb.merging.mixtures import mixture
from raytvb.models.heads import load_head
from raytvb.models.open_clip_models import CONFIG_FILE, Encoder, load_encoder
from raytvb.models.pretrained_model import load_base, store_base
from raytvb.report.summary_contracts import read_summary
from raytvb.report.timings import read_timings
from raytvb.search.candidates import FULL, basis_candidates
from raytvb.search.results import Choice, parse_outcome, parse_round
from raytvb.search.rounds import find_choice, find_result, known_rounds
from raytvb.storage import records
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_rows import Arrival, RowsInfo
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.masks import MaskFile
from raytvb.storage.records import FileInfo, prefix_of, record_key
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VectorFile
from raytvb.suite.task_names import task_names

DOCUMENTED = (VectorError, StoreError, UserError)
ARCHIVE = Path(__file__).parent / "stores" / "format-1.tar.xz"
SPARE = 4 * 2**30
"""Bytes of address space that a reader may take: far less than the sizes that files claim."""

QUICK = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=datetime.timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=12)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished stores of format 1, and `made`, which has the other files of format 2."""
    folder = tmp_path_factory.mktemp("stores")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    make(folder / "format-1")
    return folder / "format-1"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """Let allocations fail that are far larger than any file of these tests."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def experiment_of(store: Store) -> Experiment:
    """The experiment of one of the stores."""
    folder = Path(store.url)
    if folder.name == "made":
        tasks = list(task_names()[:2])
        return parse_experiment({"name": "made", "store": store.url, "tasks": tasks})
    return load_experiment(folder.parent / f"{folder.name}.yaml", {"store": store.url})


def make(folder: Path) -> None:
    """The store `made`: a checkpoint, a head, images, rows, and the store's own record."""
    store = Store(str(folder / "made"))
    experiment = experiment_of(store)
    store_base(experiment)
    record_experiment(store, experiment, grows=True)
    task_store = TaskStore(experiment, experiment.tasks[0])
    load_head(task_store, load_encoder(experiment.model))
    tensors = {"values": torch.zeros(4), "rng": torch.get_rng_state(), "step": torch.tensor(1.0)}
    CheckpointFolder(task_store).save(Checkpoint(1, 0.5, 2.0, tensors))
    cached_split(store, task_of(write_data(folder / "data")), "val", PREPROCESS)
    arrival = Arrival(vectors=2, floor={1: 0.5})
    rows = torch.eye(2, dtype=torch.float64)
    GramWriter(store).append(GramState(), [("a", "1"), ("b", "2")], rows, [arrival])
    write_rows(store, "one", [Row.of("m", "test", 1, 0, "a", 0.5, Count(3, 4))], {"a": 1})


# Readers ------------------------------------------------------------------------------------------


def read_vector(store: Store, key: str) -> None:
    vector = VectorFile(store, key)
    vector.not_finite()
    for _ in VectorSet([vector]).blocks():
        pass
    VectorFile.open(store.where(key)).check_header()
    if vector.mask is not None:
        vector.mask.load().tensors()


def read_mask(store: Store, key: str) -> None:
    mask = MaskFile(store, key)
    mask.kept_before(mask.total // 2)
    mask.load().tensors()


def read_vector_of_mask(store: Store, key: str) -> None:
    read_mask(store, key)
    read_vector(store, key_of_vector(store))


def key_of_vector(store: Store) -> str:
    return next(key for key in store.keys("vectors") if key.endswith("vector.safetensors"))


def read_basis(store: Store, key: str) -> None:
    basis = StoredBasis(store, prefix_of(key))
    basis.read_all(0, min(basis.count, 9))
    for _ in basis.blocks():
        pass


def read_table(store: Store, key: str) -> None:
    basis = existing_basis(store, prefix_of(key).removeprefix("basis/"))
    basis.coefficients()
    basis.ratios()


def read_gram(store: Store, key: str) -> None:
    try:
        GramState.read(store)
    finally:
        GramState.undamaged(store)


def take_gram_over(store: Store, key: str) -> None:
    GramWriter(store).check()


def read_record(store: Store, key: str) -> None:
    record = records.read_record(store, key)
    identity: Any = {"tasks": [{"name": "a"}], "seed": 0}
    records.differences(record.identity, identity)
    for contract in (BasisMetrics, OnlineMetrics, VectorMetrics, Choice):
        try:
            record.metrics_as(contract, key)
        except DOCUMENTED:
            continue


def read_task(store: Store, key: str) -> None:
    experiment = experiment_of(store)
    for task in experiment.tasks:
        task_store = TaskStore(experiment, task)
        task_store.record()
        find_basis_vector(experiment, task.name)
        task_store.checkpoint()
    vector_set(list(vectors_of(experiment, experiment.task_names).values()))


def read_changes(store: Store, key: str) -> None:
    """What a run looks at first."""
    experiment = experiment_of(store)
    list(changes_of(experiment).lines())
    present_versions(experiment)


def read_shared_mask(store: Store, key: str) -> None:
    mask = find_shared_mask(store, experiment_of(store))
    assert mask is None or (mask.fingerprint and mask.scored is not None)


def read_online(store: Store, key: str) -> None:
    experiment = experiment_of(store)
    for spec in basis_specs(experiment):
        if spec.online:
            online = OnlineBasis(experiment, store, CoordinateShard(experiment, 0, 1), spec)
            online.error_bounds()
            online.follow({})


def read_experiment(store: Store, key: str) -> None:
    is_store(store)
    stored_experiment(store)
    present_experiments(store)
    store_metrics(store)
    check_model(store, experiment_of(store))


def read_results(store: Store, key: str) -> None:
    """The results that count for the present vectors and bases."""
    experiment = experiment_of(store)
    present = present_versions(experiment)
    candidates = [FULL, *basis_candidates(experiment)]
    find_choice(store, experiment, candidates, present)
    for candidate in candidates:
        known_rounds(store, experiment, candidate, present)
        find_result(store, experiment, candidate, present)


def read_mixture(store: Store, key: str) -> None:
    for source in ("full", "svd-m2"):
        mixture(store, source, Tasks({FIRST: 1.0}))


def read_search(store: Store, key: str) -> None:
    record = records.read_record(store, key)
    for parse in (parse_round, parse_outcome):
        try:
            parse(record.metrics, key)
        except DOCUMENTED:
            continue
    record.metrics_as(Choice, key)


def read_checkpoint(store: Store, key: str) -> None:
    experiment = experiment_of(store)
    CheckpointFolder(TaskStore(experiment, experiment.tasks[0])).load()


def read_images(store: Store, key: str) -> None:
    task = task_of(Path(store.url).parent / "data")
    split = cached_split(store, task, "val", PREPROCESS)
    assert split.images.dtype == torch.uint8 and len(split.images) == len(split.labels)


def read_head(store: Store, key: str) -> None:
    experiment = experiment_of(store)
    load_head(TaskStore(experiment, experiment.tasks[0]), small_encoder(experiment))


def read_rows_of(name: str) -> Callable[[Store, str], None]:
    def read(store: Store, key: str) -> None:
        has_rows(store, name, {})
        (read_pair_rows if name.startswith("disentanglement") else read_rows)(store, name)

    return read


_ENCODERS: list[Encoder] = []


def small_encoder(experiment: Experiment) -> Encoder:
    if not _ENCODERS:
        _ENCODERS.append(load_encoder(experiment.model))
    return _ENCODERS[0]


# Cases --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A file that is changed, and what is then read."""

    store: str
    key: str
    read: Callable[[Store, str], object]

    def __str__(self) -> str:
        return f"{self.store}/{self.key}"


FIRST, PAIRS = "glyphs/clock-blur", "disentanglement/full/glyphs-greek-blur+glyphs-latin-fog"
HEAD, VAL = f"heads/{task_names()[0]}", split_prefix("own/set", "val")
PIECE = "basis-00001-of-00001.safetensors"
CASES = [
    Case("shared", f"vectors/{FIRST}/vector.safetensors", read_vector),
    Case("shared", f"vectors/{FIRST}/record.json", read_task),
    Case("shared", f"vectors/{FIRST}/record.json", read_vector),
    Case("shared", f"vectors/{FIRST}/record.json", read_changes),
    Case("shared", f"vectors/{FIRST}/record.json", read_mixture),
    Case("own", f"prepared/{FIRST}/vector.safetensors", read_vector),
    Case("own", f"prepared/{FIRST}/record.json", read_task),
    Case("own", f"prepared/{FIRST}/record.json", read_changes),
    Case("shared", "masks/shared/mask.safetensors", read_vector_of_mask),
    Case("shared", "masks/shared/record.json", read_vector_of_mask),
    Case("shared", "masks/shared/record.json", read_shared_mask),
    Case("shared", "masks/shared/record.json", read_changes),
    Case("own", f"masks/{FIRST}/mask.safetensors", read_mask),
    Case("shared", "basis/svd-m2/basis.safetensors.index.json", read_basis),
    Case("shared", f"basis/svd-m2/{PIECE}", read_basis),
    Case("shared", "basis/svd-m2/record.json", read_basis),
    Case("shared", "basis/svd-m2/record.json", read_record),
    Case("shared", "basis/svd-m2/record.json", read_table),
    Case("shared", "basis/svd-m2/record.json", read_changes),
    Case("shared", "basis/svd-m2/record.json", read_mixture),
    Case("shared", "basis/svd-m2/coefficients.safetensors", read_table),
    Case("shared", "gram/000004-9cdafb03.safetensors", read_gram),
    Case("shared", "gram/record.json", read_gram),
    Case("shared", "gram/owner.json", take_gram_over),
    Case("made", "gram/rows/000000.safetensors", read_gram),
    Case("shared", "online/svd-m2-online/record.json", read_online),
    Case("shared", "online/svd-m2-online/after-000004.safetensors", read_online),
    Case("shared", "experiment.yaml", read_experiment),
    Case("made", "record.json", read_experiment),
    Case("made", "record.json", read_changes),
    Case("made", f"{EXPERIMENTS}/made/record.json", read_experiment),
    Case("made", f"{checkpoint_prefix(task_names()[0])}/record.json", read_task),
    Case("shared", "search/record.json", read_search),
    Case("shared", "search/svd-m2/record.json", read_search),
    Case("shared", "search/svd-m2/round-1/record.json", read_search),
    Case("shared", "search/record.json", read_results),
    Case("shared", "search/svd-m2/record.json", read_results),
    Case("shared", "search/svd-m2/record.json", read_mixture),
    Case("shared", "search/svd-m2/round-1/record.json", read_results),
    Case("shared", "report/summary.json", lambda store, key: read_summary(store)),
    Case("shared", "report/timings.json", lambda store, key: read_timings(store)),
    Case("shared", "evals/full.parquet", read_rows_of("full")),
    Case("shared", f"evals/{PAIRS}.parquet", read_rows_of(PAIRS)),
    Case("made", "evals/one/rows.parquet", read_rows_of("one")),
    Case("made", "evals/one/record.json", read_rows_of("one")),
    Case("made", f"{checkpoint_prefix(task_names()[0])}/record.json", read_checkpoint),
    Case("made", f"{checkpoint_prefix(task_names()[0])}/step-0000001.safetensors", read_checkpoint),
    Case("made", f"{VAL}/record.json", read_images),
    Case("made", f"{VAL}/labels.safetensors", read_images),
    Case("made", f"{VAL}/images-00001-of-00001.safetensors", read_images),
    Case("made", f"{HEAD}/head.safetensors", read_head),
    Case("made", f"{HEAD}/record.json", read_head),
]


def whole(folder: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_back(folder: Path, files: dict[Path, bytes]) -> None:
    """Undo all changes to a folder."""
    for path, data in whole(folder).items():
        if path not in files:
            path.unlink()
        elif data != files[path]:
            path.write_bytes(files[path])
    for path in files.keys() - whole(folder).keys():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])


def with_own_checksum(data: bytes) -> bytes:
    """A row file of the Gram matrix whose checksum is right, if it has fields for one."""
    start = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:start])
        fields = json.loads(header["__metadata__"]["raytvb"])
        fields["sha256"] = RowsInfo.model_validate(fields).checksum(data[start:])
        header["__metadata__"]["raytvb"] = json.dumps(fields)
    except (ValueError, LookupError, TypeError, RecursionError):
        return data
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def vouch(folder: Path, key: str, data: bytes, how: str) -> None:
    """Let the record of a file's folder vouch for these bytes (`again`), or delete it (`gone`)."""
    path = folder / record_key(prefix_of(key))
    if not path.exists() or path == folder / key:
        return
    if how == "gone":
        path.unlink()
    elif how == "again":
        record = json.loads(path.read_bytes())
        record["files"][key.rpartition("/")[2]] = FileInfo.of(data).to_json()
        path.write_bytes(as_record(record, record.get("format", 1) > 1))


def attack(stores: Path, case: Case, data: bytes, how: str) -> None:
    """Read what the case reads while its file has other bytes."""
    folder = stores / case.store
    before, store = whole(folder), Store(str(folder))
    (folder / case.key).write_bytes(data)
    vouch(folder, case.key, data, how)
    try:
        case.read(store, case.key)
    except DOCUMENTED:
        pass
    finally:
        try:
            if case.key.endswith(".json"):
                verify_store(store).messages()  # which reports what it finds, and raises nothing
        finally:
            put_back(folder, before)


def changed(stores: Path, case: Case, data: st.DataObject) -> None:
    """Draw a change of the case's file, and read it."""
    there = (stores / case.store / case.key).read_bytes()
    new = data.draw(altered(case.key, there))
    if case.key.startswith("gram/rows/"):
        new = with_own_checksum(new)
    attack(stores, case, new, data.draw(st.sampled_from(("again", "again", "gone", "kept"))))


@pytest.mark.parametrize("case", CASES, ids=str)
@QUICK
@given(data=st.data())
def test_a_changed_file_is_read_or_is_a_documented_error(
    stores: Path, case: Case, data: st.DataObject
) -> None:
    changed(stores, case, data)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@LONG
@given(data=st.data())
def test_many_changes_of_a_file_are_read_or_are_documented_errors(
    stores: Path, case: Case, data: st.DataObject
) -> None:
    changed(stores, case, data)


@pytest.mark.parametrize("document", YAMLS)
def test_yaml_that_is_no_experiment_is_refused(stores: Path, document: bytes) -> None:
    folder = stores / "shared"
    before = whole(folder)
    (folder / "experiment.yaml").write_bytes(document)
    try:
        with pytest.raises(DOCUMENTED, match="experiment"):
            read_experiment(Store(str(folder)), "experiment.yaml")
    finally:
        put_back(folder, before)


def test_a_store_without_an_experiment_of_plain_values_is_damaged(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for document in YAMLS:
        (tmp_path / "experiment.yaml").write_bytes(document)
        try:
            found = stored_experiment(store)
        except DamagedError as error:
            assert "experiment.yaml" in str(error)
        else:
            assert len(repr(found)) < 1000


@pytest.mark.parametrize(
    "config",
    [
        *(
            b"",
            b"[]",
            b"null",
            b"{}",
            b'{"model_cfg": 5}',
            b'{"model_cfg": {}, "preprocess_cfg": 1}',
        ),
        b'{"model_cfg": {"embed_dim": "x", "vision_cfg": null, "text_cfg": []}}',
    ],
)
def test_a_model_folder_whose_description_is_none_is_damaged(stores: Path, config: bytes) -> None:
    store = Store(str(stores / "made"))
    before = whole(stores / "made")
    fingerprint = records.read_record(store, "base/record.json").parents["fingerprint"]
    (stores / "made" / "base" / CONFIG_FILE).write_bytes(config)
    vouch(stores / "made", f"base/{CONFIG_FILE}", config, "again")
    try:
        with pytest.raises(DamagedError, match=f"{store.url}/base cannot be read"):
            load_base(store.url, fingerprint)
    finally:
        put_back(stores / "made", before)


def test_a_claim_of_ten_terabytes_takes_no_memory(tmp_path: Path) -> None:
    """The record vouches for the size, and the header agrees with it."""
    store, size = Store(str(tmp_path)), 10 * 2**40
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    info = {"base": "b", "format": 1, "kind": "dense"}
    header = json.dumps({"__metadata__": {"raytvb": json.dumps(info)}, "a": entry}).encode()
    data = len(header).to_bytes(8, "little") + header
    record = {"identity": {}, "files": {"vector.safetensors": FileInfo.of(data).to_json()}}
    record["files"]["vector.safetensors"]["size"] = len(data) + size
    store.write("vectors/a/vector.safetensors", data)
    for recorded in (False, True):
        if recorded:
            store.write("vectors/a/record.json", as_record(record, True))
        with pytest.raises(VectorError, match="vectors/a/vector"):
            read_vector(store, "vectors/a/vector.safetensors")
