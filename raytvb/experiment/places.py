"""Where a command may write: never into a store that exists, or into a folder of one.

A folder of a store has files that nothing but a run may change. A model that was written over
`STORE/base`, or a second store inside of the first, would destroy what cost hours to make.
"""

from __future__ import annotations

import os
import posixpath
from contextlib import suppress
from pathlib import Path

from raytvb.errors import UserError, shortened
from raytvb.experiment.layout import BASE, EXPERIMENT
from raytvb.experiment.yaml_text import YamlTextError, parse_yaml
from raytvb.storage.addresses import check_shared, parse_url
from raytvb.storage.records import record_key
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError

_SECTIONS = {"seed", "model", "tasks", "talos", "finetune", "basis"}
"""Fields that the experiment of a store always has. An experiment file may leave out most."""


def output_folder(out: str | os.PathLike[str], store: Store | None = None) -> Path:
    """The absolute path of a folder of this machine that a command may write to.

    out: a path, or a file:// URL. store: a store that is known to be one. Nothing is read but the
    marks of stores. Raises UserError for a URL of another kind, and for a place inside a store.
    """
    text, reason = os.fspath(out), ""
    try:
        url, scheme = parse_url(text)
    except StoreError as error:
        url, scheme, reason = text, "", "" if ":/" in text else f" ({error})"
    if scheme != "file":
        shown = url if url.isprintable() else shortened(url)
        raise UserError(
            f"the output {shown:.200} must be a folder of this machine{reason}: name one, and "
            f"copy it from there"
        )
    inside = _store_around(url, store)
    if inside is not None:
        raise UserError(
            f"the output {url} lies in the store {inside}, which only runs may change: name a "
            f"folder outside of it"
        )
    return Path(url)


def check_new_store(store: Store) -> None:
    """Raise UserError if a store that does not exist yet would lie inside another one."""
    if is_store(store):
        return
    inside = _store_around(store.url, None) if store.is_local else _remote_store_above(store.url)
    if inside is not None:
        raise UserError(
            f"the store {store.url} would lie in the store {inside}: choose a place outside of it"
        )


def check_usable(store: Store) -> None:
    """Check that a run can write to a store, and that the store lies in no other one.

    Creates the folder of a local store. Raises StoreError and UserError.
    """
    check_shared(store.url, written=True)
    if store.is_local:
        check_new_store(store)  # before a folder is created inside another store
    store.check_writable()
    if not store.is_local:
        check_new_store(store)  # after it is known that the server answers


def is_store(store: Store) -> bool:
    """Whether there is a store at this place, even one that holds nothing but its experiment."""
    if store.exists(record_key(BASE)):
        return True
    document = store.find(EXPERIMENT)
    return document is not None and (store.exists(record_key("")) or _is_frozen(document))


def _is_frozen(document: bytes) -> bool:
    """Whether an `experiment.yaml` was written by a run; the user's own file names a store."""
    try:
        fields = parse_yaml(document)
    except YamlTextError:
        return False
    return isinstance(fields, dict) and fields.keys() >= _SECTIONS and "store" not in fields


def _store_around(path: str, known: Store | None) -> str | None:
    """The store that a local path is in, or is; None if there is none.

    The path is looked at as it is written, and after its symbolic links.
    """
    for folder in _folders(path):
        if known is not None and known.is_local and _is_same(folder, known.url):
            return known.url
        with suppress(StoreError):  # a folder that may not be read
            if is_store(Store(folder)):
                return folder
    return None


def _folders(path: str) -> list[str]:
    """The path and all folders above it, as written and after symbolic links, innermost first."""
    folders = dict[str, None]()
    for start in (os.path.abspath(path), os.path.realpath(path)):
        place = Path(start)
        folders |= dict.fromkeys(map(str, (place, *place.parents)))
    return sorted(folders, key=len, reverse=True)


def _is_same(left: str, right: str) -> bool:
    with suppress(OSError):
        return os.path.samefile(left, right)
    return os.path.realpath(left) == os.path.realpath(right)


def _remote_store_above(url: str) -> str | None:
    """The store above a URL; None if there is none, or if those places may not be read."""
    scheme, _, rest = url.partition("://")
    above = posixpath.dirname(rest)
    while above:
        folder = f"{scheme}://{above}"
        with suppress(StoreError):
            if is_store(Store(folder)):
                return folder
        above = posixpath.dirname(above)
    return None
