"""A client of a Ray cluster's job server, and error messages for addresses that have none.

Ray's own client waits without limit for an address that does not answer, aborts the process on a
token file that it cannot read, and lets RAY_ADDRESS override the address it is given.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from raytvb.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONNECT_S = 10.0
"""An address must answer within this time."""


def job_client(address: str) -> JobSubmissionClient:
    """A client of the job server at `address`.

    address: URL of the dashboard of the Ray head, such as http://127.0.0.1:8265. Raises UserError
    if it is not such a URL, if no Ray cluster answers there, or if the cluster refuses the token.
    """
    address = (address if "://" in address else f"http://{address}").rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"address {address}: expected the URL of the head's dashboard, such as "
            f"http://127.0.0.1:8265"
        )
    _check_token_file()
    _check_answers(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise refused(address, error) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot use the Ray cluster at {address}: {last_line(error)}") from None


def _check_answers(address: str) -> None:
    """Raise UserError unless a Ray dashboard answers in time."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_S) as reply:
            is_ray = "ray_version" in json.loads(reply.read())
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): is its head up, and port 8265 "
            f"forwarded (`ray dashboard cluster/aws.yaml` or `kubectl port-forward`)?"
        ) from None
    if not is_ray:
        raise UserError(f"what answers at {address} is not a Ray dashboard: is the port right?")


def _check_token_file() -> None:
    """Raise UserError if RAY_AUTH_TOKEN_PATH names a token file that is unreadable or empty."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    by_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if not by_token or os.environ.get("RAY_AUTH_TOKEN") or not path:
        return
    try:
        empty = not Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise UserError(f"RAY_AUTH_TOKEN_PATH={path}: {error.strerror}") from None
    if empty:
        raise UserError(f"RAY_AUTH_TOKEN_PATH={path}: the file is empty")


def refused(address: str, error: Exception) -> UserError:
    """The error for a cluster that refuses our token, or wants one and gets none."""
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{address} refused the authentication ({reason}): set RAY_AUTH_MODE=token and give the "
        f"token of the cluster's head in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
    )


def last_line(error: BaseException) -> str:
    """The last line of an error's text, or the name of its type if the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Remove some environment variables for the length of a block."""
    removed = {}
    for name in names:
        if name in os.environ:
            removed[name] = os.environ.pop(name)
    try:
        yield
    finally:
        os.environ.update(removed)
