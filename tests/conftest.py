"""Fixtures that several test modules share."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from experiments import write_experiment
from small_store import fill

from raytvb.bench.s3_server import S3Server
from raytvb.cli.main import main
from raytvb.experiment.config import Experiment
from raytvb.storage.store import Store

# Small tensors gain nothing from more threads, and the workers of the tests' Ray need the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where the tests run in the background SIGINT is ignored, also in the processes they start, unless
# there is a handler here; some tests press Ctrl-C in those.
signal.signal(signal.SIGINT, signal.default_int_handler)

_bucket_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server without buckets."""
    with S3Server(tmp_path_factory.mktemp("s3-server")) as server:
        yield server


@pytest.fixture
def s3_environment(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the AWS variables at the test server; the URL of a fresh bucket."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_bucket_numbers)}"
    s3_server.make_bucket(bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh store; the test runs once for each kind of store."""
    if request.param == "local":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3_environment')}/experiments/one"


@pytest.fixture(scope="session")
def suite_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache folder for the drawn images of the embedded suite, shared by all tests and their
    workers.
    """
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server, suite_cache: str) -> Iterator[None]:
    """A local Ray with two CPUs and four GPUs, which are counted but do not exist. Its workers know
    the S3 server.

    The command line, called in this process, finds Ray connected and uses it, so workers stay warm
    between tests.
    """
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in {
            **s3_server.environment,
            "RAYTVB_CACHE": suite_cache,
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_AIR_NEW_OUTPUT": "0",
            "RAY_idle_worker_killing_time_threshold_ms": "60000",
            "RAY_IGNORE_UNHANDLED_ERRORS": "1",
        }.items():
            patch.setenv(name, value)
        ray.init(
            address="local", num_cpus=2, num_gpus=4, include_dashboard=False, log_to_driver=False
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def small(suite_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The experiment of a small store without a search. Tests must not write to the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTVB_CACHE", suite_cache)
        return fill(str(tmp_path_factory.mktemp("small") / "store"))


@pytest.fixture(scope="session")
def finished(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """The experiment file and the local store of a complete run. Tests must not write to them."""
    folder = tmp_path_factory.mktemp("finished")
    file = write_experiment(folder, str(folder / "store"))
    assert main(["run", str(file)]) == 0
    return file, Store(str(folder / "store"))
