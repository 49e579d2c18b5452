"""The environment variables that an experiment takes along to other machines."""

from __future__ import annotations

from collections.abc import Mapping

PASSED = frozenset(
    (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "AWS_RESPONSE_CHECKSUM_VALIDATION",
        "AWS_MAX_ATTEMPTS",
        "AWS_RETRY_MODE",
        "HF_TOKEN",
        "HF_HOME",
    )
)
"""Credentials and locations of data. AWS_PROFILE, AWS_CONFIG_FILE and AWS_CA_BUNDLE are left out:
they name things on this machine, and botocore fails on a machine that lacks those.
"""

PASSED_PREFIX = "RAYTVB_"


def job_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that a job and its workers get: the list above and RAYTVB_*."""
    passed = {}
    for name, value in sorted(env.items()):
        if name in PASSED or name.startswith(PASSED_PREFIX):
            passed[name] = value
    return passed
