"""Errors of a store, and what a user can do about them."""

from __future__ import annotations

import errno
import os
import re
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
    "InvalidBucketName": "no bucket can have this name: correct the URL",
    "SignatureDoesNotMatch": (
        "wrong access key or secret: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ),
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "ExpiredToken": "the credentials have expired: renew them (AWS_SESSION_TOKEN)",
    "InvalidRange": "the file is too short",
    "404": "no such bucket, or not an S3 server: check the URL and AWS_ENDPOINT_URL",
    "501": "this is not an S3 server: check AWS_ENDPOINT_URL",
    # Classes of errors of the S3 client.
    "NoCredentialsError": (
        f"no credentials found: set {_VARIABLES}, or use a role or ~/.aws; for a public bucket, "
        f"put `resources: {{anonymous: true}}` into the experiment file, or give --anonymous to a "
        f"command that looks into a store"
    ),
    "PartialCredentialsError": (
        "half of the credentials is missing: set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    ),
    "ProfileNotFound": "correct or unset AWS_PROFILE, or add the profile to ~/.aws/config",
    "ConfigParseError": "correct ~/.aws/config, or the file that AWS_CONFIG_FILE names",
    "InvalidRegionError": "correct AWS_DEFAULT_REGION",
    "InvalidRetryModeError": "correct or unset AWS_RETRY_MODE",
    "SSLError": "the server's certificate is refused: check AWS_ENDPOINT_URL and AWS_CA_BUNDLE",
    "HTTPClientError": (
        "the request could not be sent: check AWS_ENDPOINT_URL, AWS_CA_BUNDLE and the proxy"
    ),
    "ProxyConnectionError": "the proxy cannot be reached: check HTTPS_PROXY and HTTP_PROXY",
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
    "gaierror": "no host of this name is known: check the URL and the network",
    "RepositoryNotFoundError": (
        "no such repository on the hub, or a private one: check the URL, set HF_TOKEN"
    ),
    "GatedRepoError": "accept the data set's terms on the hub, and set HF_TOKEN",
    # Errors of the file system.
    "PermissionError": (
        "access denied: check the permissions, or the credentials and the bucket's policy"
    ),
    "NotADirectoryError": "a part of the path is a file, not a folder: choose another place",
    "FileExistsError": (
        "there is a file where a folder is needed: choose another place, or delete the file"
    ),
    "IsADirectoryError": "there is a folder of this name: choose another key, or delete the folder",
}
"""What a user can do about an error, by its `library_code` or the name of its class."""


_OS_REASONS = {
    errno.ENOENT: "there is no such file or folder: check the path",
    errno.EACCES: "access denied: check the permissions",
    errno.EPERM: "this is not permitted: check the permissions, and whether the disk is read-only",
    errno.EISDIR: "this is a folder, and a file is needed: name a file in it",
    errno.ENOTDIR: WAYS_OUT["NotADirectoryError"],
    errno.EEXIST: WAYS_OUT["FileExistsError"],
    errno.ENAMETOOLONG: (
        "the path is too long, or a name in it (most disks take 255 bytes): choose shorter ones"
    ),
    errno.ELOOP: "symbolic links lead in a circle: correct them",
    errno.EROFS: "the disk can only be read: choose a place on another one",
    errno.ENOSPC: "the disk is full: free some space, or choose a place on another one",
    errno.EDQUOT: "the quota of this disk is used up: free some space, or choose another place",
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n`)",
    errno.EIO: "the disk failed: check it, and the network if it is a remote one",
    errno.ENXIO: "this is neither a file nor a folder: choose another place",
    errno.EINVAL: "the system refuses this path: choose another one",
    errno.ECONNREFUSED: "nothing answers at this address: check the URL and that the server runs",
    errno.ETIMEDOUT: _NO_SERVER,
    errno.EHOSTUNREACH: _NO_SERVER,
    errno.ENETUNREACH: _NO_SERVER,
}
"""Errors of the operating system, and what a user can do about them."""


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
    if isinstance(error, StoreError):
        return str(error)
    code = library_code(error)
    if isinstance(error, OSError) and error.errno in _OS_REASONS and not code:
        return os_message(error)
    way_out = WAYS_OUT.get(code) or WAYS_OUT.get(type(error).__name__)
    detail = _server_message(error) or one_line(error)
    if way_out:
        return f"{way_out} ({detail})"
    return f"{detail}: check the URL and the server" if code else detail


def one_line(error: BaseException) -> str:
    """The text of another package's error in one line, or else the name of its class."""
    text = re.sub(r"\[Errno -?\d+\] *", "", " ".join(str(error).split()))
    text = text.rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def os_reason(error: OSError) -> str:
    """Why the operating system refused something, and what a user can do about it."""
    return _OS_REASONS.get(error.errno or 0) or error.strerror or str(error)


def os_message(error: OSError) -> str:
    """As `os_reason`, with the path."""
    path = error.filename
    if not isinstance(path, str | bytes | os.PathLike):
        return os_reason(error)
    text = os.fsdecode(path)
    return f"{os_reason(error)} ({text if len(text) <= 300 else f'{text[:299]}…'})"


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
