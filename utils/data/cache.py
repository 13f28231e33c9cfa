"""What is known of pictures that were checked before, so that a large data set is decoded once and not at every start.

Only the verdict on a picture is kept, under its path, size, times and inode number; labels are read anew each time, so
an edited label cannot be missed. The file is JSON, lies in the user's cache folder and never in the data set; one
that is missing, damaged or made by another version counts as empty, and a folder that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cv2

from utils.files import atomic_write_bytes

FORMAT = 1
FOLDER = "darknet-compression"
LARGEST = 1 << 30
"""Bytes of a cache file that is still read; a million pictures take about 150 MB."""


class Verdict(NamedTuple):
    """Result of checking one picture: its size, or what is wrong with it."""

    height: int
    width: int
    kind: str = ""
    """A key of `findings.KINDS`; empty if the picture is good."""
    detail: str = ""


Stamp = tuple[int, int, int, int]
"""Size, modification time, change time (which no program can set back) and inode number of a file."""


def default_folder() -> Path | None:
    """$XDG_CACHE_HOME/darknet-compression, by default under ~/.cache; None if there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / FOLDER
    except RuntimeError:
        return None


def stamp(path: str) -> Stamp | None:
    """What changes when a file does; None if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class VerdictCache:
    """Verdicts on the pictures of one source, in one file of the cache folder.

    Args:
        folder: the cache folder, made when something is stored; None keeps nothing.
        source: names the data set, and with it the file.
        max_pixels: part of the key, as are the versions of this format and of OpenCV, since verdicts depend on them.
    """

    def __init__(self, folder: Path | None, source: str, max_pixels: int) -> None:
        self._key = [FORMAT, cv2.__version__, max_pixels]
        digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:32]
        self._path = folder / f"pictures-{digest}.json" if folder else None

    def load(self) -> dict[str, tuple[Stamp, Verdict]]:
        """Path → the file's stamp when it was checked, and the verdict. Empty if there is nothing usable."""
        with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            if self._path and self._path.is_file() and self._path.stat().st_size <= LARGEST:
                document = json.loads(self._path.read_bytes())
                if document["key"] == self._key:
                    return dict(_entries(document["pictures"]))
        return {}

    def store(self, entries: Mapping[str, tuple[Stamp, Verdict]]) -> None:
        """Replace the file atomically; silently does nothing where that is impossible."""
        if self._path is None:
            return
        pictures = {path: [*stamp, *verdict] for path, (stamp, verdict) in entries.items()}
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(self._path, json.dumps({"key": self._key, "pictures": pictures}).encode("ascii"))


def _entries(pictures: Mapping[str, list]) -> Iterable[tuple[str, tuple[Stamp, Verdict]]]:
    """The pictures of a cache document.

    Raises:
        ValueError: something is not of the kind that `VerdictCache.store` writes.
    """
    for path, values in pictures.items():
        *stamp, height, width, kind, detail = values
        numbers = (*stamp, height, width)
        if len(stamp) != 4 or any(type(number) is not int for number in numbers) or min(height, width) < 0:
            raise ValueError("a cache entry has other fields")
        yield path, (tuple(stamp), Verdict(height, width, str(kind), str(detail)))
