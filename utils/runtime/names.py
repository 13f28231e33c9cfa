"""Names of the classes, where a file of weights does not have them or others are wanted."""

from __future__ import annotations

from typing import NamedTuple

from utils.darknet.blocks import Network
from utils.darknet.data_file import load_data, load_names
from utils.errors import DataError


class Names(NamedTuple):
    """Names of the classes and the file that has them."""

    names: tuple[str, ...]
    path: str


def named_classes(names: str | None, data: str | None) -> Names | None:
    """Names from the file of --names, else of --data, else None."""
    if names is not None:
        return Names(load_names(names), names)
    return None if data is None else Names(load_data(data).names, data)


def check_names(given: Names | None, network: Network, model: object) -> None:
    """Refuse more or fewer names than classes.

    Raises:
        DataError: says how many there are of each.
    """
    if given is not None and len(given.names) != network.classes:
        raise DataError(f"{given.path}: {len(given.names)} names, but {model} has {network.classes} classes")
