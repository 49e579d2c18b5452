"""Following a job on a Ray cluster: its log, lost connections, and how it ended."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

from raytvb.errors import UserError
from raytvb.orchestration.job_client import last_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RECONNECTS = 6
"""Attempts after a lost connection, which wait 1, 2, 4 ... 32 s: a port-forward that is restarted
within a minute is not noticed.
"""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as of a shell."""

LOG_FOLLOWS = ", last available logs (truncated to 20,000 chars):"
"""The end of Ray's message about a failed job: its log was shown already."""


def say(text: str) -> None:
    """A line on standard error: standard output is for the job's log."""
    print(text, file=sys.stderr, flush=True)


def ways_to_follow(client: JobSubmissionClient, job: str) -> str:
    """Ray's commands that show the log of a job and stop it."""
    options = f"--address {client.get_address()}"
    return f"  log:  ray job logs {options} --follow {job}\n  stop: ray job stop {options} {job}"


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
            say(f"\nNo longer following {job}; it goes on.\n{ways_to_follow(client, job)}")
            return INTERRUPTED
        except (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError) as error:
            lost = 1 if log.printed > seen else lost + 1
            _wait_for_connection(client, job, lost, error)


def _wait_for_connection(
    client: JobSubmissionClient, job: str, lost: int, error: Exception
) -> None:
    """Wait before the next attempt. Raises UserError after too many in a row without any news."""
    if lost > RECONNECTS:
        raise UserError(
            f"lost {client.get_address()} ({last_line(error)}); {job} may still run.\n"
            f"{ways_to_follow(client, job)}"
        ) from None
    if lost == 1:
        say(f"Lost the connection to {client.get_address()}; trying again.")
    time.sleep(2.0 ** (lost - 1))


class _Log:
    """A job's log. Each connection starts from its beginning; what was printed is left out."""

    def __init__(self) -> None:
        self.printed = 0

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        """Print what is new until the connection ends."""
        position = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, self.printed - position) :]
            position += len(text)
            if fresh:
                print(fresh, end="", flush=True)
                self.printed += len(fresh)


def _verdict(job: str, info: JobDetails) -> int:
    """Say how a job ended; its exit code."""
    status = str(info.status)
    if status == "SUCCEEDED":
        say(f"{job} succeeded.")
        return 0
    reason = (info.message or "").partition("\n")[0].removesuffix(LOG_FOLLOWS)
    say(f"{job} {status.lower()}" + (f": {reason}" if reason else "."))
    return info.driver_exit_code or 1
