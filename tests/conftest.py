"""What several test modules use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data, weights and reference cfgs: $DARKNET_SHARED, or `shared` beside the project."""
    folder = Path(os.environ.get("DARKNET_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set DARKNET_SHARED to run the tests that need real data")
    return folder
