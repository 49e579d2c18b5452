"""The fsspec filesystem of a URL: one client for all stores of a process, with timeouts."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import lru_cache
from typing import Any

import fsspec.asyn

from raytvb.storage.retries import QUICK_REQUEST_S, quickly, repeated_request
from raytvb.storage.store_errors import StoreError

REQUEST_S = 60.0
"""Seconds that a request may take besides its body."""

SLOWEST = 2**19
"""Bytes a second at which a body must arrive at least."""

BLOCK_BYTES = 2**24
"""Larger files are downloaded in pieces of this size, several at a time."""

_WHOLE_BYTES = 2**26  # bodies up to here are read by the request itself


def filesystem_of(url: str, scheme: str, *, patient: bool = True) -> Any:
    """The filesystem of a URL, shared by the stores of a process.

    A new client would take 0.2 s and a handshake. patient: whether requests to S3 are repeated as
    long as `retries.patience` says; if not, they give up within about 20 seconds. Raises StoreError
    where the scheme's package is not installed.
    """
    if scheme == "file":
        return fsspec.filesystem("file")
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))
    # The process is in the key because fsspec's event loop does not survive a fork.
    return _client("s3://" if scheme == "s3" else url, patient, os.getpid(), tuple(settings))


@lru_cache(maxsize=16)
def _client(url: str, patient: bool, pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    if url == "s3://":
        return _s3_filesystem(patient)
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)[0]
    except ImportError as error:
        raise StoreError(f"cannot use {url}: {error}") from error


def _s3_filesystem(patient: bool) -> Any:
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
