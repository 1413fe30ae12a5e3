"""Optional packages, which only some commands need."""

from __future__ import annotations

import importlib.util

from common.cli import UserError


def refuse_missing(package: str, message: str) -> None:
    """Raise UserError with this message if a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(message)
