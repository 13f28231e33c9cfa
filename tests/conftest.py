"""What several test modules use."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Source(NamedTuple):
    """One Python file of the project."""

    module: str
    """Dotted name, e.g. `utils.darknet.cfg`."""
    path: str
    """Relative to the project, with `/`."""
    text: str
    tree: ast.Module

    def __repr__(self) -> str:
        return self.path

    @property
    def is_test(self) -> bool:
        return self.path.startswith("tests/")


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data, weights and reference cfgs: $DARKNET_SHARED, or `shared` beside the project."""
    folder = Path(os.environ.get("DARKNET_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no {folder}: set DARKNET_SHARED to run the tests that need real data")
    return folder


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    """Every Python file of the project: scripts, utils, benchmarks and tests."""
    files = [
        *ROOT.glob("*.py"),
        *(path for room in ("utils", "benchmarks", "tests") for path in ROOT.glob(f"{room}/**/*.py")),
    ]
    return tuple(_source(path) for path in sorted(files))


def _source(path: Path) -> Source:
    relative = path.relative_to(ROOT)
    module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
    text = path.read_text(encoding="utf-8")
    return Source(module, relative.as_posix(), text, ast.parse(text, str(relative)))
