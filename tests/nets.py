"""Small networks as cfg text, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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

TINY = """
[net]
width=64
height=64
channels=3

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=mish

[convolutional]
batch_normalize=1
filters=4
size=1
activation=leaky

[convolutional]
batch_normalize=1
filters=8
size=3
pad=1
activation=leaky

[shortcut]
from=-3
activation=linear

[route]
layers=-1
groups=2
group_id=1

[convolutional]
batch_normalize=1
filters=12
size=3
stride=2
pad=1
activation=leaky

[maxpool]
size=2
stride=1

[convolutional]
filters=21
size=1
activation=linear

[yolo]
mask=3,4,5
anchors=4,4, 8,8, 12,10, 20,16, 24,30, 40,44
classes=2
num=6
scale_x_y=1.05

[route]
layers=7

[convolutional]
batch_normalize=1
filters=6
size=1
activation=relu

[upsample]
stride=2

[route]
layers=-1,4

[convolutional]
filters=21
size=1
activation=linear

[yolo]
mask=0,1,2
anchors=4,4, 8,8, 12,10, 20,16, 24,30, 40,44
classes=2
num=6
"""
"""Two heads at strides 8 and 4; a residual unit, a grouped route, a max pool of stride 1, an upsampled route."""


HEAD = "[convolutional]\nfilters=6\nsize=1\nactivation=linear\n[yolo]\nmask=0\nanchors=4,4\nclasses=1\nnum=1\n"
"""One anchor of one class."""


def tiny() -> Network:
    """The network of TINY."""
    return parse(TINY, "tiny.cfg")


def one_head(*sections: str, width: int = 16, channels: int = 3) -> Network:
    """A network that ends in one head of stride 1 or more behind the given sections."""
    net = f"[net]\nwidth={width}\nheight={width}\nchannels={channels}\n"
    return parse("\n".join((net, *sections, HEAD)), "one.cfg")


def with_heads(network: Network, **values: object) -> Network:
    """The network with other values in all its heads."""
    blocks = (replace(block, **values) if isinstance(block, Yolo) else block for block in network.blocks)
    return replace(network, blocks=tuple(blocks))


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
        patch.setattr("utils.layers.BN_EPSILON", OPENCV_EPSILON)
        yield
