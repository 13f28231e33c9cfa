"""The bytes of public weight files in weights/README.md are those that the cfgs ask for."""

from __future__ import annotations

import re

import numpy as np
import pytest

from utils.darknet import cfg as cfg_file
from utils.darknet.network import file_bytes, tensors

ROW = re.compile(r"^\| (\S+) \| ([0-9 ]+) \| (\S+\.cfg)", re.MULTILINE)
HEADER = 20


@pytest.fixture(scope="module")
def rows(root) -> list[tuple[str, int, str]]:
    text = (root / "weights" / "README.md").read_text(encoding="utf-8")
    return [(name, int(size.replace(" ", "")), cfg) for name, size, cfg in ROW.findall(text)]


def partial_bytes(network, blocks: int) -> int:
    """Bytes of a backbone file: the header, and the tensors of the first blocks."""
    return HEADER + 4 * sum(int(np.prod(spec.shape)) for spec in tensors(network) if spec.block < blocks)


def test_the_bytes_are_those_of_the_cfgs(rows, root):
    assert len(rows) == 8
    for name, size, cfg in rows:
        network = cfg_file.load(root / "cfg" / cfg)
        blocks = int(name.rpartition(".conv.")[2]) if ".conv." in name else None
        assert size == (file_bytes(network) if blocks is None else partial_bytes(network, blocks)), name


def test_the_bytes_in_the_text_are_those_of_fifteen_blocks(root):
    text = (root / "weights" / "README.md").read_text(encoding="utf-8")
    size = partial_bytes(cfg_file.load(root / "cfg" / "yolov3-tiny.cfg"), 15)
    assert f"{size:,}".replace(",", " ") + " bytes" in text


def test_the_file_that_is_here_has_them(rows, shared):
    (size,) = [size for name, size, _ in rows if name == "yolov3-tiny.weights"]
    assert (shared / "data" / "weights" / "yolov3-tiny.weights").stat().st_size == size
