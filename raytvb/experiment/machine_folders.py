"""The folders of this machine that environment variables name: the cache and the temporary one."""

from __future__ import annotations

import os

from raytvb.errors import UserError, shortened
from raytvb.storage.addresses import check_lengths, parse_url
from raytvb.storage.local_files import check_folder
from raytvb.storage.store_errors import StoreError, os_reason


def check_machine_folders() -> None:
    """Raise UserError unless the folders that RAYTVB_CACHE and TMPDIR name can be used.

    The cache may still have to be created. A temporary folder must exist: Python would take another
    one without a word, on a disk that may be too small.
    """
    for name in ("RAYTVB_CACHE", "TMPDIR"):
        given = os.environ.get(name, "")
        if not given:
            continue
        if not given.strip():
            raise UserError(f"{name} is blank: set it to a folder, or unset it")
        try:
            _check_machine_folder(given, exists=name == "TMPDIR")
        except StoreError as error:
            raise UserError(f"{name}: {error}, or unset {name}") from None
        except OSError as error:
            reason = os_reason(error)
            raise UserError(f"{name} is {shortened(given)}: {reason}, or unset {name}") from None


def _check_machine_folder(given: str, *, exists: bool) -> None:
    """Raise StoreError or OSError unless a folder of this machine can be used."""
    if parse_url(given)[1] != "file":
        raise StoreError(f"{shortened(given)} is no folder of this machine: set it to one")
    folder = os.path.abspath(given)
    check_lengths(folder)
    check_folder(folder)
    if exists:
        os.stat(folder)
