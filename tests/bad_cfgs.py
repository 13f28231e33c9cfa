"""Malformed cfgs, made from a small legal one: for each, the line that is wrong and a piece of what must be said."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from tests.nets import TINY, lined

NANO = TINY.lstrip()
"""The legal cfg; its heads have strides 8 and 4."""

RICH = lined(
    """
    [network] width=64 height=32 channels=1 learning_rate=0.001 steps=400,450
    [convolutional] filters=8 size=3 stride_x=2 stride_y=1 padding=1 activation=relu6
    [depthwise] batch_normalize=1 filters=8 size=5 stride=1 pad=1 activation=h_swish
    [se] filters=8 reduction=3
    [convolutional] filters=8 size=3 dilation=2 pad=1 stride=1 bias=0 activation=hardsigmoid
    [shortcut] from=-2,-4 weights_type=per_channel weights_normalization=softmax activation=swish
    [sam] from=-2 activation=logistic
    [avgpool]
    [convolutional] filters=8 activation=logistic
    [scale_channels] from=-3
    [dropout] probability=.1
    [shortcut] from=-2 activation=linear weights_type=per_feature
    [reorg] stride=2
    [maxpool] size=3 stride_x=1 stride_y=2
    [convolutional] filters=14 activation=linear learning_rate=0.1
    [yolo] mask=0,2 anchors=1.5,2.25,3,4,1e1,12.125 classes=2 num=3 scale_x_y=1.05 new_coords=1 iou_loss=ciou
      iou_thresh=0.213 ignore_thresh=.7 iou_normalizer=0.07 cls_normalizer=0.5 obj_normalizer=0.4
      label_smooth_eps=0.1 max_delta=5 nms_kind=diounms beta_nms=0.5 jitter=.3 random=1
    """
)
"""Every section and key, but for what NANO has."""

LINES = NANO.splitlines()


def line_of(place: str) -> int:
    """Line, counted from 1, of a section (`route1`: the second one) or of a key in it (`route1.groups`)."""
    section, _, key = place.partition(".")
    name, order = (section[:-1], int(section[-1])) if section[-1].isdigit() else (section, 0)
    header = [number for number, line in enumerate(LINES, 1) if line == f"[{name}]"][order]
    return next(i for i in range(header, len(LINES) + 1) if LINES[i - 1].startswith(f"{key}=")) if key else header


def end_of(section: str) -> int:
    """Line of the last key of a section."""
    header = line_of(section)
    return next((i for i in range(header, len(LINES)) if not LINES[i]), len(LINES))


@dataclass(frozen=True)
class Bad:
    """A malformed cfg."""

    name: str
    line: int
    """Line the message names."""
    says: str
    """Regular expression that the message matches."""
    data: bytes
    """Content of the file."""


def whole(name: str, line: int, says: str, content: bytes | str | list[str]) -> Bad:
    """A file of this content, or of these lines."""
    text = "\n".join(content) + "\n" if isinstance(content, list) else content
    return Bad(name, line, says, text.encode() if isinstance(text, str) else text)


def small(content: str, line: int, says: str, name: str = "") -> Bad:
    """A 64 × 64 network of the words of `content`, each a line from line 4 on."""
    return whole(name or content[:40], line, says, ["[net]", "width=64", "height=64", *content.split()])


def other(place: str, text: str, says: str, name: str = "", line: int = 0) -> Bad:
    """The legal cfg with another header, or another value of a key; `line` where another than that one is to blame."""
    at, key = line_of(place), place.partition(".")[2]
    new = f"{key}={text}" if key else text
    name = name or (f"{place}={text[:20]}" if key else text)
    return whole(name, line or at, says, [*LINES[: at - 1], new, *LINES[at:]])


def added(section: str, text: str, says: str, name: str = "") -> Bad:
    """The legal cfg with a line after the header of a section."""
    at = line_of(section)
    return whole(name or f"{section}: {text[:20]}", at + 1, says, [*LINES[:at], text, *LINES[at:]])


def blocks(section: str, text: str, guilty: int, says: str, name: str = "") -> Bad:
    """The legal cfg with the words of `text`, each a line, after a section; word `guilty`, from 1, is to blame."""
    at = end_of(section)
    return whole(name or text[:40], at + guilty, says, [*LINES[:at], *text.split(), *LINES[at:]])


def missing(place: str, says: str) -> Bad:
    """The legal cfg without a key; the header is to blame."""
    at = line_of(place)
    return whole(f"no {place}", line_of(place.partition(".")[0]), says, LINES[: at - 1] + LINES[at:])


BINARY = "control character|not UTF-8"

TEXT = (
    whole("empty", 1, "empty", ""),
    whole("only comments", 1, "no section", "# nothing\n; more\n\n"),
    whole("UTF-16", 1, "not UTF-8", NANO.encode("utf-16")),
    other("convolutional0.size", "3\0", "control character.*x00", "NUL"),
    whole("random bytes", 1, BINARY, bytes([0x9B]) + random.Random(0).randbytes(4095)),
    whole("weights", 1, BINARY, struct.pack("<3iq16f", 0, 2, 5, 0, *[0.1] * 16)),
    whole("checkpoint", 1, BINARY, b"PK\x03\x04" + bytes(99)),
    whole("JPEG", 1, "not UTF-8", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(200)),
    added("convolutional0", "filters 32", "neither .section. nor key=value"),
    added("convolutional0", "=5", "no key before =5"),
    other("convolutional0.filters", "", "filters has no value"),
    other("convolutional0.filters", "3=2", "more than one ="),
    whole("key before any section", 1, "before any section", ["width=64", *LINES]),
    other("convolutional0", "[convolutional", "not closed"),
    other("convolutional0", "[ ]", r"\[ \] has no name"),
    other("convolutional0", "[convolutionnal]", r"did you mean \[convolutional\]"),
    other("convolutional0", "[CONVOLUTIONAL]", r"\[CONVOLUTIONAL\].*did you mean \[convolutional\]"),
    other("convolutional0", "[conv\0]", "control character", "NUL in a section"),
    other("maxpool", "[maxpool] 2", r"2 after \[maxpool\]"),
    other("maxpool", "[region]", r"\[region\] this section is not supported"),
    other("maxpool", "[pooling]", r"\[pooling\] no such section; there are convolutional"),
    whole("repeated with another value", 9, "line 8 says 8", NANO.replace("size=3", "filters=16", 1)),
    added("convolutional0", "filtres=32", "did you mean filters"),
    whole("line of 1 MB", 1, "1000002 bytes", "x=" + "1" * 1_000_000),
    whole("5 MB", 1, "5242880 bytes", "# comment\n" * 524_288),
    whole("100001 sections", 4097, "more than 4096 sections", ["[net]", *["[a]"] * 100_000]),
    other("convolutional0.filters", "32\u00e9", "whole number"),
    whole("Latin-1", 3, "0xe9 is not UTF-8", "[net]\nwidth=64\n# caf\xe9\nheight=64\n".encode("latin-1")),
    whole("lone surrogate", 2, "not UTF-8", b"[net]\n# \xed\xa0\x80\nwidth=64\n"),
    other("convolutional0.filters", "\x1b[31m8", r"control character.*x1b\[31m8", "escape sequence"),
    whole("no newline", 1, "line of its own", " ".join(LINES)),
    *(added("convolutional0", line, "merge conflict") for line in ("<<<<<<< HEAD", "=======", ">>>>>>> other")),
    blocks("net", " ".join(f"unknown_{i:03d}_key=1" for i in range(65)), 65, "64 more", "65 unknown keys"),
)

NOT_FILTERS = (
    *("0", "-1", "1.5", "abc", "1e3", "99999999999999999999", "0x10", "1_000", "\u0661\u0662", "nan", "inf", "[1]"),
    "2147483647",
)

NUMBERS = (
    *(other("convolutional0.filters", text, r"filters=.*a whole number in 1\.\.65536") for text in NOT_FILTERS),
    other("convolutional0.filters", "__import__('os').system('touch CANARY')", "a whole number", "Python as a value"),
    *(other("convolutional0.size", text, r"size=.*a whole number in 1\.\.1024") for text in ("0", "-3", "1000001")),
    *(other("convolutional0.stride", text, r"stride=.*a whole number in 1\.\.1024") for text in ("0", "-1")),
    other("convolutional0.pad", "x", "pad=x: 0 or 1"),
    added("convolutional0", "padding=-5", r"padding=-5: a whole number in 0\.\.1024"),
    added("convolutional1", "groups=0", r"groups=0: a whole number in 1\.\."),
    added("convolutional1", "groups=3", "groups=3: the 8 input channels cannot be split into 3"),
    other("convolutional0.batch_normalize", "3", "batch_normalize=3: 0 or 1"),
    other("convolutional0.activation", "relu7", "relu7: allowed are linear, leaky.*did you mean relu"),
    other("convolutional0.activation", "eval(1)", r"eval\(1\): allowed are linear"),
    other("net.width", "0", r"width=0: a whole number in 1\.\.65536"),
    other("net.width", "60", "width=60: multiples of 8.*64"),
    other("net.height", "68", "height=68: multiples of 8.*64"),
    missing("net.width", "width is missing"),
    missing("net.height", "height is missing"),
    other("net.channels", "0", r"channels=0: a whole number in 1\.\.1024"),
)

UNSUPPORTED = (
    *(
        added("convolutional0", f"{key}=1", f"{key}=1: not supported; only 0 is")
        for key in ("antialiasing", "binary", "xnor", "flipped", "cbn", "sway", "dontload", "coordconv")
    ),
    added("convolutional0", "share_index=-1", "share_index=-1: not supported, and without the key it is another"),
    added("convolutional0", "binary=on", "binary=on: not supported"),
    added("maxpool", "maxpool_depth=1", "maxpool_depth=1: not supported"),
    added("upsample", "scale=2", "scale=2: not supported; only 1 is"),
    added("shortcut", "weights_type=per_pixel", "weights_type=per_pixel: allowed are none, per_feature"),
    added("yolo0", "iou_loss=siou", "iou_loss=siou: allowed are mse, iou"),
    added("yolo0", "new_coords=2", "new_coords=2: 0 or 1"),
)

ORDER = (
    whole("no net", 1, r"starts with \[net\]", LINES[5:]),
    whole("net not first", 1, r"starts with \[net\]", ["[convolutional]", "filters=8", "", *LINES]),
    whole("net twice", len(LINES) + 1, r"\[net\].*once", [*LINES, "[net]", "width=64", "height=64"]),
    small("", 1, "no block follows", "net alone"),
    small("[convolutional] filters=8 [avgpool]", 6, r"there is no \[yolo\]"),
    small("[yolo] anchors=1,2 classes=1", 4, "cannot be the first"),
    small("[shortcut] from=-1", 5, "first block has none to read"),
    small("[route] layers=-1", 5, "first block has none to read"),
    blocks("convolutional5", "[shortcut] from=-1", 4, "must be a .convolutional", "head after a sum"),
    other("route1", "[avgpool]", r"follows a \[yolo\]", "block after a head"),
    whole("dangling", len(LINES) + 1, "nothing reads it", [*LINES, "[route]", "layers=-3"]),
)

REFERENCES = (
    missing("shortcut.from", "from is missing"),
    other("shortcut.from", "0", "from=0: .*write -N"),
    other("shortcut.from", "-999", r"block -995, which is no block; blocks 0\.\.3 can be read"),
    other("shortcut.from", "+1", r"from=\+1: .*-N"),
    other("shortcut.from", "4", "block 4, which is the block itself"),
    other("shortcut.from", "5", "block 5, which is a later block"),
    other("shortcut.from", "conv", "from=conv: .*-N"),
    blocks("convolutional4", "[shortcut] from=-2", 2, "block 5 has 16 x 16 cells, but 8 x 8", "sum of unequal cells"),
    missing("route2.layers", "layers is missing"),
    other("route2.layers", "", "layers has no value"),
    other("route2.layers", "-999", "block -986, which is no block"),
    other("route2.layers", "14", "block 14, which is a later block"),
    other("route2.layers", "13", "block 13, which is the block itself"),
    other("route2.layers", "conv", r"entry 1 \(conv\)"),
    other("route2.layers", "-1, 0", "block 0 has 32 x 32 cells, but 16 x 16"),
    other("route2.layers", "-1,,-3", "entry 2 is empty"),
    other("route2.layers", "-1,4,", "entry 3 is empty"),
    other("route2.layers", ",".join(["-1"] * 1000), "1000 entries; at most 256"),
    other("route2.layers", "9", r"block 9 is a \[yolo\]"),
    other("route2.layers", "10000000000", "no network has so many"),
    other("route0.groups", "0", "groups=0: a whole number"),
    other("route0.groups", "3", "8 channels of block 4 cannot be split into 3"),
    other("route0.group_id", "2", r"group_id=2: 0\.\.1 is allowed, as groups is 2"),
    other("route0.group_id", "-1", r"group_id=-1: a whole number in 0\.\."),
)

SHAPES = (
    other("upsample.stride", "0", "stride=0: a whole number"),
    other("upsample.stride", "4", "block 4 has 16 x 16 cells, but 32 x 32", line=line_of("route2.layers")),
    other("maxpool.size", "0", "size=0: a whole number"),
    added("maxpool", "padding=3", r"padding=3: at most 2 is allowed for size 2"),
    blocks("shortcut", "[scale_channels] from=-2", 1, "16 x 16 cells; 1 x 1 is allowed"),
    blocks(
        "shortcut",
        "[avgpool] [convolutional] filters=4 activation=relu [scale_channels] from=-3",
        6,
        "8 channels, but the block before 4",
    ),
    blocks("convolutional4", "[sam] from=-2", 2, "4 x 16 x 16, but the block before 12 x 8 x 8"),
    blocks("shortcut", "[reorg] stride=3", 2, "16 x 16 cells .* no multiples of 3"),
    blocks("shortcut", "[reorg] stride=4", 2, "8 channels .* no multiple of 16"),
    blocks("shortcut", "[dropout] probability=1", 2, r"at least 0 and at most 0\.999"),
    blocks("shortcut", "[depthwise] filters=9", 2, "filters=9: one filter a channel"),
    blocks("shortcut", "[se] filters=9", 2, "filters=9: 8 is allowed"),
    blocks("shortcut", "[se] reduction=9", 2, "reduction=9: at most 8"),
    blocks("convolutional4", "[maxpool] size=9 padding=0", 2, "size=9: the window reaches over 9 .* has 8"),
    small(
        "[conv] filters=60000 [conv] filters=60000 size=9 [conv] filters=6 [yolo] anchors=1,1 classes=1",
        7,
        r"the weights .* take \d+\.\d GiB",
    ),
    small(
        "[upsample] stride=512 [upsample] stride=2 [convolutional] filters=6 [yolo] anchors=1,1 classes=1", 6, "maps"
    ),
    whole("65504 x 65504", 2, "width=65504: the maps .* GiB", NANO.replace("=64\n", "=65504\n")),
    whole("20001 convolutions", 8194, "4096", ["[net]", "width=64", "height=64", *["[conv]", "stride=2"] * 20_001]),
)

HEADS = (
    other("yolo0.classes", "80", r"filters=21.*255 = 3 \* \(5 \+ 80\)", line=line_of("convolutional5.filters")),
    other("convolutional5.filters", "18", r"filters=18: the \[yolo\] after it needs 21"),
    other("yolo0.anchors", "4,5, 6,8, 9,9.5, 12,10, 16,18, 30", "11 numbers; pairs", "odd anchors"),
    *(
        other("yolo0.anchors", f"4,5, 6,8, 9,9.5, 12,10, 16,18, 30,{last}", rf"entry 12 \({last}\): .* above 0", last)
        for last in ("x", "-1", "0", "nan")
    ),
    other(
        "yolo0.anchors", "4,5, 6,8", r"mask=3,4,5: there is no anchor 3; .* 2 pairs, 0\.\.1", "", line_of("yolo0.mask")
    ),
    missing("yolo0.anchors", "anchors is missing"),
    other("yolo0.mask", "3,4,6", r"there is no anchor 6; anchors has 6 pairs, 0\.\.5"),
    other("yolo0.mask", "3,4,-1", r"entry 3 \(-1\): a whole number in 0"),
    other("yolo0.mask", "3,4,4", "anchor 4 is named twice"),
    other("yolo0.classes", "0", r"classes=0: a whole number in 1\.\."),
    other("yolo1.classes", "4", "classes=4: the head before has 2"),
    other("yolo0.scale_x_y", "0", "scale_x_y=0: a number above 0"),
    added("yolo0", "ignore_thresh=1.5", "ignore_thresh=1.5: a number of at least 0 and at most 1"),
)

EVERY = TEXT + NUMBERS + UNSUPPORTED + ORDER + REFERENCES + SHAPES + HEADS

ODDITIES = {
    "byte order mark": "\ufeff" + NANO,
    "CRLF": NANO.replace("\n", "\r\n"),
    "CR": NANO.replace("\n", "\r"),
    "tabs": "\n".join(f"\t{line}\t" for line in LINES),
    "spaces": NANO.replace("=", " = "),
    "semicolons": "; by hand\n" + NANO.replace("\n", "\n; between\n"),
    "inline comments": "\n".join(f"{line} # {number}" if line else line for number, line in enumerate(LINES)),
    "no newline at the end": NANO.rstrip(),
    "blank lines": NANO.replace("\n", "\n\n   \n"),
    "[network]": NANO.replace("[net]", "[network]"),
    "short names": NANO.replace("[convolutional]", "[conv]").replace("[maxpool]", "[max]"),
    "Leaky": NANO.replace("leaky", "Leaky").replace("mish", "MISH"),
    "spaced lists": NANO.replace("-1,4", " -1 , 4 ").replace(",4,", " ,  4 , "),
    "absolute and relative": NANO.replace("layers=7", "layers=-3").replace("layers=-1,4", "layers=12, -9"),
    "batch_normalize=2": NANO.replace("batch_normalize=1", "batch_normalize=2"),
    "repeated keys": NANO.replace("filters=8", "filters=8\nfilters=8"),
    "defaults written": NANO.replace("size=1", "size=1\ndilation=2\nbias=1\npad=1"),
}
"""Unusual texts of the same network."""
