"""Small networks as cfg text, for tests."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest

from utils.darknet.blocks import Network, Yolo
from utils.darknet.cfg import parse
from utils.darknet.network import OPENCV_EPSILON

PUBLIC_MODELS = (
    "MobileNetV2-YOLO-Fastest-voc",
    "MobileNetV2-YOLO-Fastest-voc-v2",
    "MobileNetV2-YOLOv3-Nano-coco",
    "MobileNetV2-YOLOv3-Nano-voc",
    "yolo-fastest-1.1",
    "yolo-fastest-1.1-xl",
    "yolo-fastest-1.1_body",
    "yoloface-500k",
    "yoloface-500k-v2",
    "yoloface-50k",
    "yolov3-tiny",
    "yolov3-tiny-mask123",
)
"""Names of the cfgs of public Darknet models in the folder of shared data; the last two have the same weights."""

NEEDS_IMPORTER = pytest.mark.skipif(
    not hasattr(cv2.dnn, "readNetFromDarknet"), reason="OpenCV 5 reads no Darknet files"
)
HEAD = "[convolutional]\nfilters=6\nsize=1\nactivation=linear\n[yolo]\nmask=0\nanchors=4,4\nclasses=1\nnum=1\n"
"""One anchor of one class."""


def conv(filters: int, size: int = 1, activation: str = "leaky", **keys: int) -> str:
    """A convolution with batch normalisation; `keys` are written between its size and its activation."""
    more = "".join(f"{key}={value}\n" for key, value in keys.items())
    start = f"[convolutional]\nbatch_normalize=1\nfilters={filters}\nsize={size}\n"
    return f"{start}{more}activation={activation}\n"


TINY_HEAD = "[convolutional]\nfilters=21\nsize=1\nactivation=linear\n\n[yolo]\nmask={}\n"
TINY_HEAD += "anchors=4,4, 8,8, 12,10, 20,16, 24,30, 40,44\nclasses=2\nnum=6\n"
TINY = "\n" + "\n".join(
    (
        "[net]\nwidth=64\nheight=64\nchannels=3\n",
        conv(8, 3, stride=2, pad=1),
        conv(8, 3, "mish", stride=2, pad=1),
        conv(4),
        conv(8, 3, pad=1),
        "[shortcut]\nfrom=-3\nactivation=linear\n",
        "[route]\nlayers=-1\ngroups=2\ngroup_id=1\n",
        conv(12, 3, stride=2, pad=1),
        "[maxpool]\nsize=2\nstride=1\n",
        TINY_HEAD.format("3,4,5") + "scale_x_y=1.05\n",
        "[route]\nlayers=7\n",
        conv(6, activation="relu"),
        "[upsample]\nstride=2\n",
        "[route]\nlayers=-1,4\n",
        TINY_HEAD.format("0,1,2"),
    )
)
"""Two heads at strides 8 and 4; a residual unit, a grouped route, a max pool of stride 1, an upsampled route."""


def lined(words: str) -> str:
    """Cfg text whose words are a line each, so that a section can be written in one."""
    return "\n".join(words.split()) + "\n"


def tiny() -> Network:
    """The network of TINY."""
    return parse(TINY, "tiny.cfg")


def one_head(*sections: str, width: int = 16, channels: int = 3) -> Network:
    """A network that ends in one head of stride 1 or more behind the given sections."""
    net = f"[net]\nwidth={width}\nheight={width}\nchannels={channels}\n"
    return parse("\n".join((net, *sections, HEAD)), "one.cfg")


def branches(*sections: str) -> Network:
    """A network in which each section follows the first convolution and has a head of its own."""
    text = "[net]\nwidth=24\nheight=16\n[convolutional]\nfilters=4\nsize=1\nactivation=linear\n"
    for section in sections:
        text += f"[route]\nlayers=0\n{section}{HEAD}"
    return parse(text, "branches.cfg")


def with_heads(network: Network, **values: object) -> Network:
    """The network with other values in all its heads."""
    blocks = (replace(block, **values) if isinstance(block, Yolo) else block for block in network.blocks)
    return replace(network, blocks=tuple(blocks))


def printed(capsys: pytest.CaptureFixture, main: Callable[[list[str]], None], *flags: str) -> Any:
    """What a script prints with --json."""
    capsys.readouterr()
    main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


def csv_rows(path: Path | str) -> list[dict[str, str]]:
    """Rows of a table that a script has written."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def refused(error: type[Exception], match: str, status: int | None = None) -> Iterator[None]:
    """An error is expected, whose text is one line, and perhaps an exit status."""
    with pytest.raises(error, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert status in (None, getattr(caught.value, "exit_status", None))


@contextmanager
def opencv_epsilon() -> Iterator[None]:
    """Models made within add to a variance what OpenCV's reader of Darknet files adds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.BN_EPSILON", OPENCV_EPSILON)
        yield
