"""The fsspec filesystem of a URL: one client for all stores of a process, with timeouts."""

from __future__ import annotations

import asyncio
import os
from functools import lru_cache
from typing import Any

import fsspec.asyn

from raytvb.storage.store_errors import StoreError


def filesystem_of(url: str, scheme: str, *, patient: bool = True) -> Any:
    """The filesystem of a URL, shared by the stores of a process.

    A new client would take 0.2 s and a handshake. patient: whether to repeat failing requests for
    about a minute; if not, they give up within about 20 seconds. Raises StoreError where the
    scheme's package is not installed.
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

    class BoundedS3(S3FileSystem):  # type: ignore[misc]
        """Every request has a timeout.

        aiohttp has no timeout while it sends a body or waits for '100 Continue'.
        """

        async def _call_s3(self, method: str, *options: Any, **arguments: Any) -> Any:
            seconds = 120.0 if patient else 15.0
            seconds += len(arguments.get("Body", b"")) / 2**19  # at least 0.5 MB/s
            return await asyncio.wait_for(super()._call_s3(method, *options, **arguments), seconds)

        call_s3 = fsspec.asyn.sync_wrapper(_call_s3)

        def __reduce__(self) -> tuple[Any, ...]:
            # Other processes have their own credentials and connections.
            return filesystem_of, ("s3://", "s3")

    # Waits of up to 1 + 2 + 4 + 8 s lie between the attempts. Many S3-compatible servers refuse the
    # checksums that botocore adds by default since 1.36.
    config = {
        "connect_timeout": 3,
        "read_timeout": 20,
        "retries": {"mode": "standard", "total_max_attempts": 5 if patient else 2},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    fs = BoundedS3(skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
    # s3fs repeats requests that botocore has repeated already, so the numbers multiply.
    fs.retries = 2 if patient else 1
    return fs
