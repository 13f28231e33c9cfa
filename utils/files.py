"""Reading what users name and writing what must not be lost."""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from utils.errors import OUT_OF_RESOURCES, DataError, InputError, ResourceError, SuiteError, is_out_of_memory

ROOT = Path(__file__).resolve().parent.parent
"""Folder of the suite's scripts."""
USUAL = ("cfg", "data", "data/recipes", "weights")
"""Folders of the project with files that flags name."""
HINTED = ("", ".cfg", ".data", ".yaml", ".yml", ".names", ".weights", ".pt")
"""Suffixes of files that flags name; pictures may be missing by the thousand."""
MOST_NAMES = 10_000
"""Files of a folder among which a missing one is looked for."""
LARGEST_TEXT = 64 << 20
"""Largest text file read by default, in bytes."""
LARGEST_MODEL = 1 << 33
"""Largest file of a network, in bytes: digest and checksums of a sparse file of terabytes would take days."""
LONGEST_REASON = 200
"""Characters of another program's message that are shown."""
OPENVINO_PLACES = ("Exception from", "Check '")
"""How lines of OpenVINO's messages begin that name places in its own code."""


def starting_points(folder: Path) -> tuple[Path, ...]:
    """Folders that a relative path in a file of `folder` may start at: it, the working directory, and two above it."""
    return (folder, Path(), *folder.resolve().parents[:2])


def matches(pattern: str) -> list[str]:
    """Paths that a glob matches; a folder in it that exists is not a pattern, such as `set[1]`."""
    folder, rest = os.path.split(pattern)
    while folder and not os.path.isdir(folder):
        folder, part = os.path.split(folder)
        rest = os.path.join(part, rest)
    return glob.glob(os.path.join(glob.escape(folder), rest), recursive=True)


def suggestion(path: Path) -> str:
    """Return `; did you mean FILE?` for a missing file, from places where files of its name usually lie, or nothing."""
    if path.suffix.lower() not in HINTED:
        return ""
    with suppress(OSError, ValueError):  # a folder that may not be listed, another drive
        if near := _nearest_file(path):
            return f"; did you mean {near}?"
    return ""


def _nearest_file(path: Path) -> Path | None:
    """The newest checkpoint of that name in runs/, else the file of the nearest name in a usual folder."""
    name = glob.escape(path.name)
    runs = [run for depth in ("*/*", "*/*/*") for run in Path("runs").glob(f"{depth}/weights/{name}")]
    if runs and path.suffix == ".pt":
        return max(runs, key=lambda run: run.stat().st_mtime)
    folders = (path.parent, *(Path(os.path.relpath(ROOT / name)) for name in USUAL), Path())
    known: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for file in islice(folder.iterdir(), MOST_NAMES):
                known.setdefault(file.name, file)
    names = [path.name, *(path.name + suffix for suffix in (".cfg", ".yaml", ".data"))]
    near = next((name for name in names if name in known), None)
    near = near or next(iter(difflib.get_close_matches(path.name, known, n=1, cutoff=0.85)), None)
    return known[near] if near else None


def regular_file(path: Path | str, error: type[SuiteError] = InputError, max_bytes: float = math.inf) -> os.stat_result:
    """Status of a regular file; anything else (missing, folder, FIFO, device, link loop, large) is refused unopened."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise error(f"{path}: no such file or directory{suggestion(Path(path))}") from None
    except OSError as failure:
        raise error(f"{path}: {(failure.strerror or 'cannot be read').lower()}") from None
    except ValueError:
        raise error(f"{str(path)!r}: not a file name") from None
    if stat.S_ISDIR(status.st_mode):
        usual = (f"{Path(path).name}.data", "data.yaml", "weights/best.pt", "model.pt")
        inside = next((f"; did you mean {Path(path, name)}?" for name in usual if Path(path, name).is_file()), "")
        raise error(f"{path}: a folder, not a regular file{inside}")
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{path}: not a regular file")
    if status.st_size > max_bytes:
        raise error(f"{path}: {status.st_size} bytes; a file of at most {max_bytes} bytes was expected")
    return status


@contextmanager
def foreign_errors(path: Path | str, problem: str, error: Callable[[str], Exception] = InputError) -> Iterator[None]:
    """Context in which whatever another project's parser or program raises becomes an error of one line.

    Damaged and hostile files provoke exceptions that its documentation does not name, so all kinds are taken.

    Args:
        path: file it works on, or another name for what it works on.
        problem: "not valid YAML", or with a way out "damaged; take another copy".
        error: makes the error from `PATH:LINE: PROBLEM: REASON; WAY OUT`; the line is there if the parser knows it.

    Raises:
        SuiteError: of `error`.
        MemoryError: memory does not suffice.
    """
    try:
        yield
    except SuiteError:
        raise
    except Exception as failure:
        if is_out_of_memory(failure):
            raise MemoryError(f"{path}: {_reason(failure)}") from failure
        mark = getattr(failure, "problem_mark", None)  # PyYAML's; json and expat have a lineno
        line = mark.line + 1 if mark else getattr(failure, "lineno", None)
        what, semicolon, way_out = problem.partition("; ")
        raise error(f"{path}{f':{line}' if line else ''}: {what}: {_reason(failure)}{semicolon}{way_out}") from None


def _reason(failure: Exception) -> str:
    """The first line of an exception that says something, else its class."""
    if needs := re.search(r"GLOBAL ([\w.]+)", str(failure)):  # torch.load's
        return f"whole-module checkpoint (it needs {needs[1]})"
    lines = map(str.strip, str(getattr(failure, "problem", None) or failure).splitlines())
    text = next((line for line in lines if line and not line.startswith(OPENVINO_PLACES)), "")
    explained = text and not isinstance(failure, LookupError)
    return text[:LONGEST_REASON] if explained else f"{type(failure).__name__} {text[:LONGEST_REASON]}".strip()


def read_bytes(path: Path | str, error: type[SuiteError] = InputError, max_bytes: int = LARGEST_TEXT) -> bytes:
    """Bytes of a file.

    Raises:
        InputError: (or the class given) not a regular file, larger than `max_bytes`, or unreadable.
    """
    regular_file(path, error, max_bytes)
    try:
        return Path(path).read_bytes()
    except OSError as failure:
        raise error(f"{path}: {(failure.strerror or 'cannot be read').lower()}") from None


def read_text(path: Path | str, error: type[SuiteError] = InputError, max_bytes: int = LARGEST_TEXT) -> str:
    """Text of a UTF-8 file without its byte order mark.

    Raises:
        InputError: (or the class given) as `read_bytes`, or not UTF-8.
    """
    data = read_bytes(path, error, max_bytes).removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(f"{path}:{line}: byte 0x{data[failure.start]:02x} is not UTF-8; save the file as UTF-8") from None


def read_yaml(path: Path | str, error: type[SuiteError] = InputError, max_bytes: int = LARGEST_TEXT) -> Any:
    """Content of a YAML file.

    Raises:
        InputError: (or the class given) as `read_text`, or not valid YAML.
    """
    import yaml

    text = read_text(path, error, max_bytes)
    with foreign_errors(path, "not valid YAML", error):
        return yaml.safe_load(text)


def read_json(path: Path | str, error: type[SuiteError] = InputError, max_bytes: int = LARGEST_TEXT) -> Any:
    """Content of a JSON file.

    Raises:
        InputError: (or the class given) as `read_text`, or not valid JSON.
    """
    text = read_text(path, error, max_bytes)
    with foreign_errors(path, "not valid JSON", error):
        return json.loads(text)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`; what is written to it replaces `path` when the block ends without an error.

    The data are flushed to the disk before the rename and the folder after it, so a crash or power loss leaves either
    the old file or the new one.

    Raises:
        ResourceError: the disk is full or broken; `path` is as it was.
    """
    path = Path(path)
    # Containers that share a folder may have the same process number, so that alone is not unique.
    writer = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:200])}.{writer}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as failure:
        if failure.errno not in OUT_OF_RESOURCES:
            raise
        raise ResourceError(f"{path}: cannot be written: {failure.strerror}{_room(path.parent)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path | str, data: bytes | memoryview) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write a whole UTF-8 text file atomically, with the newlines as given and surrogates as `utf8` has them."""
    atomic_write_bytes(path, utf8(text).encode("utf-8"))


def utf8(text: str) -> str:
    """Text whose surrogates, which stand for bytes of file names that are not UTF-8, are escaped as JSON has them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextmanager
def utf8_path(path: Path | str) -> Iterator[str]:
    """Name under which a program that takes only UTF-8 can open a file, and those of its stem, inside the context.

    An address of a stream is handed on as it is.
    """
    text, path = str(path), Path(path)  # a Path would merge the slashes of an address
    if utf8(text) == text:
        yield text
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in {path, *path.parent.glob(f"{glob.escape(path.stem)}.*")}:
            if file.stem == path.stem:  # the pattern finds NAME.more.SUFFIX, too
                os.symlink(file.absolute(), Path(folder, f"file{file.suffix}"))
        yield os.path.join(folder, f"file{path.suffix}")


def is_vacant(output: Path) -> bool:
    """Tell whether a path is free for a new folder: nothing is there, or an empty folder."""
    return not output.is_symlink() and (not output.exists() or (output.is_dir() and not any(output.iterdir())))


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output` that is moved there when the block ends without an error: all of it, or nothing.

    Raises:
        DataError: `output` holds something, or is no folder.
    """
    if not is_vacant(output):
        raise DataError(f"{output}: holds other files or is no folder; name a new folder with --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=output.parent) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        yield folder
        try:
            os.rename(folder, output)  # replaces an empty folder, fails on any other
        except OSError as failure:
            raise DataError(f"{output}: {failure.strerror}; name a new folder with --output") from None


def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _room(folder: Path) -> str:
    try:
        return f"; {shutil.disk_usage(folder).free} bytes are free there"
    except OSError:
        return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
