"""Errors of a store, and what a user can do about them."""

from __future__ import annotations

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


def library_code(error: BaseException) -> str:
    """The server's code of a client library's error, or else the name of the error's class.

    '' for errors of other packages.
    """
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__ if type(error).__module__.split(".")[0] in _LIBRARIES else ""
