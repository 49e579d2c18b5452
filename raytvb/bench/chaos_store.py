"""The store of a disturbed run: a real S3 server behind a proxy that makes requests fail."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from raytvb.bench.chaos_requests import RequestLog
from raytvb.bench.faulty_proxy import FaultyProxy
from raytvb.bench.s3_server import S3Server
from raytvb.errors import UserError
from raytvb.storage.store import Store

BUCKET = "chaos"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

HANG_S = 3.0
"""A request that gets no answer is reset after this time."""


@dataclass(frozen=True)
class WatchedStore:
    """A store that is used through a proxy."""

    url: str
    proxy: FaultyProxy | None
    """None if the store cannot be put behind the proxy: no request fails, and none is seen."""
    log: RequestLog | None
    """The requests that the store has answered; None without a proxy."""


@contextmanager
def watched_store(url: str | None, folder: Path, seed: int) -> Iterator[WatchedStore]:
    """A store behind a proxy that lets all requests pass until its `share` is changed.

    url: of the store; None: a bucket of an S3 server in `folder`, which is started here. A store on
    S3 is put behind the proxy if the AWS variables name an endpoint without TLS. In the block, the
    variables of this process name the proxy instead. Raises UserError if the store is not empty.
    """
    with ExitStack() as stack:
        if url is None:
            server = stack.enter_context(S3Server(folder))
            server.make_bucket(BUCKET)
            stack.enter_context(_environment(server.environment))
            url = f"s3://{BUCKET}/run"
        if Store(url).keys():
            raise UserError(f"{url} is not empty: give another --store")
        endpoint = _endpoint()
        if not url.startswith("s3://") or not endpoint.startswith("http://"):
            yield WatchedStore(url, None, None)
            return
        proxy = stack.enter_context(FaultyProxy(endpoint, 0.0, seed=seed, hang_s=HANG_S))
        stack.enter_context(_environment(dict.fromkeys(ENDPOINTS, proxy.url)))
        log = RequestLog(urlsplit(url).netloc + urlsplit(url).path)
        proxy.answered = log.answered
        yield WatchedStore(url, proxy, log)


def _endpoint() -> str:
    for name in ENDPOINTS:
        if os.environ.get(name):
            return os.environ[name]
    return ""


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
