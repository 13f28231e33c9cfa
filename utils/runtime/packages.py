"""Packages that only some files need."""

from __future__ import annotations

import importlib.util

from utils.errors import InputError

REQUIREMENTS = "requirements-export.txt"


def require(why: str, *packages: str) -> None:
    """Say how to get a package where it is missing; nothing is imported.

    Args:
        why: the flag or file that needs them.
        packages: names to import.

    Raises:
        InputError: one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{why}: needs the package {package}; pip install -r {REQUIREMENTS}")
