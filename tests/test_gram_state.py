"""The Gram matrix as it grows in a store. A reader gets what was written last, even if writers died
in between.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from vector_files import flip, truncate

from raytvb.errors import UserError
from raytvb.maths.gram_blocks import grown
from raytvb.storage.damage import DamagedError
from raytvb.storage.gram_rows import Arrival
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.store import Store

COUNT = 40  # several snapshots: the first after 16 vectors
V = torch.randn(60, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
G = V.T @ V


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def known(index: int, version: int = 0) -> tuple[str, str]:
    """A task and the checksum of its vector."""
    return f"suite/task-{index}", hashlib.sha256(f"{index} {version}".encode()).hexdigest()


def index_of(task: str) -> int:
    return int(task.rpartition("-")[2])


def append(writer: GramWriter, state: GramState, new: Sequence[int], version: int = 0) -> None:
    """Add vectors by their numbers, with a note in the history."""
    there = [index_of(t) for t in state.tasks] + list(new)
    writer.append(
        state,
        [known(i, version) for i in new],
        G[list(new)][:, there],
        [Arrival(vectors=len(there), floor={2: 1 / len(there)})],
    )


def same(found: GramState, expected: GramState) -> bool:
    return (
        found.tasks == expected.tasks
        and found.checksums == expected.checksums
        and torch.equal(found.gram, expected.gram)
        and found.history == expected.history
    )


def consistent(state: GramState) -> bool:
    """The matrix and the history are those of the tasks that the state names."""
    order = [index_of(t) for t in state.tasks]
    return (
        torch.equal(state.gram, G[order][:, order])
        and set(state.tasks) == set(state.checksums)
        and all(arrival.vectors <= len(order) for arrival in state.history)
    )


ORDERS = {
    "one by one": [[i] for i in range(COUNT)],
    "backwards": [[i] for i in reversed(range(COUNT))],
    "batches": [
        [0, 1, 2],
        [7],
        [3, 4, 5, 6],
        list(range(8, 23)),
        [23],
        [24],
        [30, 28],
        list(range(31, 40)),
    ],
    "all": [list(range(COUNT))],
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_appended_is_read(store: Store, order: str) -> None:
    state, writer = GramState.read(store), GramWriter(store)
    assert state.tasks == [] and state.gram.shape == (0, 0)
    for batch in ORDERS[order]:
        append(writer, state, batch)
        assert consistent(state) and same(GramState.read(store), state)
    assert state.tasks == [known(i)[0] for batch in ORDERS[order] for i in batch]
    assert state.history[-1].vectors == len(state.tasks)


@pytest.mark.parametrize("order", ORDERS)
def test_a_writer_that_starts_anew_at_every_step_writes_the_same(
    tmp_path: Path, order: str
) -> None:
    stores = [Store(str(tmp_path / name)) for name in ("through", "anew")]
    state, writer = GramState(), GramWriter(stores[0])
    for batch in ORDERS[order]:
        append(writer, state, batch)
        append(GramWriter(stores[1]), GramState.read(stores[1]), batch)
        assert same(GramState.read(stores[1]), state)
    files = [{k: store.read(k) for k in store.keys() if k != "gram/owner.json"} for store in stores]
    assert files[0] == files[1]


@pytest.mark.s3
def test_in_a_bucket(s3_environment: str) -> None:
    store, state = Store(f"{s3_environment}/one"), GramState()
    writer = GramWriter(store)
    for batch in ORDERS["batches"]:
        append(writer, state, batch)
    assert same(GramState.read(store), state)
    GramWriter(store)
    with pytest.raises(UserError, match=f"another run works on {store.url}"):
        writer.save(state)


def test_a_snapshot_leaves_no_row_files_behind(store: Store) -> None:
    state, writer = GramState(), GramWriter(store)
    for index in range(15):
        append(writer, state, [index])
    assert len(store.keys("gram/rows")) == 15 and not store.exists("gram/record.json")
    for count in (16, 17):
        append(writer, state, [count - 1])
        assert len(store.keys("gram/rows")) == count - 16
        assert [k for k in store.keys("gram") if "/rows/" not in k and "000016-" not in k] == [
            "gram/owner.json",
            "gram/record.json",
        ]
    writer.save(state)
    assert store.keys("gram/rows") == [] and len(store.keys("gram")) == 3
    assert state.snapshot == GramState.read(store).snapshot == 17 and same(
        GramState.read(store), state
    )


def assert_goes_on_from(store: Store, state: GramState) -> None:
    """The store has these vectors, and perhaps more, if row files from before a loss fit again."""
    found = GramState.read(store)
    assert consistent(found) and found.known[: len(state.tasks)] == state.known


# Writers that die ---------------------------------------------------------------------------------


class KilledError(Exception):
    """Raised in a writer to stop it, as if it were killed."""


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of files that may still be written or deleted, by any writer."""
    left = [10**9]
    for name in ("write", "delete"):
        plain = getattr(Store, name)

        def once(self: Store, *args: object, plain: object = plain) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            plain(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Store, name, once)
    yield left


def test_a_writer_that_dies_at_any_write_leaves_a_whole_prefix(
    tmp_path: Path, limited: list[int]
) -> None:
    """Another writer goes on from the stored state, which has all vectors that were appended before
    the death.
    """
    batches, deaths = [[0], [1], list(range(2, 17)), [17], [18, 19], list(range(20, 37)), [37]], 0
    while True:
        store = Store(str(tmp_path / f"{deaths}"))
        state, writer, done = GramState(), GramWriter(store), 0
        limited[0] = deaths
        try:
            for batch in batches:
                append(writer, state, batch)
                done += len(batch)
        except KilledError:
            pass
        survived, limited[0] = limited[0] >= 0, 10**9
        found = GramState.read(store)
        assert consistent(found) and found.tasks == [known(i)[0] for i in range(len(found.tasks))]
        assert len(found.tasks) >= done
        writer = GramWriter(store)
        rest = [[i for i in batch if i >= len(found.tasks)] for batch in batches]
        for batch in filter(None, rest):
            append(writer, found, batch)
            assert_goes_on_from(store, found)
        assert len(found.tasks) == 38 and same(GramState.read(store), found) and consistent(found)
        if survived:
            break
        deaths += 1
    assert deaths >= 10


@pytest.mark.parametrize(
    ("lost", "how"),
    [
        ("record", "deleted"),
        *itertools.product(["snapshot", "row"], ["deleted", "truncated", "emptied", "flipped"]),
    ],
)
def test_what_is_read_is_a_prefix_where_a_file_is_lost(store: Store, lost: str, how: str) -> None:
    state, writer = GramState(), GramWriter(store)
    for index in range(20):
        append(writer, state, [index])
    (snapshot,) = (k for k in store.keys("gram") if "000016-" in k)
    key = {
        "record": "gram/record.json",
        "snapshot": snapshot,
        "row": "gram/rows/000018.safetensors",
    }[lost]
    if how == "deleted":
        store.delete(key)
    elif how == "flipped":
        flip(store, key, -3)
    else:
        truncate(store, key, -8 if how == "truncated" else 0)
    if how != "deleted" or lost == "snapshot":
        with pytest.raises(DamagedError, match=key.replace(".", r"\.")):
            GramState.read(store)
    found = GramState.undamaged(store)
    assert consistent(found)
    assert found.tasks == state.tasks[: 18 if lost == "row" else 0]
    for index in range(len(found.tasks), 25):
        append(writer, found, [index])
        assert_goes_on_from(store, found)
    assert same(GramState.read(store), found)


def test_a_snapshot_that_names_no_file_is_damaged_and_its_vectors_are_added_again(
    store: Store,
) -> None:
    writer, state = GramWriter(store), GramState()
    append(writer, state, range(3))
    writer.save(state)
    record = store.read_json("gram/record.json")
    store.write_json("gram/record.json", {**record, "files": {}})
    with pytest.raises(DamagedError, match=r"gram/record\.json cannot be read"):
        GramState.read(store)
    again = GramState.undamaged(store)
    assert again.tasks == []
    append(GramWriter(store), again, range(3))
    assert GramState.read(store).tasks == state.tasks


def test_a_changed_row_file_is_named_and_left_out_by_who_writes(store: Store) -> None:
    """A row file with a flipped bit, in its header or in its numbers."""
    states, writer, key = [GramState()], GramWriter(store), "gram/rows/000002.safetensors"
    for index in range(3):
        states.append(copy.deepcopy(states[-1]))
        append(writer, states[-1], [index])
    for position in range(store.size(key)):
        flip(store, key, position, bit=position % 8)
        assert same(GramState.undamaged(store), states[2])
        with pytest.raises(DamagedError, match=r"gram/rows/000002\.safetensors"):
            GramState.read(store)
        flip(store, key, position, bit=position % 8)
    assert same(GramState.read(store), states[3])


@pytest.mark.parametrize("change", ["order", "version"])
def test_rows_of_another_chain_are_left_out(tmp_path: Path, change: str) -> None:
    """Rows that follow other vectors, or the same vectors in another order, are ignored."""
    stores = [Store(str(tmp_path / name)) for name in ("ours", "theirs")]
    for store, batches, version in (
        (stores[0], [[0], [1]], 0),
        (
            stores[1],
            [[1], [0], [2]] if change == "order" else [[0], [1], [2]],
            int(change == "version"),
        ),
    ):
        state, writer = GramState(), GramWriter(store)
        for batch in batches:
            append(writer, state, batch, version)
    stores[0].write("gram/rows/000002.safetensors", stores[1].read("gram/rows/000002.safetensors"))
    found = GramState.read(stores[0])
    assert found.known == [known(0), known(1)] and consistent(found)
    append(GramWriter(stores[0]), found, [3])  # in the same place
    assert same(GramState.read(stores[0]), found) and found.tasks[-1] == "suite/task-3"


def test_rows_without_vectors_are_no_rows(store: Store) -> None:
    """A row file without vectors does not count: reading ends there."""
    state, writer = GramState(), GramWriter(store)
    append(writer, state, [0])
    writer.append(state, [], torch.zeros(0, 1, dtype=torch.float64), [])
    assert same(GramState.read(store), state)
    append(writer, state, [1])
    assert same(GramState.read(store), state) and len(state.tasks) == 2


# Several writers ----------------------------------------------------------------------------------


def test_a_writer_is_fenced_by_a_later_one(store: Store) -> None:
    old, stale = GramWriter(store), GramState()
    append(old, stale, [0])
    new, state = GramWriter(store), GramState.read(store)
    append(new, state, [1])
    before, files = copy.deepcopy(stale), {k: store.read(k) for k in store.keys()}
    writes: list[Callable[[], object]] = [
        lambda: append(old, stale, [2]),
        lambda: old.save(stale),
        old.check,
    ]
    for write in writes:
        with pytest.raises(UserError, match=f"another run works on {store.url}"):
            write()
    assert same(stale, before) and {k: store.read(k) for k in store.keys()} == files
    append(new, state, [2])
    assert same(GramState.read(store), state) and state.tasks == [known(i)[0] for i in range(3)]


def test_the_latest_of_many_writers_may_write(store: Store) -> None:
    writers = [GramWriter(store) for _ in range(4)]
    writers[-1].check()
    for writer in writers[:-1]:
        with pytest.raises(UserError):
            writer.check()


# Costs --------------------------------------------------------------------------------------------


def test_what_an_arrival_writes_grows_linearly(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 arrivals: each writes its row, and all snapshots together take a few times the bytes of
    the last.
    """
    count, written, write = 200, dict[str, list[int]](), Store.write

    def counted(self: Store, key: str, data: bytes) -> None:
        written.setdefault(key.rpartition("/")[0], []).append(len(data))
        write(self, key, data)

    monkeypatch.setattr(Store, "write", counted)
    state, writer = GramState(), GramWriter(store)
    for index in range(count):
        append(writer, state, [index])
    rows, others = written["gram/rows"], written["gram"]
    assert all(size <= 8 * count + 600 for size in rows)
    assert sum(rows) <= 4 * count**2 + 600 * count
    snapshots = [size for size in others if size > 8 * 16**2]
    assert len(rows) + len(snapshots) // 2 >= count - 1
    assert sum(rows) + sum(others) <= 4.5 * 8 * count**2
    assert same(GramState.read(store), state)


# Matrices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "new"), [(0, 1), (0, 5), (3, 1), (3, 4)])
def test_grown(before: int, new: int) -> None:
    total = before + new
    assert torch.equal(grown(G[:before, :before], G[before:total, :total]), G[:total, :total])


def extended(order: Sequence[int]) -> GramState:
    state = GramState()
    for index in order:
        there = [*map(index_of, state.tasks), index]
        state.extend([known(index)], G[[index]][:, there])
    return state


def test_it_can_be_read_in_any_order_of_the_tasks() -> None:
    state = extended([3, 1, 4, 0])
    for order in ([0, 1, 3, 4], [4, 0], [1], []):
        assert torch.equal(state.ordered([known(i)[0] for i in order]), G[order][:, order])
    with pytest.raises(ValueError, match=r"not taken in yet: suite/task-2, suite/task-7$"):
        state.ordered([known(i)[0] for i in (0, 2, 3, 7)])


def test_vectors_can_be_forgotten() -> None:
    state, chains = extended([3, 1, 4, 0]), set[str]()
    for gone, left in (([1], [3, 4, 0]), ([], [3, 4, 0]), ([3, 0], [4]), ([4], [])):
        state.forget([known(i)[0] for i in gone])
        assert state.known == [known(i) for i in left] and torch.equal(state.gram, G[left][:, left])
        chains.add(state.chain)
    assert len(chains) == 3
    state.extend([known(2)], G[[2]][:, [2]])
    assert state.known == [known(2)]


def test_what_was_forgotten_stays_so_after_a_snapshot(store: Store) -> None:
    """A vector that was made again: its old row, and the rows of those after it, are replaced."""
    state, writer = GramState(), GramWriter(store)
    for index in range(4):
        append(writer, state, [index])
    state.forget([known(1)[0]])
    writer.save(state)
    assert same(GramState.read(store), state)
    append(writer, state, [1], version=1)
    found = GramState.read(store)
    assert same(found, state) and found.known[-1] == known(1, version=1)


def test_chains_tell_order_and_checksums_apart(store: Store) -> None:
    states = [extended([0, 1]), extended([1, 0]), extended([0]), GramState()]
    other = GramState()
    other.extend([known(0), known(1, version=1)], G[:2, :2])
    assert len({s.chain for s in (*states, other)}) == 5
    assert extended([0, 1]).chain == states[0].chain
