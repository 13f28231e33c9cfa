"""Packages that only some files need."""

from __future__ import annotations

import importlib.util

from utils.errors import InputError

REQUIREMENTS = {
    "openvino": "requirements-openvino.txt",
    "torch_pruning": "requirements-dev.txt",
    "nncf": "requirements-dev.txt",
}
"""The file that a package is in, where that is not USUAL."""
USUAL = "requirements-export.txt"


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
            raise InputError(f"{why}: needs the package {package}; pip install -r "
                             f"{REQUIREMENTS.get(package, USUAL)}")  # fmt: skip
