"""Errors of a store, and what a user can do about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs")

_VARIABLES = "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION"
_NO_ANSWER = "the endpoint does not answer in time: check that AWS_ENDPOINT_URL is an S3 server"
_NO_SERVER = "the server cannot be reached: check the network and the URL"

WAYS_OUT = {
    # Codes of an S3 server.
    "NoSuchBucket": "the bucket does not exist: create it, or correct the URL or AWS_ENDPOINT_URL",
    "InvalidAccessKeyId": (
        "the server does not know this access key: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"
    ),
    "SignatureDoesNotMatch": (
        "wrong access key or secret: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ),
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "ExpiredToken": "the credentials have expired: renew them (AWS_SESSION_TOKEN)",
    "InvalidRange": "the file is too short",
    "404": "no such bucket, or not an S3 server: check the URL and AWS_ENDPOINT_URL",
    "501": "this is not an S3 server: check AWS_ENDPOINT_URL",
    # Classes of errors of the S3 client.
    "NoCredentialsError": f"no credentials found: set {_VARIABLES}, or use a role or ~/.aws",
    "EndpointConnectionError": (
        "nothing answers at the endpoint: check AWS_ENDPOINT_URL and that the server runs"
    ),
    "ConnectTimeoutError": (
        "the endpoint cannot be reached: check AWS_ENDPOINT_URL and the network"
    ),
    "FSTimeoutError": _NO_ANSWER,
    "ReadTimeoutError": _NO_ANSWER,
    "TimeoutError": _NO_ANSWER,
    "ValueError": "check the URL and AWS_ENDPOINT_URL (http://host:port)",
    # Errors of the Hugging Face hub and other servers.
    "ConnectError": _NO_SERVER,
    "ConnectionError": _NO_SERVER,
    "RepositoryNotFoundError": (
        "no such repository on the hub, or a private one: check the URL, set HF_TOKEN"
    ),
    "GatedRepoError": "accept the data set's terms on the hub, and set HF_TOKEN",
    # Errors of the file system.
    "PermissionError": (
        "access denied: check the permissions, or the credentials and the bucket's policy"
    ),
    "NotADirectoryError": "a part of the path is a file, not a folder: choose another place",
    "IsADirectoryError": "there is a folder of this name: choose another key, or delete the folder",
}
"""What a user can do about an error, by its `library_code` or the name of its class."""


class StoreError(OSError):
    """A store cannot do an operation. The message names store and key, and what a user can do."""


class StoreKeyError(StoreError, FileNotFoundError):
    """The store has no such key."""


class InterruptedTransferError(OSError):
    """Only a part of a file has arrived, although the connection seemed to be in order."""


class GaveUpError(OSError):
    """A request kept failing until the patience ended. Its cause is the last failure."""

    def __init__(self, attempts: int, seconds: float) -> None:
        super().__init__(f"tried {attempts} times in {seconds:.0f} s")
        self.attempts = attempts
        self.seconds = seconds


def library_code(error: BaseException) -> str:
    """The server's code of a client library's error, or else the name of the error's class.

    '' for errors of other packages.
    """
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__ if type(error).__module__.split(".")[0] in _LIBRARIES else ""


def reason_of(error: BaseException) -> str:
    """Why an operation failed, in one line, with what the user can do about it."""
    name = type(error).__name__
    way_out = WAYS_OUT.get(library_code(error)) or WAYS_OUT.get(name)
    detail = _server_message(error) or str(error) or name
    return f"{way_out} ({detail})" if way_out else detail


@contextmanager
def explained(what: str, *, anything: bool = False) -> Iterator[None]:
    """Turn errors of a storage into a StoreError whose message begins with `what`.

    anything: whether every error is one of the storage. If not, those of Python's own operations
    and of the known client libraries are.
    """
    try:
        yield
    except StoreError:
        raise
    except GaveUpError as error:
        raise StoreError(f"{what}: {_gave_up(error)}") from error
    except Exception as error:
        # ValueError means a malformed endpoint.
        if isinstance(error, (OSError, ValueError)) or library_code(error) or anything:
            raise StoreError(f"{what}: {reason_of(error)}") from error
        raise


def _gave_up(error: GaveUpError) -> str:
    """How long it was tried, the last reason, and what the user can do."""
    reason = reason_of(error.__cause__ or error)
    times = "once" if error.attempts == 1 else f"{error.attempts} times in {error.seconds:.0f} s"
    return (
        f"tried {times}, and the last reason was: {reason}. Nothing that is stored is lost: check "
        f"the server and the network, then run the same command again "
        f"(resources.storage_timeout_s sets for how long a run tries)"
    )


def _server_message(error: BaseException) -> str:
    """What an S3 server said, with its code; '' if the error is none of a server."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            said = response.get("Error", {})
            message, code = str(said.get("Message", "")), str(said.get("Code", ""))
            return f"{message.rstrip('.')} [{code}]" if message and code else message or code
    return ""
