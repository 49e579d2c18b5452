"""Run an experiment as a job on a Ray cluster: upload it, start it there, show its log, pass on how
it ended.

What is uploaded is small: the experiment file and, so that the cluster's image needs only the
dependencies, the source of this raytvb. Results never come back this way: they are in the
experiment's store.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

EXPERIMENT = "experiment.yaml"


# Credentials and places, not AWS_PROFILE, AWS_CONFIG_FILE or AWS_CA_BUNDLE: those name things on
# this machine, and botocore fails where they are missing.
PASSED = frozenset(
    (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "AWS_RESPONSE_CHECKSUM_VALIDATION",
        "AWS_MAX_ATTEMPTS",
        "AWS_RETRY_MODE",
        "HF_TOKEN",
        "HF_HOME",
    )
)


PASSED_PREFIX = "RAYTVB_"


EXCLUDED = [
    ".git",
    ".venv",
    "**/__pycache__",
]  # of a working directory: the job server takes 100 MiB at most


CONNECT_S = 10.0


RECONNECTS = (
    6  # waits of 1, 2, 4 ... 32 s: a port-forward that is restarted within a minute is not noticed
)


INTERRUPTED = 130


def job_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that a job gets: the allow-list above and RAYTVB_*."""
    return {
        name: value
        for name, value in sorted(env.items())
        if name in PASSED or name.startswith(PASSED_PREFIX)
    }


def check_places(experiment: Experiment) -> list[str]:
    """Warnings about local places in an experiment that is to run on another machine.

    Raises UserError for a relative store or data folder: on the cluster it would be in the job's
    own temporary folder.
    """
    places = {"store": experiment.store} | {
        f"data of {t.name}": t.data for t in experiment.tasks if t.data
    }
    local = {
        name: place.removeprefix("file://")
        for name, place in places.items()
        if "://" not in place or place.startswith("file://")
    }
    relative = [
        f"{name}: {place}"
        for name, place in local.items()
        if not Path(place).expanduser().is_absolute()
    ]
    if relative:
        raise UserError(
            f"{'; '.join(relative)}: relative to this machine, so not there on the cluster; use a URL that "
            "every node reaches, such as s3://bucket/prefix, or an absolute path on a one-node cluster"
        )
    return [
        f"{name}: {place} is a path on the cluster's machines, not on this one: right only for one node or a "
        "shared file system"
        for name, place in local.items()
    ]


def pack(experiment: Path, folder: Path, *, with_code: bool = True) -> None:
    """Lay out in `folder` what a job needs: the experiment as experiment.yaml and this raytvb's
    source.
    """
    shutil.copyfile(experiment, folder / EXPERIMENT)
    if not with_code:
        return
    package = Path(__file__).parents[1]
    shutil.copytree(
        package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    try:  # with its name and version, so that records made on the cluster tell which raytvb made them
        found = distribution(package.name)
    except PackageNotFoundError:
        return
    metadata = folder / f"{package.name}-{found.version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {found.version}\n"
    )


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`, the URL of the head's dashboard
    (http://127.0.0.1:8265).

    Raises UserError if the address is no such URL, nothing or no Ray answers there, or the token is
    refused.
    """
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"address {address}: expected the URL of the head's dashboard, such as http://127.0.0.1:8265"
        )
    _check_token_file()
    _check_answers(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with _without(
            "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"
        ):  # Ray lets these override the address it is given
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise _refused(address, error) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot use the Ray cluster at {address}: {_last_line(error)}") from None


def submit(
    experiment: Path,
    address: str,
    *,
    env: Mapping[str, str] | None = None,
    working_dir: Path | None = None,
    follow: bool = True,
    command: str = "run",
    with_code: bool = True,
) -> int:
    """Run `raytvb COMMAND experiment` as a job at `address`; returns the exit code: 0 only for a
    job that succeeded.

    env: where the variables that are passed on are picked from (see `job_environment`); default:
    os.environ.
    working_dir: uploaded as it is in place of the experiment and raytvb's source; must hold the
    experiment file.
    follow: print the job's log until it ends; otherwise return 0 once it is submitted.
    with_code: upload this raytvb's source; otherwise the one installed on the cluster runs.
    Ctrl-C stops following, not the job, and returns 130.

    Raises UserError for a wrong experiment file, a store that the cluster cannot share, an address
    where no cluster answers, a refused token, or a cluster that refuses the job.
    """
    logging.getLogger("ray").setLevel(
        logging.WARNING
    )  # it would tell of each package and connection
    for warning in check_places(load_experiment(experiment)):
        _say(f"Note: {warning}.")
    file = _within(experiment, working_dir) if working_dir else EXPERIMENT
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="raytvb-job-") as folder:
        if not working_dir:
            pack(experiment, Path(folder), with_code=with_code)
        passed = job_environment(os.environ if env is None else env)
        job = _send(client, working_dir or Path(folder), file, command, passed)
    _say(f"Submitted {job}.\n{_commands(client, job)}")
    return follow_job(client, job) if follow else 0


def follow_job(client: JobSubmissionClient, job: str) -> int:
    """Print the log of a job until it ends, over lost connections; its exit code, 0 only if it
    succeeded.

    Ctrl-C leaves the job running and returns 130. Raises UserError when the cluster stays out of
    reach.
    """
    import aiohttp
    from ray.exceptions import AuthenticationError

    log, lost = _Log(), 0
    while True:
        seen = log.printed
        try:
            asyncio.run(log.tail(client, job))
            info = client.get_job_info(job)
            if info.status.is_terminal():
                return _verdict(job, info)
            lost = 0
            time.sleep(1.0)
        except KeyboardInterrupt:
            _say(f"\nNo longer following {job}; it goes on.\n{_commands(client, job)}")
            return INTERRUPTED
        except (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError) as error:
            lost = 1 if log.printed > seen else lost + 1
            if lost > RECONNECTS:
                raise UserError(
                    f"lost {client.get_address()} ({_last_line(error)}); {job} may still run.\n"
                    f"{_commands(client, job)}"
                ) from None
            if lost == 1:
                _say(f"Lost the connection to {client.get_address()}; trying again.")
            time.sleep(2.0 ** (lost - 1))


class _Log:
    """A job's log, printed once however often the connection is made anew (each starts from the
    log's beginning).
    """

    def __init__(self) -> None:
        self.printed = 0

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        position = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, self.printed - position) :]
            position += len(text)
            if fresh:
                print(fresh, end="", flush=True)
                self.printed += len(fresh)


def _send(
    client: JobSubmissionClient, folder: Path, file: str, command: str, env_vars: dict[str, str]
) -> str:
    from ray.exceptions import AuthenticationError

    runtime_env = {"working_dir": str(folder), "excludes": EXCLUDED, "env_vars": env_vars}
    entrypoint = shlex.join(["python", "-m", __package__, command, file])
    try:
        job: str = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
    except AuthenticationError as error:
        raise _refused(client.get_address(), error) from None
    except (OSError, RuntimeError, ValueError) as error:
        too_large = (
            " Is there data in the working directory?" if "status code 413" in str(error) else ""
        )
        raise UserError(
            f"{client.get_address()} did not take the job: {_last_line(error)}{too_large}"
        ) from None
    return job


def _verdict(job: str, info: JobDetails) -> int:
    status = str(info.status)
    if status == "SUCCEEDED":
        _say(f"{job} succeeded.")
        return 0
    reason = (
        (info.message or "")
        .partition("\n")[0]
        .removesuffix(", last available logs (truncated to 20,000 chars):")
    )
    _say(f"{job} {status.lower()}" + (f": {reason}" if reason else "."))
    return info.driver_exit_code or 1


def _within(experiment: Path, folder: Path) -> str:
    try:
        return experiment.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise UserError(
            f"{experiment} is not in the working directory {folder} that is uploaded"
        ) from None


def _check_answers(address: str) -> None:
    """Ray's own requests wait without limit, so ask once with one. Raises UserError unless a Ray
    dashboard answers.
    """
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_S) as reply:
            is_ray = "ray_version" in json.loads(reply.read())
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): is its head up, and port 8265 forwarded "
            "(`ray dashboard cluster/aws.yaml` or `kubectl port-forward`)?"
        ) from None
    if not is_ray:
        raise UserError(f"what answers at {address} is not a Ray dashboard: is the port right?")


def _check_token_file() -> None:
    """Ray aborts the whole process on a token file it cannot read. Raises UserError instead."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if (
        os.environ.get("RAY_AUTH_MODE", "").lower() != "token"
        or os.environ.get("RAY_AUTH_TOKEN")
        or not path
    ):
        return
    try:
        empty = not Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise UserError(f"RAY_AUTH_TOKEN_PATH={path}: {error.strerror}") from None
    if empty:
        raise UserError(f"RAY_AUTH_TOKEN_PATH={path}: the file is empty")


def _refused(address: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{address} refused the authentication ({reason}): set RAY_AUTH_MODE=token and give the token of "
        "the cluster's head in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    )


def _commands(client: JobSubmissionClient, job: str) -> str:
    options = f"--address {client.get_address()}"
    return f"  log:  ray job logs {options} --follow {job}\n  stop: ray job stop {options} {job}"


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
