"""Models from Hugging Face's hub and other servers: reached soon, or refused with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raytvb.errors import UserError
from raytvb.models.model_folder import CONFIG_FILE, folder_weights
from raytvb.models.open_clip_package import open_clip_package

_WAIT_S = 5.0
"""Seconds for one answer. A hub that answers at all does so in less than one."""


@contextmanager
def reached_soon() -> Iterator[None]:
    """Within the block, a hub that cannot be reached is not asked again and again.

    open_clip asks for several files, each with five retries, which takes up to a minute without a
    network. If one short question has no answer, only files that are in the cache are used.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(url: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=_WAIT_S)
    except Exception:  # of the network, of certificates, of proxies
        return False
    return True


def fetched_folder(name: str, *, with_weights: bool) -> Path:
    """The local copy of a model of the hub, `hf-hub:OWNER/NAME`: a folder as open_clip knows them.

    Files that are in the cache are not fetched again. Raises UserError for a name that the hub does
    not have, and for a hub that cannot be reached.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    identifier = name.removeprefix("hf-hub:")
    try:
        with reached_soon():
            path = Path(download_pretrained_from_hf(identifier, filename=CONFIG_FILE))
            if with_weights:
                download_pretrained_from_hf(identifier)
    except Exception as error:  # of the hub, of the network, of the name
        raise UserError(
            f"model.name: {name} cannot be fetched: it is not in the cache of this machine, and "
            f"the hub cannot be reached or has no open_clip model of this name; check the name, or "
            f"fetch it where there is a network (`hf download {identifier}`) and give its folder "
            f"as local-dir:PATH"
        ) from error
    if with_weights:
        folder_weights(path.parent)
    return path.parent


def fetch_tag(name: str, tag: str) -> None:
    """Fetch the weights of a tag into the cache, where open_clip then finds them.

    Raises UserError if they cannot be fetched.
    """
    from open_clip.pretrained import download_pretrained

    try:
        download_pretrained(open_clip_package().get_pretrained_cfg(name, tag))
    except Exception as error:  # of the hub, of the network
        raise UserError(
            f"model.pretrained: the weights of the tag {tag} of {name} cannot be fetched: they are "
            f"not in the cache of this machine, and their server cannot be reached; fetch them "
            f"where there is a network, and give the path of the file as `pretrained`"
        ) from error
