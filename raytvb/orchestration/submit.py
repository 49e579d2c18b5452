"""Runs an experiment as a job on a Ray cluster: uploads it, starts it, shows its log, and returns
the job's exit code.

The upload is small: the experiment file and the source of this raytvb, so that the cluster's image
needs only the dependencies. Results do not come back this way; they are in the experiment's store.
"""

from __future__ import annotations

import logging
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raytvb.errors import UserError
from raytvb.experiment.parsing import load_experiment
from raytvb.orchestration.job_client import job_client, last_line, refused
from raytvb.orchestration.job_log import follow_job, say, ways_to_follow
from raytvb.orchestration.passed_variables import job_environment
from raytvb.orchestration.upload import EXPERIMENT, check_places, pack
from raytvb.report.formatting import format_bytes

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDED = [".git", ".venv", "**/__pycache__"]
"""What the upload of a working directory leaves out: the job server takes at most 100 MiB."""


def submit(
    experiment: Path,
    address: str,
    *,
    env: Mapping[str, str] | None = None,
    working_dir: Path | None = None,
    follow: bool = True,
    command: str = "run",
    with_code: bool = True,
    options: Sequence[str] = (),
) -> int:
    """Run `raytvb COMMAND experiment` as a job on the cluster at `address`.

    Returns the job's exit code, which is 0 only for a job that succeeded.

    Args:
        experiment: the experiment file.
        address: URL of the dashboard of the Ray head.
        env: environment from which `job_environment` picks the variables that the job gets;
            default: os.environ.
        working_dir: folder to upload as it is, instead of the experiment and raytvb's source. It
            must hold the experiment file.
        follow: print the job's log until it ends; otherwise return 0 once it is submitted. Ctrl-C
            stops following, not the job, and returns 130.
        command: `run` or a stage.
        with_code: upload this raytvb's source; otherwise the job uses the raytvb of the cluster.
        options: of the command, such as `--yes`.

    Raises UserError for a wrong experiment file, a store that the cluster cannot share, an address
    where no cluster answers, a refused token, or a cluster that refuses the job.
    """
    # Ray would print a line for every package and connection.
    logging.getLogger("ray").setLevel(logging.WARNING)
    for warning in check_places(load_experiment(experiment)):
        say(f"Note: {warning}.")
    file = _path_within(experiment, working_dir) if working_dir else EXPERIMENT
    client = job_client(address)
    with tempfile.TemporaryDirectory(prefix="raytvb-job-") as folder:
        if not working_dir:
            pack(experiment, Path(folder), with_code=with_code)
        variables = job_environment(os.environ if env is None else env)
        words = job_command(command, file, options)
        job = _send(client, working_dir or Path(folder), words, variables)
    say(f"Submitted {job}.\n{ways_to_follow(client, job)}")
    return follow_job(client, job) if follow else 0


def job_command(command: str, file: str, options: Sequence[str] = ()) -> list[str]:
    """The command that runs in the uploaded folder, with its raytvb or else the cluster's own."""
    return ["python", "-m", "raytvb", command, file, *options]


def _send(
    client: JobSubmissionClient, folder: Path, words: list[str], env_vars: dict[str, str]
) -> str:
    """Upload the folder and run a command in it. Returns the id of the job."""
    from ray.exceptions import AuthenticationError

    runtime_env = {"working_dir": str(folder), "excludes": EXCLUDED, "env_vars": env_vars}
    try:
        job: str = client.submit_job(entrypoint=shlex.join(words), runtime_env=runtime_env)
    except AuthenticationError as error:
        raise refused(client.get_address(), error) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{client.get_address()} did not take the job: {last_line(error)} (the working "
            f"directory that is sent has {format_bytes(_folder_bytes(folder))})"
        ) from None
    return job


def _folder_bytes(folder: Path) -> int:
    """Bytes of the files below a folder that are sent: a head refuses what is too large."""
    left_out = {pattern.removeprefix("**/") for pattern in EXCLUDED}
    size = 0
    for file in folder.rglob("*"):
        if file.is_file() and not left_out.intersection(file.relative_to(folder).parts):
            size += file.stat().st_size
    return size


def _path_within(experiment: Path, folder: Path) -> str:
    """The path of the experiment file, relative to the folder that is uploaded."""
    try:
        return experiment.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise UserError(
            f"{experiment} is not in the working directory {folder} that is uploaded"
        ) from None
