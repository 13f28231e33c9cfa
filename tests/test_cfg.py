"""Whatever is wrong in a cfg is told in one line with file and line; what is legal is read, written and traced."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mutations import mutated
from tests.bad_cfgs import EVERY, NANO, ODDITIES, RICH, Bad
from tests.nets import PUBLIC_MODELS, conv, one_head
from utils.darknet.blocks import (
    SECTIONS,
    Convolutional,
    Dropout,
    Maxpool,
    Net,
    Network,
    Reorg,
    Route,
    ScaleChannels,
    Se,
    Shortcut,
    Upsample,
    Yolo,
)
from utils.darknet.cfg import format_network, load, parse
from utils.darknet.network import max_stride, strides, trace
from utils.errors import CfgError


def quiet(text: str) -> None:
    """Takes warnings."""


@pytest.mark.parametrize("bad", EVERY, ids=lambda bad: re.sub(r"[^\x20-\x7e]", "?", bad.name))
def test_a_bad_cfg_is_refused_in_one_line_that_names_file_and_line(bad: Bad, tmp_path):
    path = tmp_path / "bad.cfg"
    path.write_bytes(bad.data)
    with pytest.raises(CfgError) as caught:
        load(path, warn=quiet)
    place, _, what = str(caught.value).partition(": ")
    assert place == f"{path}:{bad.line}", what
    assert re.search(bad.says, what)
    assert what.isprintable() and len(what) < 330
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.cfg"]


def test_distinct_causes_have_distinct_messages(tmp_path):
    messages = set()
    for number, bad in enumerate(EVERY):
        path = tmp_path / str(number)
        path.write_bytes(bad.data)
        with pytest.raises(CfgError) as caught:
            load(path, warn=quiet)
        messages.add(str(caught.value).partition(": ")[2])
    assert len(messages) >= len(EVERY) - 8
    assert len({re.sub(r"=[^:]*:|\d+", "", message) for message in messages}) >= 60


@pytest.mark.parametrize("text", ODDITIES.values(), ids=ODDITIES)
def test_an_unusual_text_is_the_same_network(text, tmp_path):
    assert parse(text, warn=quiet) == parse(NANO)
    path = tmp_path / "odd.cfg"
    path.write_bytes(text.encode())
    assert load(path, warn=quiet) == parse(NANO)


def test_control_characters_of_the_file_name_are_escaped(tmp_path):
    path = tmp_path / "a\nb\x1b[31m.cfg"
    path.write_text(NANO.replace("filters=12", "filters=x"))
    with pytest.raises(CfgError, match=r"a\\nb\\x1b\[31m\.cfg:46: \[convolutional\] filters=x") as caught:
        load(path)
    assert str(caught.value).isprintable()


def test_a_missing_file_has_no_line(tmp_path):
    with pytest.raises(CfgError, match=r"no\.cfg: no such file"):
        load(tmp_path / "no.cfg")


@pytest.mark.parametrize("text", ["\ud800", "[net]\nwidth=\udcff", "[net]\x85"])
def test_surrogates_and_control_characters_are_refused_in_texts_too(text):
    with pytest.raises(CfgError, match=r"<text>:\d: control character"):
        parse(text)


WARNED = {
    "learn_rate_decay=1": (r"unknown keys are kept, but not used: learn_rate_decay of \[net\] in line 2", 1),
    "width=64": (r"<text>:3: \[net\] width is repeated \(line 2 says the same\)", 1),
    "burn_in=1000\nmosaic=1\nletter_box=1\nclip=3": ("", 0),
}


@pytest.mark.parametrize(("text", "expected"), WARNED.items(), ids=[text[:10] for text in WARNED])
def test_keys_of_no_use_are_kept_and_told_once_if_nobody_knows_them(text, expected):
    says, count = expected
    notes: list[str] = []
    network = parse(NANO.replace("[net]\n", f"[net]\n{text}\n"), warn=notes.append)
    assert len(notes) == count
    assert all(re.fullmatch(f"warning: .*{says}.*", note) for note in notes)
    if "width" not in text:
        assert network.net.extra == tuple(tuple(line.split("=")) for line in text.split())


def test_readings_that_may_surprise_are_told():
    text = NANO.replace("batch_normalize=1", "batch_normalize=2", 1).replace("activation=leaky\n", "", 1)
    text = text.replace("num=6", "num=6\nnms_kind=grpeedynms", 1)
    notes: list[str] = []
    network = parse(text, "a.cfg", notes.append)
    assert network.blocks[0].batch_normalize and network.blocks[0].activation == "logistic"
    assert network.yolos[0].nms_kind == "default"
    assert [re.match(r"warning: a\.cfg:(\d+): ", note)[1] for note in notes] == ["7", "6", "65"]
    assert "read as 1" in notes[0] and "default is logistic" in notes[1] and "did you mean greedynms" in notes[2]


def test_only_cfg_errors_come_out_and_what_is_accepted_survives_writing():
    rng = random.Random(7)
    accepted = 0
    for _ in range(1500):
        text = mutated(rng.choice((NANO, RICH)), rng)
        try:
            network = parse(text, warn=quiet)
        except CfgError as error:
            assert re.match(r"<text>:\d+: ", str(error)) and str(error).isprintable()
            continue
        accepted += 1
        assert parse(format_network(network), warn=quiet) == network
    assert 150 < accepted < 1350  # both ways are tried


# Legal texts

DARKNET = ("yolov3", "yolov3-spp", "yolov3-tiny", "yolov3-tiny-prn", "yolov3-voc", "yolov4", "yolov4-tiny")
SHARED = [f"darknet_cfg/{name}.cfg" for name in DARKNET] + [f"data/weights/{name}.cfg" for name in PUBLIC_MODELS]
HEADER = "[net]\nwidth=64\nheight=64\n"
HEAD = "[convolutional]\nfilters=6\nactivation=linear\n[yolo]\nanchors=9,9\nclasses=1\n"
WIDE = "[convolutional]\nfilters=4\nactivation=linear\n"


def silent(text: str) -> None:
    """Refuses warnings."""
    raise AssertionError(text)


def first(section: str) -> object:
    """The first block of a network that starts with `section`."""
    return parse(f"{HEADER}{section}\n{HEAD}", warn=silent).blocks[0]


@pytest.mark.parametrize("name", SHARED)
def test_published_cfgs_survive_writing(shared, name):
    network = load(shared / name, silent)
    text = format_network(network)
    assert parse(text, warn=silent) == network
    assert format_network(parse(text)) == text


def test_every_section_and_key_survives_writing():
    seen: set[str] = set()
    for text in (NANO, RICH):
        network = parse(text, warn=silent)
        assert parse(format_network(network), warn=silent) == network
        seen |= {type(block).__name__ for block in network.blocks}
    assert seen == {kind.__name__ for kind in SECTIONS.values()} - {"Depthwise", "RouteLhalf"}


def test_defaults_are_those_of_darknet():
    assert first("[convolutional]\nfilters=4\nactivation=leaky") == Convolutional(filters=4, activation="leaky")
    assert first("[maxpool]\nsize=3") == Maxpool(size=3, stride_x=1, stride_y=1, padding=2)
    assert first("[maxpool]\nstride=2\nstride_y=1") == Maxpool(size=2, stride_x=2, stride_y=1, padding=1)
    assert first("[upsample]") == Upsample(stride=2)
    assert first("[dropout]") == Dropout(probability=0.2)
    assert first("[reorg]") == Reorg(stride=1)
    assert parse(f"{HEADER}{HEAD}").net == Net(width=64, height=64, channels=3)
    assert parse(f"{HEADER}{HEAD}").yolos == (Yolo(mask=(0,), anchors=((9.0, 9.0),), classes=1),)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("[convolutional]\nactivation=silu", "[convolutional]\nactivation=swish"),
        ("[convolutional]\nactivation=sigmoid", "[convolutional]\nactivation=logistic"),
        ("[convolutional]\nbatch_normalize=2", "[convolutional]\nbatch_normalize=1"),
        ("[convolutional]\nfilters=2\nfilters=02", "[convolutional]\nfilters=2"),
        (f"{WIDE}[route_lhalf]\nlayers=-1,0", f"{WIDE}[route]\nlayers=-1,0\ngroups=2"),
        (f"{WIDE}[route_lhalf]\nlayers=-1", f"{WIDE}[route]\nlayers=0\ngroups=2\ngroup_id=0"),
    ],
)
def test_words_of_other_forks_mean_the_same(theirs, ours):
    theirs, ours = (parse(f"{HEADER}{text}\n{HEAD}", warn=[].append).blocks for text in (theirs, ours))
    assert theirs == ours


def test_a_repeated_key_of_a_bad_value_is_named():
    text = NANO.replace("[net]\n", "[net]\nwidth=8\nwidth=wide\n", 1)
    with pytest.raises(CfgError, match=r"^<text>:3: \[net\] width=wide, but line 2 says 8; keep one of them"):
        parse(text)


def test_of_a_repeated_key_without_use_the_first_value_counts():
    notes = []
    network = parse(NANO.replace("[net]\n", "[net]\nbatch=1\nbatch=64\n"), warn=notes.append)
    assert ("batch", "1") in network.net.extra and ("batch", "64") not in network.net.extra
    assert notes == ["warning: <text>:3: [net] batch is repeated; 1 of line 2 counts, as in Darknet"]


@pytest.mark.parametrize(("num", "pairs"), [(1, 2), (2, 1), (9, 1)])
def test_num_does_not_matter_where_the_mask_has_its_anchors(num, pairs):
    head = HEAD.replace("[yolo]", f"[yolo]\nnum={num}\nmask=0").replace("9,9", "9,9" + ",5,5" * (pairs - 1))
    (yolo,) = parse(HEADER + head, warn=silent).yolos
    assert yolo.head_anchors == ((9.0, 9.0),)


@pytest.mark.parametrize(
    ("keys", "padding"),
    [
        ("size=3\npad=1", 1),
        ("size=4\npad=2", 2),
        ("size=5\npad=1\npadding=9", 2),
        ("size=3\npadding=2", 2),
        ("size=1\npad=1", 0),
    ],
)
def test_pad_means_half_the_size_and_wins_over_padding(keys, padding):
    block = first(f"[convolutional]\nfilters=4\nactivation=relu\n{keys}")
    assert isinstance(block, Convolutional) and block.padding == padding


def test_references_are_absolute_in_memory_and_relative_in_the_file_when_near():
    network = parse(NANO)
    assert network.blocks[4] == Shortcut(sources=(1,))
    assert [network.blocks[block] for block in (10, 13)] == [Route(layers=(7,)), Route(layers=(12, 4))]
    text = format_network(network)
    assert "from=-3\n" in text and "layers=-3\n" in text and "layers=-1, -9\n" in text


def test_far_routes_are_written_absolute_and_keys_of_no_use_kept_in_order(shared):
    text = format_network(load(shared / "darknet_cfg/yolov3.cfg"))
    assert "layers=-1, 61\n" in text and "layers=-1, 36\n" in text and "layers=-4\n" in text
    network = load(shared / "darknet_cfg/yolov4.cfg")
    assert dict(network.net.extra)["steps"] == "400000,450000"
    assert [key for key, _ in network.net.extra][:3] == ["batch", "subdivisions", "momentum"]
    assert network.yolos[0].extra[:2] == (("jitter", ".3"), ("truth_thresh", "1"))


@settings(max_examples=50)
@given(st.lists(st.floats(1e-6, 65536), min_size=2, max_size=2))
def test_anchors_keep_every_bit(anchor):
    network = parse(f"{HEADER}{HEAD}")
    yolo = replace(network.yolos[0], anchors=(tuple(anchor),))
    changed = replace(network, blocks=(*network.blocks[:-1], yolo))
    assert parse(format_network(changed)) == changed


def test_squeeze_width_is_the_quotient_or_given():
    assert first("[se]\nreduction=2") == Se(filters=1)
    network = parse(f"{HEADER}channels=64\n[se]\nreduction=5\n[se]\nsqueeze=50\n{HEAD}", warn=silent)
    assert [block.filters for block in network.blocks[:2]] == [12, 50]
    text = format_network(network)
    assert "reduction=5" in text and "squeeze=50" in text and parse(text) == network
    assert first("[se]\nsqueeze=2") == Se(filters=2)  # of 3 channels, which no reduction gives
    narrow = parse(f"{HEADER}[se]\nsqueeze=2\n{HEAD}")
    assert parse(format_network(narrow)) == narrow


@pytest.mark.parametrize(
    ("section", "shape"),
    [
        ("[convolutional]\nfilters=4\nactivation=relu\nsize=3\nstride=2\npad=1", (4, 32, 32)),
        ("[convolutional]\nfilters=4\nactivation=relu\nsize=3\nstride_x=2\nstride_y=1\npad=1", (4, 64, 32)),
        ("[convolutional]\nfilters=4\nactivation=relu\nsize=3\ndilation=3\npad=1", (4, 64, 64)),
        ("[convolutional]\nfilters=4\nactivation=relu\nsize=3\ndilation=3", (4, 58, 58)),
        ("[convolutional]\nfilters=4\nactivation=relu\nsize=6\nstride=2\npad=1", (4, 33, 33)),
        ("[depthwise]\nsize=3\nstride=2\npad=1", (3, 32, 32)),
        ("[maxpool]\nsize=2\nstride=1", (3, 64, 64)),
        ("[maxpool]\nsize=2\nstride=2", (3, 32, 32)),
        ("[maxpool]\nsize=3\nstride=2\npadding=0", (3, 31, 31)),
        ("[avgpool]", (3, 1, 1)),
        ("[upsample]\nstride=4", (3, 256, 256)),
        ("[dropout]\nprobability=0.5", (3, 64, 64)),
    ],
)
def test_shapes_follow_darknet(section, shape):
    """E.g. 6 x 6 with stride 2 and 3 zeros on each side: (64 + 2·3 - 6) // 2 + 1 = 33; dilated zeros count double."""
    assert trace(Network(Net(width=64, height=64), (first(section),)))[0] == shape


def test_scaled_channels_have_the_shape_of_their_source():
    """Sum: the width of the block before; sources may be wider or narrower."""
    blocks = (Convolutional(filters=4), Convolutional(filters=6), Shortcut(sources=(0,)), ScaleChannels(source=2))
    assert trace(Network(Net(width=8, height=8), blocks[:3]))[2] == (6, 8, 8)
    pooled = (*blocks[:3], Maxpool(size=8, stride_x=8, stride_y=8, padding=0), ScaleChannels(source=2))
    assert trace(Network(Net(width=8, height=8), pooled))[4] == (6, 8, 8)


def test_strides_come_from_the_blocks_in_cfg_order(shared):
    assert strides(load(shared / "darknet_cfg/yolov4.cfg")) == (8, 16, 32)
    assert strides(load(shared / "darknet_cfg/yolov3.cfg")) == (32, 16, 8)
    assert strides(load(shared / "data/weights/yoloface-50k.cfg")) == (8,)
    assert max_stride(parse(RICH)) == 4


def test_the_largest_stride_is_that_of_what_is_upsampled_for_a_finer_head():
    """Otherwise a multi-scale training gets maps that cannot be concatenated."""
    coarse = conv(4, 2, stride=2) + conv(4, 4, stride=4)
    network = one_head(coarse, "[upsample]\nstride=4\n[route]\nlayers=-1,0\n")
    assert (strides(network), max_stride(network)) == ((2,), 8)
    assert all(trace(network, side, side)[-1].height == side // 2 for side in (8, 16, 24))
    assert max_stride(one_head("[upsample]\n")) == 1


def test_a_size_off_the_stride_is_refused(shared):
    network = load(shared / "darknet_cfg/yolov3.cfg")
    with pytest.raises(CfgError, match=r"yolov3\.cfg: input 3 x 416 x 400: width: multiples of 32.* 384|416"):
        trace(network, 416, 400)


def test_blocks_that_do_not_fit_are_not_written():
    network = parse(NANO)
    blocks = (*network.blocks[:4], Shortcut(sources=(7,)), *network.blocks[5:])
    with pytest.raises(CfgError, match=r"block 4: from: block 4 reads block 7, which is a later block"):
        format_network(replace(network, blocks=blocks))
