"""Which failures of a storage are tried again, how long, and what is said afterwards."""

from __future__ import annotations

import asyncio
import errno
import http.client
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
import requests
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from s3fs.errors import translate_boto_error

from raytvb.storage import retries
from raytvb.storage.retries import patience, quickly, repeated, repeated_request, set_patience
from raytvb.storage.store import Store
from raytvb.storage.store_errors import (
    GaveUpError,
    InterruptedTransferError,
    StoreError,
    StoreKeyError,
)
from raytvb.storage.transient import is_transient


@pytest.fixture(autouse=True)
def restored_patience() -> Iterator[None]:
    before = patience()
    yield
    set_patience(before)


def s3(status: int, code: str = "") -> Exception:
    """What s3fs raises for an answer of this status; without a code it is one without a body."""
    answer = {
        "Error": {"Code": code or str(status), "Message": "said the server"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    translated = translate_boto_error(ClientError(answer, "GetObject"))
    assert isinstance(translated, Exception)
    return translated


def web(status: int) -> requests.HTTPError:
    """What requests raises, which the Hugging Face hub and others use."""
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


def gcs(status: object) -> Exception:
    """What gcsfs raises: the status is in `code`, as a number or a text."""
    error = Exception("said the server")
    error.code = status  # type: ignore[attr-defined]
    return error


def aio(status: int) -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo("http://x", "GET", headers=None)  # type: ignore[arg-type]
    return aiohttp.ClientResponseError(info, (), status=status)


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def bad_certificate() -> Exception:
    """As aiobotocore raises it: a connection error in whose context the certificate is refused."""
    try:
        try:
            raise ssl.SSLCertVerificationError("certificate verify failed")
        except ssl.SSLError as error:
            raise SSLError(endpoint_url="https://x", error=error)  # noqa: B904
    except Exception as error:
        return error


PASSING = [
    *(s3(status) for status in (408, 425, 429, 500, 502, 503, 504, 520)),
    *(web(status) for status in (408, 429, 503)),
    *(gcs(status) for status in (429, "503")),
    *(aio(status) for status in (425, 500)),
    s3(503, "SlowDown"),
    s3(400, "RequestTimeout"),
    s3(400, "IncompleteBody"),
    s3(403, "RequestThrottled"),
    s3(409, "OperationAborted"),
    s3(200, "InternalError"),
    EndpointConnectionError(endpoint_url="http://x"),
    ConnectTimeoutError(endpoint_url="http://x"),
    ReadTimeoutError(endpoint_url="http://x"),
    aiohttp.ClientPayloadError("not completed"),
    caused(aiohttp.ClientPayloadError("not completed"), aiohttp.http.HttpProcessingError(code=400)),
    aiohttp.ServerDisconnectedError(),
    requests.ConnectionError(),
    requests.Timeout(),
    requests.exceptions.ChunkedEncodingError(),
    http.client.IncompleteRead(b""),
    asyncio.TimeoutError(),
    TimeoutError(),
    ConnectionResetError(),
    ConnectionRefusedError(),
    BrokenPipeError(),
    caused(OSError("read failed"), ConnectionResetError()),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.ENOTCONN, "transport endpoint is not connected"),
    InterruptedTransferError("half a file"),
]
LASTING = [
    *(s3(status) for status in (301, 400, 401, 403, 404, 405, 412, 416, 501, 507)),
    *(web(status) for status in (401, 404)),
    gcs(404),
    gcs("NoSuchKey"),
    aio(403),
    s3(404, "NoSuchBucket"),
    s3(404, "NoSuchKey"),
    s3(404, "NoSuchUpload"),
    s3(403, "SignatureDoesNotMatch"),
    s3(403, "InvalidAccessKeyId"),
    s3(400, "ExpiredToken"),
    s3(416, "InvalidRange"),
    bad_certificate(),
    NoCredentialsError(),
    FileNotFoundError(errno.ENOENT, "no such file"),
    PermissionError(errno.EACCES, "permission denied"),
    OSError(errno.ENOSPC, "no space left on device"),
    OSError(errno.EDQUOT, "disk quota exceeded"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.EMFILE, "too many open files"),
    OSError("only 3 of the bytes exist"),
    IsADirectoryError(),
    ValueError("malformed endpoint"),
    KeyError("a"),
    StoreKeyError("no such key"),
    caused(StoreError("given up"), caused(GaveUpError(3, 1.0), TimeoutError())),
    caused(GaveUpError(3, 1.0), TimeoutError()),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_would_come_again_is_not_tried_again(error: Exception) -> None:
    assert not is_transient(error)


def test_ctrl_c_is_not_tried_again() -> None:
    assert not is_transient(KeyboardInterrupt())
    assert not is_transient(asyncio.CancelledError())


class Failing:
    """A call that fails a number of times, then succeeds."""

    def __init__(self, times: float, error: Exception) -> None:
        self.calls, self._times, self._error = 0, times, error

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._times:
            raise self._error
        return "done"

    async def request(self) -> str:
        return self()


def test_a_call_is_repeated_until_it_succeeds() -> None:
    set_patience(20)
    call = Failing(3, TimeoutError())
    assert repeated(call) == "done" and call.calls == 4
    call = Failing(3, TimeoutError())
    assert asyncio.run(repeated_request(call.request)) == "done" and call.calls == 4


def test_a_lasting_error_is_raised_as_it_is_at_once() -> None:
    set_patience(20)
    error = PermissionError("no")
    for run in (repeated, lambda call: asyncio.run(repeated_request(call.request))):
        call = Failing(9, error)
        with pytest.raises(PermissionError) as caught:
            run(call)
        assert caught.value is error and call.calls == 1


def test_patience_ends_when_it_says() -> None:
    set_patience(1.5)
    call, started = Failing(float("inf"), ConnectionResetError("reset")), time.monotonic()
    with pytest.raises(GaveUpError) as caught:
        repeated(call)
    assert 1.5 <= time.monotonic() - started < 2.5
    assert caught.value.attempts == call.calls > 2 and 1.5 <= caught.value.seconds < 2.5
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_patience_counts_from_the_first_failure() -> None:
    """A long transfer that fails at its end is worth another try."""
    set_patience(0.4)
    times = iter([0.8, 0.0])

    def slow() -> str:
        seconds = next(times)
        time.sleep(seconds)
        if seconds:
            raise TimeoutError
        return "done"

    assert repeated(slow) == "done"


def test_without_patience_nothing_is_repeated() -> None:
    set_patience(0)
    call = Failing(1, TimeoutError())
    with pytest.raises(GaveUpError):
        repeated(call)
    assert call.calls == 1


def test_a_quick_call_ends_soon_with_the_last_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    set_patience(300)
    call, started = Failing(float("inf"), ConnectionRefusedError("refused")), time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(quickly(call.request))
    assert call.calls == retries._QUICK_ATTEMPTS and time.monotonic() - started < 3


def test_a_stale_handle_of_a_network_folder_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a real NFS server gives the error, so `os.replace` raises it once."""
    store, replace = Store(str(tmp_path)), os.replace
    failures = [OSError(errno.ESTALE, os.strerror(errno.ESTALE))]

    def stale_once(source: str, target: str) -> None:
        if failures:
            raise failures.pop()
        replace(source, target)

    monkeypatch.setattr(os, "replace", stale_once)
    store.write("a", b"1")
    assert not failures and store.read("a") == b"1" and os.listdir(tmp_path) == ["a"]
