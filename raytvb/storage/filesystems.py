"""The fsspec filesystem of a URL: one client for all stores of a process, with timeouts."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import fsspec.asyn

from raytvb.errors import shortened
from raytvb.storage.retries import QUICK_REQUEST_S, quickly, repeated_request
from raytvb.storage.store_errors import StoreError, one_line, reason_of

REQUEST_S = 60.0
"""Seconds that a request may take besides its body."""

SLOWEST = 2**19
"""Bytes a second at which a body must arrive at least."""

BLOCK_BYTES = 2**24
"""Larger files are downloaded in pieces of this size, several at a time."""

_WHOLE_BYTES = 2**26  # bodies up to here are read by the request itself


_S3_HOSTS = r"(s3[.-]|oss-|storage\.googleapis|[a-z0-9-]+\.(digitaloceanspaces|r2\.cloudflare))"
"""How the hosts of well-known servers begin, behind the name of a bucket."""

_anonymous = False


def set_anonymous(anonymous: bool) -> None:
    """Set whether requests to S3 from this process carry no credentials, as public buckets allow.

    anonymous: `resources.anonymous` of the experiment.
    """
    global _anonymous
    _anonymous = anonymous


def is_anonymous() -> bool:
    """Whether requests to S3 from this process carry no credentials."""
    return _anonymous


def filesystem_of(url: str, scheme: str, *, patient: bool = True) -> Any:
    """The filesystem of a URL, shared by the stores of a process.

    A new client would take 0.2 s and a handshake. patient: whether requests to S3 are repeated as
    long as `retries.patience` says; if not, they give up within about 20 seconds. Raises StoreError
    where the scheme's package is not installed, and for an endpoint that is no URL of a server.
    """
    if scheme == "file":
        return fsspec.filesystem("file")
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    if scheme == "s3":
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            _check_endpoint(name, os.environ.get(name, ""), url)
        url = "s3://"
    # The process is in the key because fsspec's event loop does not survive a fork.
    return _client(url, patient, _anonymous, os.getpid(), tuple(settings))


@lru_cache(maxsize=64)
def _check_endpoint(name: str, endpoint: str, url: str) -> None:
    """Raise StoreError unless the variable is not set, or holds the URL of a server.

    A bucket at its end is refused as well. Requests name the bucket, so that it would be there
    twice: the server would answer, and look for every key under a folder of the bucket's name.
    """
    if not endpoint:
        return
    way_out = f"set {name} to the server alone, as in http://host:9000 or https://host"
    try:
        parts = urlsplit(endpoint)
        is_server = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        has_more = bool(parts.username or parts.query or parts.fragment)
    except ValueError:  # a port that is no number, an address that is cut short
        is_server = has_more = False
    if not is_server or has_more or any(character.isspace() for character in endpoint):
        raise StoreError(f"{name} is {shortened(endpoint)}, which is no URL of a server: {way_out}")
    bucket = url.removeprefix("s3://").partition("/")[0]
    path = parts.path.strip("/")
    in_host = re.match(rf"{re.escape(bucket)}\.{_S3_HOSTS}", str(parts.hostname))
    if bucket and (path.rpartition("/")[2] == bucket or in_host):
        raise StoreError(
            f"{name} is {shortened(endpoint)}, with the bucket {bucket!r} of {shortened(url)} in "
            f"it: {way_out}"
        )


@lru_cache(maxsize=16)
def _client(
    url: str, patient: bool, anonymous: bool, pid: int, settings: tuple[tuple[str, str], ...]
) -> Any:
    if url == "s3://":
        return _s3_filesystem(patient, anonymous)
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)[0]
    except ImportError as error:
        raise StoreError(
            f"cannot use {shortened(url)}: it needs a Python package that is not installed "
            f"({one_line(error)}): install it here and on all workers, or use another place"
        ) from error
    except OSError as error:
        raise StoreError(f"cannot use {shortened(url)}: {reason_of(error)}") from error
    except Exception as error:  # of any type: most schemes need settings of their own
        raise StoreError(
            f"cannot use {shortened(url)}: this kind of place needs settings that a URL cannot "
            f"hold: use a folder or s3://bucket/prefix"
        ) from error


def _s3_filesystem(patient: bool, anonymous: bool) -> Any:
    # Imported here because the import takes a second, which local stores need not spend.
    from s3fs import S3FileSystem

    repeat = repeated_request if patient else quickly
    request_s = REQUEST_S if patient else QUICK_REQUEST_S

    class BoundedS3(S3FileSystem):  # type: ignore[misc]
        """Every request has a timeout, and is repeated if it fails in a way that may pass."""

        async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
            async def request() -> Any:
                return await self._request(method, *options, **arguments)

            return await repeat(request)

        call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

        async def _request(self, method: str, *options: Any, **arguments: Any) -> Any:
            """One request. A body that comes back is part of it, so that it can be repeated."""
            # aiohttp has no timeout while it sends a body or waits for '100 Continue'.
            seconds = request_s + len(arguments.get("Body", b"")) / SLOWEST
            request = super()._call_s3(method, *options, **arguments)
            answer = await asyncio.wait_for(request, seconds)
            if method == "get_object" and answer.get("ContentLength", 2**62) <= _WHOLE_BYTES:
                seconds = request_s + answer["ContentLength"] / SLOWEST
                answer["Body"] = await asyncio.wait_for(_whole(answer["Body"]), seconds)
            return answer

        async def _abort_mpu(self, bucket: str, key: str, mpu: str) -> None:
            # The upload has failed already. What remains of it costs space but does no harm, so
            # this is tried once, and its failure does not hide why the upload failed.
            with suppress(Exception):
                await self._request("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=mpu)

        def __reduce__(self) -> tuple[Any, ...]:
            # Other processes have their own credentials and connections.
            return filesystem_of, ("s3://", "s3")

    # `retries` is the one policy, so the client itself tries once. Many S3-compatible servers
    # refuse the checksums that botocore adds by default since 1.36.
    config = {
        "max_pool_connections": 32,  # the time that a request waits for a connection counts
        "connect_timeout": 3,
        "read_timeout": 20,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    fs = BoundedS3(
        anon=anonymous,
        skip_instance_cache=True,
        use_listings_cache=False,
        default_block_size=BLOCK_BYTES,
        config_kwargs=config,
    )
    fs.retries = 1
    return fs


class _Body:
    """A body that has been read, with the methods of one that has not."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._done = 0

    async def read(self, count: int = -1) -> bytes:
        """The next bytes; all that are left if `count` is negative."""
        start = self._done
        self._done = len(self._data) if count < 0 else min(start + count, len(self._data))
        return self._data[start : self._done]

    def close(self) -> None:
        """There is nothing to close."""


async def _whole(body: Any) -> _Body:
    try:
        return _Body(await body.read())
    finally:
        body.close()
