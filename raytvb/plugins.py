"""Modules of a user's own, which register further methods.

The environment variable RAYTVB_PLUGINS names these modules. Every process imports them when it
first uses a registry: the command line, which checks the experiment file, and each Ray worker.
Workers get this variable, like every variable whose name begins with RAYTVB_. The modules must be
importable on the workers too (docs/extending.md says how).
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

from raytvb.errors import UserError, described, raised_at

PLUGINS = "RAYTVB_PLUGINS"
"""The environment variable with names of modules, separated by commas."""


def import_plugins() -> None:
    """Import the modules that RAYTVB_PLUGINS names. Modules that are already imported are not run
    again.

    Raises UserError that names the module whose import fails, and says why.
    """
    for name in os.environ.get(PLUGINS, "").split(","):
        module = name.strip()
        if not module:
            continue
        try:
            import_module(module)
        except (Exception, SystemExit) as error:  # the module is the user's: it may raise any
            raise UserError(f"{PLUGINS} names the module {module}, {_reason(module, error)}") from (
                error
            )


def _reason(module: str, error: BaseException) -> str:
    """Why the import of a module failed, and what to do about it."""
    if isinstance(error, ModuleNotFoundError):
        missing = error.name or ""
        if module == missing or module.startswith(f"{missing}."):
            if module.endswith(".py"):
                return "which is the name of a file: write the module's name, without `.py`"
            return (
                f"which cannot be found ({error}). Install it on every machine, or put its folder "
                f"on PYTHONPATH"
            )
        return (
            f"which imports another module that cannot be found ({error}) [{_place(module, error)}]"
            f". Install that on every machine, or put its folder on PYTHONPATH"
        )
    if isinstance(error, SyntaxError):
        return f"which is not valid Python: {error.msg} [{error.filename}:{error.lineno}]"
    return f"whose import fails: {described(error)} [{_place(module, error)}]"


def _place(module: str, error: BaseException) -> str:
    """The line of the module that failed, or the innermost line if there is none."""
    try:
        spec = find_spec(module)
    except Exception:  # the module's package may fail in the same way
        spec = None
    return raised_at(error, (spec.origin if spec else None) or "")
