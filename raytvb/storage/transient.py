"""Which failures of a storage may pass, so that the same request may succeed a little later."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterator

from raytvb.storage.store_errors import GaveUpError, InterruptedTransferError, StoreError

STATUSES = frozenset({408, 425, 429})
"""HTTP statuses below 500 that ask for another try: timeout, too early, too many requests."""

PERMANENT_STATUSES = frozenset({501, 505, 507, 508, 510, 511})
"""HTTP statuses from 500 on that come again: not implemented, disk full, and their like."""

# S3 says with these codes, whose status may be 400, 403 or 409, that the same request may succeed.
CODES = frozenset(
    {
        "BadDigest",  # the body was damaged on its way
        "BandwidthLimitExceeded",
        "ConnectionError",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "TransactionInProgressException",
        "XAmzContentSHA256Mismatch",
    }
)

# Classes of errors by name, so that no library has to be imported in order to ask. A subclass
# counts as its base class.
CLASSES = frozenset(
    {
        # Python: resets, refused connections, timeouts, answers that are cut short.
        "ConnectionError",
        "TimeoutError",
        "IncompleteRead",
        # botocore. HTTPClientError is the base of all that happens between two machines;
        # ResponseParserError is an answer that is not XML, as some servers give when overloaded.
        "HTTPClientError",
        "IncompleteReadError",
        "MetadataRetrievalError",
        "ResponseParserError",
        # aiohttp, requests, urllib3, httpx.
        "ClientConnectionError",
        "ClientPayloadError",
        "ChunkedEncodingError",
        "Timeout",
        "ProtocolError",
        "TransportError",
    }
)

# What a network file system gives while its server is away. EIO is not here: a broken disk gives
# it too, and stays broken. A full disk (ENOSPC, EDQUOT) stays full.
NETWORK_ERRNOS = frozenset(
    {
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENETRESET,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed a little later.

    The first error in the chain of causes that tells decides: client libraries translate what a
    server said into an OSError, with the original as its cause.
    """
    if _is_bad_certificate(error):
        return False
    for link in _causes(error):
        verdict = _verdict(link)
        if verdict is not None:
            return verdict
    return False


def _verdict(error: BaseException) -> bool | None:
    """Whether this error alone says that it may pass; None if it does not tell."""
    if isinstance(error, InterruptedTransferError):
        return True
    if isinstance(error, (GaveUpError, StoreError)) or not isinstance(error, Exception):
        return False
    if any(base.__name__ in CLASSES for base in type(error).__mro__):
        return True
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return code in CODES or passing_status(status if isinstance(status, int) else _number(code))
    for answer in (error, response):
        for name in ("status", "status_code", "code"):
            status = _number(getattr(answer, name, None))
            if status:
                return passing_status(status)
    if isinstance(error, OSError) and error.errno in NETWORK_ERRNOS:
        return True
    return None


def passing_status(status: int) -> bool:
    """Whether a request that got this HTTP status may get another one later."""
    return status in STATUSES or (500 <= status < 600 and status not in PERMANENT_STATUSES)


def _number(value: object) -> int:
    """An HTTP status, which some libraries give as a string; 0 for anything else."""
    text = str(value)
    return int(text) if text.isascii() and text.isdigit() and len(text) == 3 else 0


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, and so on."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return
        yield link
        link = link.__cause__


def _is_bad_certificate(error: BaseException) -> bool:
    """Whether the server's certificate was refused. That is a connection error that comes again."""
    link: BaseException | None = error
    for _ in range(10):
        if link is None:
            return False
        if isinstance(link, ssl.SSLCertVerificationError):
            return True
        link = link.__cause__ or link.__context__
    return False
