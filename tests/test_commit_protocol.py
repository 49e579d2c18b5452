"""The commit protocol as a state machine: two writers whose storage steps interleave in any order,
kills between any two steps, damage and repair. Real records on a real folder.

Whatever happens, a reader gets a thing that matches its record in full, an error that names the
damage, or nothing.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from raytvb.experiment.inventory import verify_store
from raytvb.storage import records
from raytvb.storage.checked_file import CheckedFile
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError
from raytvb.storage.replacing import commit_over, delete_thing, new_tag, tagged
from raytvb.storage.store import Store
from raytvb.storage.verify import repair

IDENTITY: JsonObject = {"seed": 0}
THING = "thing"
NAMES = ("a.bin", "index.json")


class KilledError(BaseException):
    """What ends a writer. It is no Exception, so nothing is cleaned up, as after kill -9."""


class SteppedStore(Store):
    """A store that waits before each request until it is told to go on, or to die."""

    def __init__(self, url: str, wait: Callable[[], None]) -> None:
        super().__init__(url)
        self._wait = wait

    def write(self, key: str, data: bytes) -> None:
        self._wait()
        super().write(key, data)

    def delete(self, key_or_prefix: str) -> None:
        self._wait()
        super().delete(key_or_prefix)

    def read(self, key: str) -> bytes:
        self._wait()
        return super().read(key)

    def keys(self, prefix: str = "") -> list[str]:
        self._wait()
        return super().keys(prefix)


@dataclass
class Writer:
    """One action on the store in a thread of its own, which goes on only when it is told to."""

    url: str
    version: int
    action: Callable[[Store, int], object]
    is_killed: bool = False
    error: BaseException | None = None
    _go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _waits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._waits.acquire()

    def _run(self) -> None:
        try:
            self.action(SteppedStore(self.url, self._wait), self.version)
        except (KilledError, DamagedError):  # a damaged record waits for `verify --repair`
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.is_done = True
            self._waits.release()

    is_done: bool = False

    def _wait(self) -> None:
        self._waits.release()
        self._go.acquire()
        if self.is_killed:
            raise KilledError

    def step(self) -> None:
        """Do one request, and stop before the next."""
        if self.is_done:
            return
        self._go.release()
        self._waits.acquire()
        if self.is_done:
            self._thread.join()
        if self.error is not None:
            raise self.error

    def kill(self) -> None:
        self.is_killed = True
        self.step()


def contents(version: int) -> dict[str, bytes]:
    return {name: f"{version} {name}".encode() * 50 for name in NAMES}


def commit(store: Store, version: int) -> None:
    records.commit(store, THING, identity=IDENTITY, files=contents(version))


def commit_unless_done(store: Store, version: int) -> None:
    """As a fine-tune commits its vector: what another writer has finished is kept."""
    if records.find(store, THING, IDENTITY) is None:
        commit(store, version)


def replace(store: Store, version: int) -> None:
    tag = new_tag(store, THING, str(version).encode())
    files = {tagged(name, tag): data for name, data in contents(version).items()}
    commit_over(store, THING, identity=IDENTITY, files=files)


ACTIONS: dict[str, Callable[[Store, int], object]] = {
    "equal": commit,  # the same bits from every writer, as on a CPU
    "different": commit,  # other bits from every writer, as on GPUs
    "kept": commit_unless_done,
    "replaced": replace,
}


class CommitProtocol(RuleBasedStateMachine):
    """One thing of a kind of ACTIONS, two writers of it, and a reader after every step."""

    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="raytvb-test-")
        self.store = Store(self.folder)
        self.writers: list[Writer | None] = [None, None]
        self.versions = 0
        self.finished: int | None = None
        """The version that a writer has finished, if nobody has worked on the thing since."""
        self.was_whole = False
        """Whether the thing was whole once, and was not deleted or damaged from outside since."""
        self.is_first = False
        """Whether only one writer at a time has worked on a thing that never was whole."""

    def teardown(self) -> None:
        for index in range(2):
            self.kill(index)
        shutil.rmtree(self.folder)

    @property
    def is_idle(self) -> bool:
        return self.writers == [None, None]

    # Writers --------------------------------------------------------------------------------------

    def start(self, index: int) -> None:
        # The first writing of a basis has plain names, so it has one writer: the owner of the Gram
        # matrix. Two may replace one that is there.
        if self.kind == "replaced" and not self.is_idle and self.version() is None:
            return
        self.is_first = self.is_idle and (self.is_first or not self.store.keys())
        self.versions += 1
        version = 0 if self.kind == "equal" else self.versions
        self.writers[index] = Writer(self.folder, version, ACTIONS[self.kind])

    @rule(turns=st.lists(st.integers(0, 1), min_size=2, max_size=15))
    def go_on(self, turns: list[int]) -> None:
        """The writers of these numbers take a step each. One that is not at work starts."""
        for index in turns:
            if self.writers[index] is None:
                self.start(index)
            else:
                self.step(index)
            self.a_reader_gets_a_whole_thing_or_an_error()

    @rule(index=st.integers(0, 1))
    def finish(self, index: int) -> None:
        """A writer does all its steps that are left."""
        while self.writers[index] is not None:
            self.step(index)
            self.a_reader_gets_a_whole_thing_or_an_error()

    def step(self, index: int) -> None:
        writer = self.writers[index]
        assert writer is not None
        writer.step()
        self.finished = None
        self.is_first = self.is_first and not self.was_whole
        if writer.is_done:
            self.writers[index] = None
            self.finished = self.version() if self.is_idle else None

    @rule(index=st.integers(0, 1))
    def kill(self, index: int) -> None:
        writer = self.writers[index]
        if writer is not None:
            writer.kill()
            self.writers[index] = None

    # What happens to a store while nobody works on it ---------------------------------------------

    @precondition(lambda self: self.is_idle and self.versions)
    @rule(at=st.integers(0, 999))
    def flip_a_bit(self, at: int) -> None:
        keys = self.store.keys()
        if keys:
            path = Path(self.store.path(keys[at % len(keys)]))
            data = bytearray(path.read_bytes())
            place = at % len(data)
            if data[:place].endswith(b'"format": '):
                return  # that would be the record of a newer raytvb, which is refused as such
            data[place] ^= 1
            path.write_bytes(bytes(data))
            self.finished, self.was_whole, self.is_first = None, False, False

    @precondition(lambda self: self.is_idle and self.versions)
    @rule(deletes=st.booleans())
    def repair_and_make_again(self, deletes: bool) -> None:
        """`verify --repair`, and a run that makes what is missing: then everything is whole."""
        self.was_whole = self.was_whole and not deletes
        if deletes:
            delete_thing(self.store, THING)
        repair(self.store, verify_store(self.store).problems)
        assert verify_store(self.store).messages() == []
        if records.find(self.store, THING) is None:
            self.versions += 1
            ACTIONS[self.kind](self.store, 0 if self.kind == "equal" else self.versions)
        assert verify_store(self.store).messages() == []
        self.finished = self.version()
        assert self.finished is not None

    # What a reader sees ---------------------------------------------------------------------------

    def read(self) -> list[bytes] | None:
        """The files of the thing as its record says, or None. Raises DamagedError."""
        record = records.find(self.store, THING)
        if record is None:
            return None
        files: list[bytes] = []
        for name, info in record.files.items():
            files.append(records.read_file(self.store, THING, name, record))
            file = CheckedFile(self.store, f"{THING}/{name}", info)
            assert file.read_range(0, info.size) == files[-1]
        return files

    def version(self) -> int | None:
        """The version of the thing; None if it is damaged or does not exist."""
        try:
            files = self.read()
        except DamagedError:
            return None
        return None if files is None else int(files[0].split(b" ")[0])

    @invariant()
    def a_reader_gets_a_whole_thing_or_an_error(self) -> None:
        try:
            files = self.read()
        except DamagedError as error:
            assert THING in str(error)
            # Writers alone damage nothing that had the same bits, or that they replace.
            assert not (self.was_whole and self.kind in ("equal", "replaced"))
            assert not self.is_first  # what was never finished does not exist
            return
        if files is None:
            assert not self.was_whole
            return
        version = int(files[0].split(b" ")[0])
        assert sorted(files) == sorted(contents(version).values())
        self.was_whole = True

    @invariant()
    def what_is_finished_stays(self) -> None:
        if self.finished is not None:
            assert self.version() == self.finished


class EqualBits(CommitProtocol):
    kind = "equal"


class DifferentBits(CommitProtocol):
    kind = "different"


class KeptIfFinished(CommitProtocol):
    kind = "kept"


class Replaced(CommitProtocol):
    kind = "replaced"


KINDS = (EqualBits, DifferentBits, KeptIfFinished, Replaced)
STEPS = settings(
    derandomize=True, database=None, deadline=None, stateful_step_count=20, max_examples=25
)


@pytest.mark.parametrize("kind", KINDS)
def test_readers_of_a_thing_with_two_writers_that_are_killed_see_nothing_half(
    kind: type[CommitProtocol],
) -> None:
    run_state_machine_as_test(kind, settings=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_readers_see_nothing_half_in_many_more_orders(kind: type[CommitProtocol]) -> None:
    run_state_machine_as_test(kind, settings=settings(STEPS, max_examples=60))
