"""A store whose server fails in all the ways of real ones: same bytes, or a message that helps.

The server is a real one; a proxy makes its requests fail.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from experiments import write_experiment

from raytvb.bench.faulty_proxy import ALL, BODIES, HANG, RESET, STATUSES, FaultyProxy
from raytvb.bench.s3_server import S3Server
from raytvb.storage import filesystems
from raytvb.storage.retries import patience, set_patience
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError, StoreKeyError

pytestmark = pytest.mark.s3


@pytest.fixture
def restored_patience() -> Iterator[None]:
    """The process's patience is afterwards what it was before."""
    before = patience()
    yield
    set_patience(before)


@pytest.fixture
def proxy(
    s3_environment: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    restored_patience: None,
) -> Iterator[FaultyProxy]:
    """A proxy without faults yet, which the S3 client uses. Its hangs last half a second."""
    set_patience(60)
    with FaultyProxy(s3_server.endpoint, 0.0, hang_s=0.5) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def store(proxy: FaultyProxy, s3_environment: str) -> Store:
    return Store(f"{s3_environment}/one")


# The store ----------------------------------------------------------------------------------------


def use_everything(store: Store, folder: Path, rounds: int) -> None:
    """Every method of a store, each with a result that can be told from a wrong one."""
    data = random.Random(0).randbytes(300_000)
    for number in range(rounds):
        key = f"files/{number}"
        store.write(key, data[number:])
        assert store.read(key) == data[number:] == store.find(key)
        assert store.size(key) == len(data) - number
        assert store.exists(key) and not store.exists(f"{key}/none")
        assert store.find(f"missing/{number}") is None
        assert store.read_range(key, 7, 70_000) == data[number + 7 : number + 70_000]
        buffer = bytearray(1000)
        store.read_into(key, 5, memoryview(buffer))
        assert bytes(buffer) == data[number + 5 : number + 1005]
        with store.open(key) as file:
            file.seek(-9, os.SEEK_END)
            assert file.read() == data[-9:]
        store.download(key, folder / str(number))
        assert (folder / str(number)).read_bytes() == data[number:]
        store.write_json(f"json/{number}", {"a": number})
        assert store.read_json(f"json/{number}") == {"a": number}
    keys = sorted(f"files/{number}" for number in range(rounds))
    assert store.keys("files") == keys
    assert store.sizes("files") == {k: len(data) - int(k.removeprefix("files/")) for k in keys}
    assert store.read_many(keys) == [data[int(k.removeprefix("files/")) :] for k in keys]
    store.delete("json")
    assert store.keys() == keys
    assert not store.is_file() and Store(store.where(keys[0])).is_file()


def test_a_tenth_of_all_requests_fails_and_every_byte_is_right(
    store: Store, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.share = 0.1
    use_everything(store, tmp_path, 12)
    assert len(proxy.failed) > len(ALL) / 2
    assert proxy.failed.total() > 0.05 * proxy.requests
    store.check_writable()


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1, 2])
def test_every_way_to_fail_is_survived(
    store: Store, proxy: FaultyProxy, tmp_path: Path, first: int
) -> None:
    proxy.kinds, proxy.share = ALL[first::3], 0.4
    use_everything(store, tmp_path, 2)
    assert set(proxy.failed) == set(ALL[first::3])


@pytest.mark.slow
def test_a_file_in_many_parts_arrives(store: Store, proxy: FaultyProxy, tmp_path: Path) -> None:
    """Uploads in parts of 50 MB, and downloads in blocks, are many requests for one operation."""
    data = random.Random(0).randbytes(2**20) * 101
    proxy.share, proxy.kinds = 0.5, tuple(kind for kind in ALL if kind != HANG)
    store.write("large", data)
    store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert store.read("large") == data
    assert proxy.failed.total() >= 3


@pytest.mark.slow
def test_an_upload_in_parts_that_the_server_no_longer_knows_is_begun_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some servers say NoSuchUpload if an upload's last request is repeated, since its first answer
    was lost. The test's server does so if the upload has been aborted meanwhile.
    """
    fs, requests = store.fs, list[str]()
    plain = fs._request

    async def aborting_once(method: str, *options: object, **arguments: object) -> object:
        requests.append(method)
        if method == "complete_multipart_upload" and requests.count(method) == 1:
            del arguments["MultipartUpload"]
            await plain("abort_multipart_upload", *options, **arguments)
            raise ConnectionResetError("the answer is lost")
        return await plain(method, *options, **arguments)

    monkeypatch.setattr(fs, "_request", aborting_once)
    data = random.Random(0).randbytes(2**20) * 101
    store.write("large", data)
    assert requests.count("create_multipart_upload") == 2, "the whole upload was not repeated"
    assert requests.count("complete_multipart_upload") == 3
    assert store.read("large") == data


def test_a_client_waits_no_longer_than_its_timeout_for_a_silent_server(
    s3_environment: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    restored_patience: None,
) -> None:
    monkeypatch.setattr(filesystems, "REQUEST_S", 1.0)
    set_patience(60)
    with FaultyProxy(s3_server.endpoint, 0.4, [HANG], hang_s=600) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store, started = Store(f"{s3_environment}/one"), time.monotonic()
        for number in range(6):
            store.write(f"a/{number}", b"1")
            assert store.read(f"a/{number}") == b"1"
        assert proxy.failed[HANG] >= 2
        assert time.monotonic() - started < 4 * proxy.failed[HANG] + 10


def test_half_an_answer_that_seems_whole_is_noticed(
    store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that sends fewer bytes than a range asks for, and says so in Content-Length."""
    store.write("a", bytes(range(100)))
    cat_file, answers = store.fs.cat_file, [b"half", b""]

    def short_twice(path: str, **options: object) -> bytes:
        return answers.pop() if answers else cat_file(path, **options)

    monkeypatch.setattr(store.fs, "cat_file", short_twice)
    assert store.read_range("a", 10, 20) == bytes(range(10, 20)) and not answers
    set_patience(1)
    monkeypatch.setattr(store.fs, "cat_file", lambda path, **options: b"half")
    with pytest.raises(StoreError, match=r"one/a: tried \d+ times.*fewer bytes arrived than the"):
        store.read_range("a", 10, 20)
    with pytest.raises(StoreError, match=r"the file is too short"):
        store.read_range("a", 90, 101)


# Giving up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("429", r"Too many requests \[TooManyRequests\]"),
        pytest.param(
            "503", r"Please reduce your request rate \[SlowDown\]", marks=pytest.mark.slow
        ),
        pytest.param(
            RESET,
            "nothing answers at the endpoint: check AWS_ENDPOINT_URL",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_giving_up_says_what_where_how_long_and_what_next(
    store: Store, proxy: FaultyProxy, kind: str, reason: str
) -> None:
    store.write("a", b"1")
    proxy.kinds, proxy.share = (kind,), 1.0
    set_patience(2)
    for action, use in (
        ("read", lambda: store.read("a")),
        ("write", lambda: store.write("a", b"2")),
        ("delete", lambda: store.delete("a")),
    ):
        before, started = proxy.requests, time.monotonic()
        with pytest.raises(StoreError) as caught:
            use()
        assert 2 <= time.monotonic() - started < 8
        what = "list" if action == "delete" else action  # a deletion begins with a listing
        found = re.fullmatch(
            rf"cannot {what} {store.url}/a: tried (\d+) times in [2-7] s, and the last reason was: "
            rf"{reason}.*\. Nothing that is stored is lost: check the server and the network, then "
            r"run the same command again \(resources\.storage_timeout_s sets for how long a run "
            r"tries\)",
            str(caught.value),
        )
        assert found, str(caught.value)
        assert 3 <= int(found[1]) <= proxy.requests - before
    proxy.share = 0.0
    assert store.read("a") == b"1"


def test_what_comes_again_is_said_at_once(store: Store, proxy: FaultyProxy) -> None:
    set_patience(60)
    before, started = proxy.requests, time.monotonic()
    with pytest.raises(StoreKeyError):
        store.read("none")
    with pytest.raises(StoreError, match="bucket does not exist"):
        Store("s3://no-such-bucket/x").write("a", b"1")
    assert proxy.requests - before == 2 and time.monotonic() - started < 10


@pytest.mark.parametrize("kind", ["429", "503", RESET])
def test_a_first_look_gives_up_soon(store: Store, proxy: FaultyProxy, kind: str) -> None:
    set_patience(300)
    proxy.kinds, proxy.share = (kind,), 1.0
    for look in (store.check_writable, store.check_reachable):
        started = time.monotonic()
        with pytest.raises(StoreError, match=f"cannot use {store.url}: "):
            look()
        assert time.monotonic() - started < 5


# Images -------------------------------------------------------------------------------------------


def test_other_schemes_are_tried_again_too(tmp_path: Path, restored_patience: None) -> None:
    """Images may lie behind any URL that fsspec knows, whose clients have errors of their own."""
    data = random.Random(0).randbytes(300_000)
    (tmp_path / "images").write_bytes(data)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    set_patience(60)
    kinds = [kind for kind in ALL if kind != HANG]
    with FaultyProxy(f"http://127.0.0.1:{server.server_port}", 0.5, kinds) as proxy:
        store = Store(proxy.url)
        for _ in range(30):
            assert store.read("images") == data
        assert len(proxy.failed) > len(kinds) / 2
        with pytest.raises(StoreKeyError):
            store.read("none")
        proxy.share, proxy.kinds = 1.0, ("429",)
        set_patience(1)
        with pytest.raises(StoreError, match=r"images: tried \d+ times in [1-5] s.*429"):
            store.read("images")
    server.shutdown()
    server.server_close()


def test_parquet_files_are_read_through_the_store(store: Store, proxy: FaultyProxy) -> None:
    table = pa.table({"n": list(range(200_000))})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=50_000)
    store.write("train.parquet", buffer.getvalue().to_pybytes())
    proxy.share = 0.3
    proxy.kinds = (*STATUSES, RESET, *BODIES)
    for _ in range(3):
        with store.open("train.parquet") as file:
            assert pq.ParquetFile(file, buffer_size=2**16, pre_buffer=False).read().equals(table)
    assert proxy.failed


# The proxy ----------------------------------------------------------------------------------------


def test_a_proxy_runs_as_a_process_of_its_own(s3_server: S3Server) -> None:
    command = [sys.executable, "-m", "raytvb.bench.faulty_proxy", s3_server.endpoint]
    arguments = ["--share", "1", "--kinds", "503"]
    with subprocess.Popen(
        [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        url = process.stdout.readline().strip()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/bucket/key", timeout=20)
        process.stdin.close()  # also what happens if the process that started it dies
        assert json.loads(process.stdout.read()) == {"requests": 1, "failed": {"503": 1}}
    assert process.returncode == 0


def test_the_same_seed_gives_the_same_faults(s3_server: S3Server) -> None:
    def faults(seed: int) -> dict[str, int]:
        with FaultyProxy(s3_server.endpoint, 0.5, ["429", "503"], seed) as proxy:
            for _ in range(40):
                try:
                    urllib.request.urlopen(f"{proxy.url}/healthcheck", timeout=20).close()
                except urllib.error.HTTPError as error:
                    error.close()
            return dict(proxy.failed)

    assert faults(1) == faults(1) != faults(2)


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown faults"):
        FaultyProxy("http://127.0.0.1:1", 0.1, ["418"])


# A whole run --------------------------------------------------------------------------------------

RUN = """
import json, sys
import ray
from ray.util.state import list_tasks
from raytvb.cli.main import main
started = ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
status = main(["run", sys.argv[1]])
url = f"http://{started.dashboard_url}"
tasks = list_tasks(address=url, limit=10_000, raise_on_missing_output=False)
attempts = [(task.name, task.attempt_number) for task in tasks]
print("\\n" + json.dumps([status, attempts]))
ray.shutdown()
"""


def checksums(store: Store) -> dict[str, list[bytes]]:
    """The contents of all tensor files, by folder: the names of a basis's files may differ."""
    made: dict[str, list[bytes]] = {}
    for key in store.keys():
        if key.endswith(".safetensors") and not key.startswith("gram/"):
            made.setdefault(os.path.dirname(key), []).append(store.read(key))
    return {folder: sorted(files) for folder, files in made.items()}


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_through_a_tenth_of_faults_gives_the_same_bits_without_a_second_attempt(
    finished: tuple[Path, Store],
    s3_environment: str,
    s3_server: S3Server,
    tmp_path: Path,
    suite_cache: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{s3_environment}/run"
    file = write_experiment(tmp_path, url)
    with FaultyProxy(s3_server.endpoint, 0.1, hang_s=2.0) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, "RAYTVB_CACHE": suite_cache}
        environment.pop("RAY_ADDRESS", None)
        run = subprocess.run(
            [sys.executable, "-c", RUN, str(file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert run.returncode == 0, run.stderr
        status, attempts = json.loads(run.stdout.splitlines()[-1])
        assert status == 0, run.stdout + run.stderr
        assert len(proxy.failed) > 8 and proxy.failed.total() > 0.05 * proxy.requests
    names = {name for name, _ in attempts}
    assert any("finetune_task" in name for name in names), names
    assert [(name, number) for name, number in attempts if number] == []
    assert checksums(Store(url)) == checksums(finished[1])
    summaries = [store.read_json("report/summary.json") for store in (Store(url), finished[1])]
    assert summaries[0]["addition"] == summaries[1]["addition"]
