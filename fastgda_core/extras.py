"""Packages that only some users need: an extra of this project brings them."""

from __future__ import annotations

from importlib.util import find_spec

from fastgda_core.errors import UsageError


def installed(module: str) -> bool:
    """Return whether a package could be imported, without importing it."""
    return find_spec(module) is not None


def require_extra(extra: str, *modules: str, wanted_by: str = "") -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        modules: names of packages as they are imported.
        wanted_by: the setting that asks for the packages, where it was not the command itself.

    Raises:
        UsageError: a package is missing; the message has the line that installs it.
    """
    missing = [module for module in modules if not installed(module)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"{wanted_by}{': ' if wanted_by else ''}{', '.join(missing)} {verb} not installed: "
            f"pip install 'fastgda[{extra}]'"
        )
