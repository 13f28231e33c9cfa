"""Descriptions of data sets: Darknet's .data and .names, and a data.yaml as Ultralytics writes it.

A path in any of them is relative to the file that names it. If nothing is there, it is taken as relative to the working
directory, as in Darknet, or to a folder above the file. Whoever reads the pictures checks whether they are there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from utils.cli import log
from utils.darknet.blocks import Network
from utils.errors import DataError
from utils.files import foreign_errors, matches, read_text, starting_points

Source = Path | tuple[Path, ...]
"""A list file, folder or glob, or several of them."""

LARGEST_FILE = 512 << 10
"""Largest .data, .names or data.yaml read, in bytes: seconds of YAML, or 800 times COCO's names."""
_COUNT = re.compile(r"[0-9]{1,6}\Z")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class DataConfig:
    """A data set as its description file says."""

    path: Path
    """The description file."""
    classes: int
    names: tuple[str, ...]
    """Names of the classes, in the order of their numbers."""
    train: Source | None
    """Pictures to train with; None if the file does not say."""
    valid: Source | None
    """Pictures to test with; None if the file does not say."""

    def document(self) -> dict[str, Any]:
        """The data set as a data.yaml that works from any folder."""
        paths = {}
        for key, source in (("train", self.train), ("val", self.valid)):
            if source is not None:
                several = [str(path.absolute()) for path in ((source,) if isinstance(source, Path) else source)]
                paths[key] = several[0] if len(several) == 1 else several
        return {**paths, "nc": self.classes, "names": list(self.names)}

    def check_order(self, names: Sequence[str] | None, weights: Path | None) -> None:
        """Refuse a network that was trained with the same class names in another order.

        Raises:
            DataError: names the first class that differs.
        """
        if names is None or tuple(names) == self.names or sorted(names) != sorted(self.names):
            return
        number = next(i for i, pair in enumerate(zip(self.names, names, strict=True)) if pair[0] != pair[1])
        raise DataError(
            f"{self.path}: class {number} is {self.names[number]}, but {names[number]} in {weights}, which has the "
            "same names in another order; give names and labels the order of the network"
        )


def load_data(path: Path | str) -> DataConfig:
    """Read a data set description: YAML if the name ends in .yaml or .yml, Darknet's `key = value` otherwise.

    Raises:
        DataError: the file, or the names it points at, cannot be used; the message says file and line. Or the labels
            are those of a converted set whose classes have other numbers.
    """
    path = Path(path)
    text = _normal_newlines(read_text(path, DataError, LARGEST_FILE))
    config = _from_yaml(path, text) if path.suffix.lower() in (".yaml", ".yml") else _from_data(path, text)
    _check_numbers(config)
    return config


def _check_numbers(config: DataConfig) -> None:
    """Compare the classes with those of the converted set in another folder that the pictures belong to, if they do.

    `write_data_file` puts NAME.data and NAME.names beside `labels`. A class may have another name there, as
    `motorcycle` is `motorbike` in Darknet's list, but no name another number.
    """
    sources = [source if isinstance(source, tuple) else (source,) for source in (config.train, config.valid) if source]
    above = [
        folder for source in sources for path in source for folder in path.parents if os.path.isdir(folder / "labels")
    ]
    if not above or above[0].resolve() == config.path.parent.resolve():
        return
    files = [data.with_suffix(".names") for data in sorted(above[0].glob("*.data"))]
    sets = {path: load_names(path) for path in files if os.path.isfile(path)}
    if sets and not any(_same_numbers(config.names, names) for names in sets.values()):
        path, names = next(iter(sets.items()))
        raise DataError(
            f"{config.path}: its classes are {', '.join(config.names)}, but {path}, beside the labels, has "
            f"{', '.join(names)}; give --data {path.with_suffix('.data')}, or convert again with --names"
        )


def _same_numbers(names: Sequence[str], others: Sequence[str]) -> bool:
    """Tell whether two lists are equally long, share a name, and no name has two numbers."""
    shared, pairs = set(names) & set(others), zip(names, others, strict=False)
    return len(names) == len(others) and shared == {name for name, other in pairs if name == other} != set()


def load_names(path: Path | str) -> tuple[str, ...]:
    """Class names of a .names file, one a line; empty lines at the end are left out.

    Raises:
        DataError: not a text file, no names, an empty line between two names, or control characters.
    """
    lines = _normal_newlines(read_text(path, DataError, LARGEST_FILE)).rstrip().split("\n")
    return tuple(_checked_name(line.strip(), f"{path}:{number}") for number, line in enumerate(lines, 1))


def write_data_file(folder: Path, name: str, names: Sequence[str], *, valid: bool) -> None:
    """Write NAME.names, and NAME.data with the lists train.txt and, if `valid`, val.txt.

    Args:
        folder: of the data set.
        name: of both files.
        names: of the classes.
        valid: there is a list of validation pictures.
    """
    (folder / f"{name}.names").write_text("".join(f"{text}\n" for text in names), encoding="utf-8")
    lines = [f"classes={len(names)}", "train=train.txt", *(["valid=val.txt"] if valid else []), f"names={name}.names"]
    (folder / f"{name}.data").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


class Names(NamedTuple):
    """Names of the classes and the file that has them."""

    names: tuple[str, ...]
    path: str


def named_classes(names: str | None, data: str | None) -> Names | None:
    """Names from the file of --names, else of --data, else None."""
    if names is not None:
        return Names(load_names(names), names)
    return None if data is None else Names(load_data(data).names, data)


def check_names(names: Names | None, network: Network, model: object) -> None:
    """Refuse more or fewer names than classes.

    Raises:
        DataError: says how many there are of each.
    """
    if names is not None and len(names.names) != network.classes:
        raise DataError(f"{names.path}: {len(names.names)} names, but {model} has {network.classes} classes")


def _from_data(path: Path, text: str) -> DataConfig:
    """Darknet's format: `classes`, `train`, `valid` and `names`; other keys mean nothing."""
    values: dict[str, str] = {}
    lines: dict[str, int] = {}
    for number, key, value in _assignments(path, text):
        if key in ("classes", "train", "valid", "names") and values.setdefault(key, value) != value:
            raise DataError(f"{path}:{number}: {key} = {value}, but line {lines[key]} says {key} = {values[key]}")
        lines.setdefault(key, number)
    if "names" not in values:
        raise DataError(f"{path}: no names; add a line like names = classes.names")
    names_path = located(path, values["names"], f"{path}:{lines['names']}: names")
    try:
        names = load_names(names_path)
    except DataError as failure:
        raise DataError(f"{path}:{lines['names']}: names = {values['names']}: {failure}") from None
    if (count := values.get("classes")) is not None:
        where = f"{path}:{lines['classes']}"
        if not _COUNT.match(count) or int(count) < 1:
            raise DataError(f"{where}: classes = {count}; a number of at least 1 was expected")
        if int(count) != len(names):
            raise DataError(f"{where}: classes = {count}, but {names_path} has {len(names)} names")
    train, valid = (
        located(path, values[key], f"{path}:{lines[key]}: {key}") if key in values else None
        for key in ("train", "valid")
    )
    return DataConfig(path, len(names), names, train, valid)


def _assignments(path: Path, text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, key and value of every `key = value`; empty lines and comments (#, ;) are skipped."""
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line[0] in "#;":
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not (key and equals and value):
            way_out = "; python -m utils.data.convert coco reads COCO's annotations" * (path.suffix.lower() == ".json")
            raise DataError(f"{path}:{number}: {line[:80]!r} is not of the form key = value{way_out}")
        yield number, key, value


def _from_yaml(path: Path, text: str) -> DataConfig:
    """Ultralytics' format: `path`, `train`, `val`, `nc` and `names`; other keys mean nothing."""
    with foreign_errors(path, "not valid YAML", DataError):
        values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise DataError(f"{path}: keys like train:, val: and names: were expected; got {_shown(values)}")

    def where(key: str) -> str:
        for number, line in enumerate(text.split("\n"), 1):
            if re.match(rf"['\"]?{re.escape(key)}['\"]?\s*:", line):
                return f"{path}:{number}"
        return str(path)

    if values.get("names") is None:
        raise DataError(f"{path}: no names; add a list like names: [cat, dog]")
    names = _yaml_names(values["names"], where("names"))
    count = values.get("nc", len(names))
    if not isinstance(count, int) or count != len(names):
        raise DataError(f"{where('nc')}: nc is {_shown(count)}, but names has {len(names)} entries")
    root = _yaml_text(values["path"], where("path")) if values.get("path") else ""
    keys = "train", "val" if "val" in values else "valid"
    train, valid = (_yaml_source(path, root, values.get(key), f"{where(key)}: {key}") for key in keys)
    return DataConfig(path, len(names), names, train, valid)


def _yaml_names(value: Any, where: str) -> tuple[str, ...]:
    """Names from a list, or from a mapping of the class numbers 0, 1, … to names."""
    if isinstance(value, dict):
        if set(value) != set(range(len(value))):
            raise DataError(f"{where}: the keys of names must be 0..{len(value) - 1}, each once")
        value = [value[number] for number in range(len(value))]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: names must be a list or a mapping of numbers to names; got {_shown(value)}")
    for number, name in enumerate(value):
        if isinstance(name, bool) or not _is_plain(name):
            raise DataError(f"{where}: name {number} reads as {_shown(name)}; put it in quotes")
    return tuple(_checked_name(str(name).strip(), f"{where}: name {number}") for number, name in enumerate(value))


def _yaml_source(path: Path, root: str, value: Any, where: str) -> Source | None:
    """A path or a list of paths below `root`."""
    if isinstance(value, list) and value:
        return tuple(located(path, os.path.join(root, _yaml_text(item, where)), where) for item in value)
    return None if value is None else located(path, os.path.join(root, _yaml_text(value, where)), where)


def located(path: Path, text: str, where: str) -> Path:
    """Return where a path of a description file leads; another reading than the first one is logged.

    Args:
        path: the description file.
        text: the path in it. Backslashes may stand for slashes, and `../train` for `train` (as Roboflow writes it).
        where: file, line and key, for the message.

    Returns:
        The first reading that exists; where none does, the path relative to the file.
    """
    folder, slashes = path.parent, text.replace("\\", "/")
    first = folder / text
    readings = [base / words for words in (text, slashes) for base in starting_points(folder)]
    readings.append(folder / slashes.removeprefix("../"))
    for reading in readings:
        if os.path.lexists(reading) or matches(str(reading)):
            if reading not in (first, folder / slashes):
                log(f"{where} = {text}: taken as {reading}; there is no {first}")
            return reading
    if folder.absolute() != Path.cwd() and not os.path.isabs(text):
        log(f"{where} = {text}: there is neither {first} nor {Path(text).absolute()}")
    return first


def _yaml_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: a path was expected; got {_shown(value)}")
    return value


def _checked_name(name: str, where: str) -> str:
    if not name:
        raise DataError(f"{where}: an empty class name")
    if _CONTROL.search(name):
        raise DataError(f"{where}: {name[:80]!r} holds control characters")
    return name


def _normal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _is_plain(value: Any) -> bool:
    """Tell whether a value of a YAML file is a text or a number of printable size."""
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 1e18)


def _shown(value: Any) -> str:
    """A value of a YAML file for a message; never the whole of a large one."""
    return repr(value)[:80] if _is_plain(value) else f"a {type(value).__name__}"
