"""Modules of a user's own, which register further methods.

The environment variable RAYTVB_PLUGINS names these modules. Every process imports them when it
first uses a registry: the command line, which checks the experiment file, and each Ray worker.
Workers get this variable, like every variable whose name begins with RAYTVB_. The modules must be
importable on the workers too (docs/extending.md says how).
"""

from __future__ import annotations

import os
from importlib import import_module

from raytvb.errors import UserError

PLUGINS = "RAYTVB_PLUGINS"
"""The environment variable with names of modules, separated by commas."""


def import_plugins() -> None:
    """Import the modules that RAYTVB_PLUGINS names. Modules that are already imported are not run
    again.

    Raises UserError that names the module whose import fails.
    """
    for name in os.environ.get(PLUGINS, "").split(","):
        module = name.strip()
        if not module:
            continue
        try:
            import_module(module)
        except Exception as error:  # the module is the user's, so it may raise anything
            raise UserError(
                f"{PLUGINS} names the module {module}, which cannot be imported "
                f"({type(error).__name__}: {error}). Install it on every machine, or put its "
                f"folder on PYTHONPATH"
            ) from error
