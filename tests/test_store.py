"""One contract for every kind of store: a folder, a bucket on a real S3 server, and memory.

Then what only one kind can meet: folders without permission, missing buckets, wrong credentials.
"""

from __future__ import annotations

import itertools
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError, StoreKeyError

IMPORT = "import sys; from raytvb.storage.store import Store"  # for child processes


KINDS = ["folder", pytest.param("s3", marks=pytest.mark.s3), "memory"]

_memory_numbers = itertools.count()


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A fresh store; the test runs once for each kind of store."""
    match request.param:
        case "folder":
            return Store(str(tmp_path / "store"))
        case "s3":
            return Store(f"{request.getfixturevalue('s3_environment')}/experiments/one")
        case _:
            return Store(f"memory://experiments/{next(_memory_numbers)}")


class TestEveryKindOfStore:
    """The contract of a store of any kind."""

    def test_round_trip(self, store: Store) -> None:
        store.check_writable()
        assert store.keys() == []
        store.write("a/b/data.bin", b"\x00\xffpayload")
        store.write("empty", b"")
        assert store.read("a/b/data.bin") == b"\x00\xffpayload"
        assert store.read("empty") == b""
        assert store.exists("a/b/data.bin") and store.size("a/b/data.bin") == 9
        assert store.exists("empty") and store.size("empty") == 0

    def test_only_files_are_keys(self, store: Store) -> None:
        store.write("a/b", b"1")
        for key in ("a", "a/b/c", "missing"):
            assert not store.exists(key)
            for read in (store.read, store.size, store.read_json):
                with pytest.raises(StoreKeyError):
                    read(key)

    def test_missing_key_says_which(self, store: Store, tmp_path: Path) -> None:
        target = tmp_path / "target"
        with pytest.raises(FileNotFoundError, match=f"{store.url}/no/such.json") as caught:
            store.read("no/such.json")
        assert isinstance(caught.value, StoreError)
        with pytest.raises(StoreKeyError):
            store.read_range("no/such.json", 0, 1)
        with pytest.raises(StoreKeyError):
            store.download("no/such.json", target)
        assert not target.exists()

    def test_ranges(self, store: Store) -> None:
        store.write("data", bytes(range(100)))
        assert store.read_range("data", 0, 100) == bytes(range(100))
        assert store.read_range("data", 7, 9) == bytes([7, 8])
        assert store.read_range("data", 9, 9) == b""
        for start, stop in ((90, 101), (100, 101), (500, 600)):
            with pytest.raises(StoreError, match="too short"):
                store.read_range("data", start, stop)
        with pytest.raises(ValueError, match="not a byte range"):
            store.read_range("data", 5, 4)

    def test_a_file_is_open_for_reading_at_any_position(self, store: Store) -> None:
        store.write("data", bytes(range(100)))
        with store.open("data") as file:
            assert file.read(3) == bytes([0, 1, 2]) and file.tell() == 3
            assert file.seek(-2, os.SEEK_END) == 98 and file.read() == bytes([98, 99])
            assert file.read(1) == b"" and file.seek(500) == 500 and file.read() == b""
            file.seek(50)
            assert file.seek(-1, os.SEEK_CUR) == 49 and file.read(1) == bytes([49])
        with pytest.raises(StoreKeyError):
            store.open("none")

    def test_overwrite_is_atomic(self, store: Store) -> None:
        versions = [bytes([n]) * 200_000 for n in range(8)]
        store.write("data", versions[0])
        done = threading.Event()

        def read_all_the_while() -> set[bytes]:
            other, seen = Store(store.url), set()
            while not done.is_set():
                seen.add(other.read("data"))
            return seen

        with ThreadPoolExecutor(1) as pool:
            seen = pool.submit(read_all_the_while)
            for version in versions:
                store.write("data", version)
            done.set()
            assert seen.result() <= set(versions)
        assert store.read("data") == versions[-1]

    def test_a_large_file_is_downloaded(self, store: Store, tmp_path: Path) -> None:
        data = random.Random(0).randbytes(12 * 2**20)
        store.write("large/file", data)
        assert store.size("large/file") == len(data)
        store.download("large/file", tmp_path / "made" / "copy")
        assert (tmp_path / "made" / "copy").read_bytes() == data
        assert os.listdir(tmp_path / "made") == ["copy"]
        assert store.read_range("large/file", 9_000_000, 9_000_100) == data[9_000_000:9_000_100]

    def test_keys_are_recursive_sorted_and_fresh(self, store: Store) -> None:
        other = Store(store.url)
        for key in ("b/2", "a", "b/10", "b-c/1", "b/d/e"):
            before = store.keys()
            other.write(key, b"x")
            assert store.keys() == sorted([*before, key]) and store.exists(key)
        assert store.keys() == ["a", "b-c/1", "b/10", "b/2", "b/d/e"]
        assert store.keys("b") == store.keys("b/") == ["b/10", "b/2", "b/d/e"]
        assert store.keys("a") == ["a"]
        assert store.keys("b/d/e/f") == store.keys("nothing") == []
        other.delete("b/2")
        assert store.keys("b") == ["b/10", "b/d/e"]

    def test_sizes_are_those_of_what_is_listed(self, store: Store) -> None:
        for key, count in (("b/2", 2), ("a", 0), ("b/d/e", 5), ("b-c/1", 1)):
            store.write(key, bytes(count))
        assert store.sizes() == {"a": 0, "b-c/1": 1, "b/2": 2, "b/d/e": 5}
        assert list(store.sizes()) == store.keys()
        assert store.sizes("b") == store.sizes("b/") == {"b/2": 2, "b/d/e": 5}
        assert store.sizes("a") == {"a": 0}
        assert store.sizes("nothing") == {}
        store.write("b/2", b"")
        store.delete("b/d")
        assert store.sizes("b") == {"b/2": 0}

    def test_what_may_be_missing_is_found_or_none(self, store: Store) -> None:
        store.write("a/b", b"1")
        store.write("empty", b"")
        assert store.find("a/b") == b"1" and store.find("empty") == b""
        for key in ("a", "a/b/c", "missing"):
            assert store.find(key) is None
        with pytest.raises(ValueError, match="not a key"):
            store.find("../a")

    def test_many_files_are_read_in_the_order_of_their_keys(self, store: Store) -> None:
        keys = [f"a/{number}" for number in range(20)]
        for number, key in enumerate(keys):
            store.write(key, bytes([number]))
        assert store.read_many(keys[::-1]) == [bytes([number]) for number in reversed(range(20))]
        assert store.read_many([]) == []
        with pytest.raises(StoreKeyError, match="a/none"):
            store.read_many([*keys, "a/none"])

    def test_delete(self, store: Store) -> None:
        for key in ("a/1", "a/b/2", "a/*", "ab/3", "c"):
            store.write(key, b"x")
        store.delete("a/*")
        assert store.keys() == ["a/1", "a/b/2", "ab/3", "c"]
        store.delete("a")
        store.delete("c")
        assert store.keys() == ["ab/3"]
        store.delete("a")
        store.delete("ab/3/4")
        assert store.keys() == ["ab/3"]

    def test_pickles_as_its_url(self, store: Store) -> None:
        store.write("a", b"1")
        copy = pickle.loads(pickle.dumps(store))
        assert copy.url == store.url and copy.read("a") == b"1"
        assert len(pickle.dumps(store)) < 200
        assert pickle.loads(pickle.dumps(store.fs)).cat_file(store.path("a")) == b"1"

    def test_works_in_threads(self, store: Store) -> None:
        store.write("a", b"1")
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(store.read, ["a"] * 16)) == {b"1"}

    def test_json_is_stable(self, store: Store) -> None:
        store.write_json("x.json", {"b": [1, 2.5, None], "a": "Ω"})
        assert (
            store.read("x.json").decode() == '{\n "a": "Ω",\n "b": [\n  1,\n  2.5,\n  null\n ]\n}\n'
        )
        assert store.read_json("x.json") == {"a": "Ω", "b": [1, 2.5, None]}
        with pytest.raises(ValueError, match="JSON"):
            store.write_json("x.json", float("nan"))
        store.write("x.json", b"{")
        with pytest.raises(StoreError, match=r"x\.json cannot be read: it is not JSON"):
            store.read_json("x.json")


@pytest.mark.s3
def test_works_after_a_fork(s3_environment: str) -> None:
    Store(s3_environment).write("a", b"1")
    script = (
        f"{IMPORT}; import os\n"
        "store = Store(sys.argv[1]); store.read('a'); child = os.fork()\n"
        "if child: sys.exit(os.waitpid(child, 0)[1])\n"
        "os._exit(store.read('a') != b'1')"
    )
    assert (
        subprocess.run([sys.executable, "-c", script, s3_environment], timeout=60).returncode == 0
    )


@pytest.mark.parametrize(
    "module", ["store", "filesystems", "contract", "format_version", "records", "verify"]
)
def test_looking_into_a_local_store_imports_nothing_heavy(module: str) -> None:
    heavy = {"torch", "numpy", "pyarrow", "safetensors", "s3fs", "aiobotocore", "botocore"}
    script = (
        f"import sys; at_start = set(sys.modules); import raytvb.storage.{module}\n"
        f"print(*sorted({heavy} & (set(sys.modules) - at_start)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/../b",
        ".",
        "a\\b",
        "a\nb",
        "a?versionId=1",
        ".raytvb-tmp-1",
    ],
)
def test_bad_keys_are_refused(tmp_path: Path, key: str) -> None:
    store = Store(str(tmp_path))
    for use in (
        store.exists,
        store.read,
        store.delete,
        store.read_json,
        lambda k: store.write(k, b""),
    ):
        with pytest.raises(ValueError, match="not a key"):
            use(key)


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("here").url == Store(f"file://{tmp_path}/here/").url == str(tmp_path / "here")
    assert Store("here").local_path("a/b") == str(tmp_path / "here/a/b")
    assert Store("s3://bucket/x/").url == "s3://bucket/x"
    assert Store("s3://bucket/x").local_path("a") is None
    for url, problem in (
        ("nope://x", "nope"),
        ("s3://", "no bucket"),
        ("s3:/bucket", "s3:/bucket"),
        ("", "URL"),
    ):
        with pytest.raises(StoreError, match=problem):
            Store(url)


def test_a_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / "file" / "sub"))
    with pytest.raises(StoreError, match="is a file, not a folder"):
        store.check_writable()
    with pytest.raises(StoreError, match="is a file, not a folder"):
        store.write("a", b"")
    assert store.keys() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="access denied"):
        Store(str(tmp_path)).check_writable()


@pytest.mark.s3
def test_a_missing_bucket_is_an_error(s3_environment: str) -> None:
    store = Store("s3://no-such-bucket/x")
    for use in (
        store.check_writable,
        store.keys,
        lambda: store.read("a"),
        lambda: store.write("a", b""),
    ):
        with pytest.raises(
            StoreError, match=r"s3://no-such-bucket/x.*bucket does not exist"
        ) as caught:
            use()
        assert not isinstance(caught.value, StoreKeyError)


@pytest.mark.s3
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "wrong")
    store = Store(s3_environment)
    with pytest.raises(StoreError, match=variable):
        store.check_writable()
    with pytest.raises(StoreError) as caught:
        store.write("a", bytes(9 * 2**20))
    assert "cannot write" in str(caught.value) and variable in str(caught.value)
    for use in (store.keys, lambda: store.exists("a"), lambda: store.delete("a")):
        with pytest.raises(StoreError):
            use()


@pytest.mark.s3
def test_no_credentials(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StoreError, match="no credentials found"):
        Store(s3_environment).check_writable()


@pytest.mark.s3
def test_an_endpoint_where_nothing_listens(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        socket.socket() as held
    ):  # bound but not listening: nobody else can take the port, and connecting is refused
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"nothing answers at the endpoint.*AWS_ENDPOINT_URL"):
            Store(s3_environment).check_writable()
    assert time.monotonic() - started < 20


@pytest.mark.s3
@pytest.mark.slow
def test_an_endpoint_that_never_answers(
    s3_environment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"does not answer in time.*AWS_ENDPOINT_URL"):
            Store(s3_environment).check_writable()
        assert time.monotonic() - started < 25
