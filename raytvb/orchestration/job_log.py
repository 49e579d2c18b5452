"""Follows a job on a Ray cluster: prints its log, connects again, and tells how the job ended."""

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
"""Attempts after a lost connection. They wait 1, 2, 4 ... 32 s, so the log goes on if a
port-forward is restarted within a minute.
"""

INTERRUPTED = 130
"""Exit code after Ctrl-C, the same as in a shell."""

LOG_FOLLOWS = ", last available logs (truncated to 20,000 chars):"
"""How Ray's message about a failed job ends. We cut this off: the log was shown already."""


def say(text: str) -> None:
    """Print a line on standard error. Standard output is for the job's log."""
    print(text, file=sys.stderr, flush=True)


def ways_to_follow(client: JobSubmissionClient, job: str) -> str:
    """Ray's commands that show the log of a job and stop it."""
    options = f"--address {client.get_address()}"
    return f"  log:  ray job logs {options} --follow {job}\n  stop: ray job stop {options} {job}"


def follow_job(client: JobSubmissionClient, job: str) -> int:
    """Print the log of a job until the job ends, and connect again where a connection is lost.

    Returns the job's exit code, which is 0 only if the job succeeded. Ctrl-C leaves the job running
    and returns 130. Raises UserError if the cluster stays out of reach.
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
            say(f"\nNo longer following {job}; the job goes on.\n{ways_to_follow(client, job)}")
            return INTERRUPTED
        except (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError) as error:
            lost = 1 if log.printed > seen else lost + 1
            _wait_for_connection(client, job, lost, error)


def _wait_for_connection(
    client: JobSubmissionClient, job: str, lost: int, error: Exception
) -> None:
    """Wait before the next attempt. Raises UserError after too many attempts without new output."""
    if lost > RECONNECTS:
        raise UserError(
            f"lost {client.get_address()} ({last_line(error)}); {job} may still run.\n"
            f"{ways_to_follow(client, job)}"
        ) from None
    if lost == 1:
        say(f"Lost the connection to {client.get_address()}; trying again.")
    time.sleep(2.0 ** (lost - 1))


class _Log:
    """A job's log. Every connection sends it from the start; we skip what is printed already."""

    def __init__(self) -> None:
        self.printed = 0

    async def tail(self, client: JobSubmissionClient, job: str) -> None:
        """Print the new part of the log until the connection ends."""
        position = 0
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, self.printed - position) :]
            position += len(text)
            if fresh:
                print(fresh, end="", flush=True)
                self.printed += len(fresh)


def _verdict(job: str, info: JobDetails) -> int:
    """Say how a job ended. Returns its exit code."""
    status = str(info.status)
    if status == "SUCCEEDED":
        say(f"{job} succeeded.")
        return 0
    reason = (info.message or "").partition("\n")[0].removesuffix(LOG_FOLLOWS)
    say(f"{job} {status.lower()}" + (f": {reason}" if reason else "."))
    return info.driver_exit_code or 1
