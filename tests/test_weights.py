"""Darknet's .weights: layout, sizes, headers, backbones, other class counts, damage."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest

from utils.darknet import weights
from utils.darknet.blocks import Convolutional, Maxpool, Net, Network, Route, Se, Shortcut, Yolo
from utils.darknet.cfg import load, parse
from utils.darknet.network import adapt_classes, file_bytes, parameter_count, same_network
from utils.darknet.weights import Contents, Header, TensorSpec
from utils.errors import NumericsError, WeightsError

ANCHORS = ((4.0, 4.0), (8.0, 8.0), (16.0, 16.0))
BN = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var")

NANO = """\
[net]
width=32
height=32

[convolutional]
batch_normalize=1
filters=4
size=3
stride=2
pad=1
activation=leaky

[maxpool]
size=2
stride=2

[convolutional]
filters=14
activation=linear

[yolo]
mask=0,1
anchors=4,4, 8,8, 16,16
num=3
classes=2

[route]
layers=1

[convolutional]
filters=7
activation=linear

[yolo]
mask=2
anchors=4,4, 8,8, 16,16
num=3
classes=2
"""
NANO_BYTES = 20 + 4 * (4 * 4 + 4 * 3 * 9 + 14 + 14 * 4 + 7 + 7 * 4)


@pytest.fixture
def nano() -> Network:
    return parse(NANO, "nano.cfg")


@pytest.fixture
def every_kind() -> Network:
    """Each kind of block that has tensors, in each of its forms."""
    blocks = (
        Convolutional(filters=8, size=3, stride_x=2, stride_y=2, padding=1, batch_normalize=True, activation="leaky"),
        Convolutional(filters=8, size=3, padding=1, groups=8, batch_normalize=True, activation="relu6"),
        Convolutional(filters=8, size=5, padding=2, groups=8),
        Se(filters=2),
        Shortcut(sources=(2,), weights_type="per_feature", weights_normalization="relu"),
        Shortcut(sources=(3, 2), weights_type="per_channel", weights_normalization="softmax"),
        Convolutional(filters=6, size=3, padding=1, groups=2, bias=False, activation="linear"),
        Shortcut(sources=(0,)),
        Convolutional(filters=12, groups=6, activation="mish"),
        Convolutional(filters=2 * 7, activation="linear"),
        Yolo(mask=(0, 2), anchors=ANCHORS, classes=2),
    )
    return Network(Net(width=16, height=16, channels=1), blocks)


EVERY_TENSOR = [
    *((0, name, (8,)) for name in BN),
    (0, "conv.weight", (8, 1, 3, 3)),
    *((1, name, (8,)) for name in BN),
    (1, "conv.weight", (8, 1, 3, 3)),
    (2, "conv.bias", (8,)),
    (2, "conv.weight", (8, 1, 5, 5)),
    (3, "fc1.weight", (2, 8)),
    (3, "fc2.weight", (8, 2)),
    (4, "weights", (2,)),
    (5, "weights", (3, 8)),
    (6, "conv.weight", (6, 4, 3, 3)),
    (8, "conv.bias", (12,)),
    (8, "conv.weight", (12, 1, 1, 1)),
    (9, "conv.bias", (14,)),
    (9, "conv.weight", (14, 12, 1, 1)),
]


def file_of_offsets(path: Path, network: Network, header: Header | None = None) -> Path:
    """A file whose value at each place is the number of that place."""
    header = header or Header()
    count = (file_bytes(network) - 20) // 4
    path.write_bytes(header.pack() + np.arange(count, dtype="<f4").tobytes())
    return path


def sparse(path: Path, size: int, header: Header | None = None) -> Path:
    """A file of a given size that takes no room: a header and zeros."""
    path.write_bytes((header or Header()).pack()[:size])
    os.truncate(path, size)
    return path


def field_ends(network: Network) -> list[int]:
    """Where each tensor ends in a file with a header of 20 bytes."""
    return [20 + end for end in accumulate(spec.bytes for spec in weights.tensors(network))]


def test_the_layout_lists_every_tensor_in_darknets_order(every_kind):
    assert list(weights.tensors(every_kind)) == [TensorSpec(*row) for row in EVERY_TENSOR]


def test_every_tensor_is_read_from_its_place(every_kind, tmp_path):
    arrays = weights.read(file_of_offsets(tmp_path / "w.weights", every_kind), every_kind)
    start = 0
    for block, name, shape in EVERY_TENSOR:
        array = arrays.pop(f"layers.{block}.{name}")
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, np.arange(start, start + np.prod(shape)).reshape(shape))
        start += array.size
    assert not arrays
    assert file_bytes(every_kind) == 20 + 4 * start


@pytest.mark.parametrize("header", [Header(seen=1 << 40), Header(0, 2, 0), Header(0, 1, 0, 77), Header(0, 1, 9)])
def test_read_and_written_again_is_the_same_file(header, every_kind, tmp_path):
    source = file_of_offsets(tmp_path / "a.weights", every_kind, header)
    contents = weights.check(source, every_kind)
    assert contents.complete and contents.header == header
    weights.write(tmp_path / "b.weights", every_kind, weights.read(source, every_kind), contents.header)
    assert (tmp_path / "b.weights").read_bytes() == source.read_bytes()


def test_the_count_of_parameters_leaves_running_statistics_out(nano):
    assert parameter_count(nano) == (NANO_BYTES - 20) // 4 - 2 * 4
    assert file_bytes(nano) == NANO_BYTES


@pytest.mark.parametrize(("major", "minor", "size"), [(0, 1, 16), (0, 2, 20), (0, 3, 20), (1, 0, 20), (0, 0, 16)])
def test_seen_has_eight_bytes_from_version_0_2_on(major, minor, size, nano, tmp_path):
    header = Header(major, minor, 0, 5)
    assert header.size == len(header.pack()) == size
    path = file_of_offsets(tmp_path / "w.weights", nano, header)
    assert weights.read_header(path) == header
    assert path.stat().st_size == NANO_BYTES - 20 + size
    assert weights.check(path, nano).complete


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes; 16 or 20"),
        (b"\0" * 15, "15 bytes; 16 or 20"),
        (Header().pack()[:19], "19 bytes; 20 were expected"),
        (np.array([1001, 2, 5, 0, 0], "<i4").tobytes(), r"version 1001\.2\.5.*transposed"),
        (np.array([0, 2, 5, 0, 0], ">i4").tobytes(), "not a Darknet .weights file"),
        (np.array([0, -2, 5, 0, 0], "<i4").tobytes(), r"version 0\.-2\.5"),
        (np.array([0, 2, 5, -1, -1], "<i4").tobytes(), "-1 pictures"),
        (b"PK\x03\x04" + b"\0" * 60, "not a Darknet .weights file"),
    ],
    ids=["empty", "15 bytes", "19 bytes", "transposed", "big-endian", "negative", "unseen", "zip"],
)
def test_an_impossible_header_is_refused(data, message, nano, tmp_path):
    (tmp_path / "w.weights").write_bytes(data)
    with pytest.raises(WeightsError, match=f"w.weights: .*{message}"):
        weights.check(tmp_path / "w.weights", nano)


def test_a_cut_anywhere_is_refused_with_its_place_and_both_sizes(nano, tmp_path):
    """At each field's end, one byte before and one after; a field's end at a block's end may be a backbone."""
    path, layout = tmp_path / "w.weights", weights.tensors(nano)
    starts = [20, *field_ends(nano)[:-1]]
    for spec, start in zip(layout, starts, strict=True):
        for size in {start - 1, start, start + 1} - {19}:
            sparse(path, size)
            with pytest.raises(WeightsError) as raised:
                weights.check(path, nano)
            message = str(raised.value)
            at = spec if size >= start else layout[layout.index(spec) - 1]
            inside = f"ends inside {nano.where(at.block)}, {at.name}: "
            assert inside in message or (size == start and "ends after block" in message)
            assert f"expected {NANO_BYTES} bytes, found {size}; it is cut short or belongs to another cfg" in message
            assert "(nano.cfg:" in message


def test_the_message_of_a_cut(nano, tmp_path):
    with pytest.raises(WeightsError) as raised:
        weights.check(sparse(tmp_path / "w.weights", 20 + 4 * 16 + 32), nano)
    assert str(raised.value) == (
        f"{tmp_path}/w.weights: ends inside block 0 (nano.cfg:5), conv.weight: 400 of 432 bytes missing; expected "
        "936 bytes, found 116; it is cut short or belongs to another cfg"
    )


@pytest.mark.parametrize("surplus", [1, 4, 4096])
@pytest.mark.parametrize("partial", [False, True])
def test_surplus_bytes_are_refused(surplus, partial, nano, tmp_path):
    path = sparse(tmp_path / "w.weights", NANO_BYTES + surplus)
    with pytest.raises(WeightsError, match=r"surplus bytes? after block 5 \(nano.cfg:30\), conv.weight, the last"):
        weights.check(path, nano, partial=partial)


@pytest.mark.parametrize("name", ["yolov3", "yolov4", "yolov4-tiny"])
def test_a_cut_of_a_large_file_is_found_without_reading_it(name, shared, tmp_path):
    network = load(shared / "darknet_cfg" / f"{name}.cfg")
    path = sparse(tmp_path / "w.weights", file_bytes(network))
    assert weights.check(path, network).complete
    for end in field_ends(network)[:-1:29]:
        for size in (end - 1, end, end + 1):
            os.truncate(path, size)
            with pytest.raises(WeightsError, match=r"ends (inside|after) block \d+ \(.*\.cfg:\d+\)"):
                weights.check(path, network)


def test_a_file_that_ends_with_a_block_is_a_backbone_for_those_who_take_one(nano, tmp_path):
    path = file_of_offsets(tmp_path / "yolov3.weights", nano)
    os.truncate(path, 20 + 4 * (16 + 108))
    with pytest.raises(WeightsError, match=r"ends after block 0 \(nano.cfg:5\) of 7, as a backbone"):
        weights.read(path, nano)
    contents = weights.check(path, nano, partial=True)
    assert (contents.blocks, contents.of, contents.complete) == (1, 7, False)
    assert str(contents) == "layers 0–0 of 7 loaded"
    arrays = weights.read(path, nano, partial=True)
    assert set(arrays) == {f"layers.0.{name}" for name in (*BN, "conv.weight")}
    assert arrays["layers.0.conv.weight"][-1, -1, -1, -1] == 16 + 108 - 1


def test_a_header_alone_is_no_backbone(nano, tmp_path):
    with pytest.raises(WeightsError, match=r"ends inside block 0 .*, bn.bias: 16 of 16 bytes missing"):
        weights.check(sparse(tmp_path / "w.weights", 20), nano, partial=True)


def test_no_name_of_a_file_means_anything(nano, tmp_path):
    for name in ("yolov3.weights", "darknet53.conv.74", "yolov4.conv.137", "x"):
        path = file_of_offsets(tmp_path / name, nano)
        assert weights.check(path, nano, partial=True).complete
        assert len(weights.read(path, nano)) == len(weights.tensors(nano))


@pytest.mark.parametrize("classes", [1, 3, 20, 80])
def test_heads_of_another_class_count_are_skipped_and_named(classes, nano, tmp_path):
    other = adapt_classes(nano, classes)
    path = file_of_offsets(tmp_path / "w.weights", other)
    assert weights.fitting_classes(path, nano) == classes
    with pytest.raises(WeightsError, match=f"it fits {classes} classes, and nano.cfg has 2"):
        weights.read(path, nano)
    contents = weights.check(path, nano, partial=True)
    assert contents == Contents(Header(), 7, 7, classes, skipped=(2, 5))
    assert str(contents) == f"all 7 layers loaded but 2, 5: heads made for {classes} classes"
    arrays, all_arrays = weights.read(path, nano, partial=True), weights.read(path, other)
    assert set(arrays) == {name for name in all_arrays if not name.startswith(("layers.2.", "layers.5."))}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, all_arrays[name])


def test_what_follows_a_skipped_head_is_read_from_its_place(tmp_path):
    """A head in the middle: the tensors behind it move by the difference of its widths."""
    head = Convolutional(filters=6, activation="linear"), Yolo(mask=(0,), anchors=ANCHORS, classes=1)
    blocks = (
        Convolutional(filters=2, activation="linear"),
        *head,
        Route(layers=(0,)),
        Convolutional(filters=3, activation="linear"),
        *head,
    )
    network = Network(Net(width=8, height=8, channels=1), blocks)
    path = file_of_offsets(tmp_path / "w.weights", adapt_classes(network, 4))
    arrays = weights.read(path, network, partial=True)
    assert arrays["layers.4.conv.bias"][0] == 2 + 2 + (9 + 9 * 2)


def test_a_file_of_another_net_is_refused_unless_the_sizes_agree(shared, tmp_path):
    networks = [load(path) for path in sorted([*shared.glob("darknet_cfg/*.cfg"), *shared.glob("data/weights/*.cfg")])]
    sizes = [file_bytes(network) for network in networks]
    path = tmp_path / "w.weights"
    for (network, size), other in product(zip(networks, sizes, strict=True), sorted(set(sizes))):
        sparse(path, other)
        if size == other:
            assert weights.check(path, network).complete
        else:
            with pytest.raises(WeightsError, match=str(network.path)):
                weights.check(path, network)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_neither_read_nor_written(value, nano, tmp_path):
    arrays = dict(weights.read(file_of_offsets(tmp_path / "w.weights", nano), nano))
    arrays["layers.5.conv.weight"] = np.full((7, 4, 1, 1), 1, np.float32)
    arrays["layers.5.conv.weight"][3, 1] = value
    with pytest.raises(
        NumericsError, match=r"block 5 \(nano.cfg:30\), conv.weight is NaN or infinite in 1 of 28 places"
    ):
        weights.write(tmp_path / "bad.weights", nano, arrays)
    assert not (tmp_path / "bad.weights").exists()
    bad = np.fromfile(tmp_path / "w.weights", "<f4", offset=20)
    bad[-1] = value
    (tmp_path / "bad.weights").write_bytes(Header().pack() + bad.tobytes())
    with pytest.raises(
        WeightsError, match=r"block 5 \(nano.cfg:30\), conv.weight is NaN or infinite in 1 of 28 places"
    ):
        weights.read(tmp_path / "bad.weights", nano)


def test_large_values_are_fine_as_long_as_float32_holds_them(nano, tmp_path):
    arrays = {name: np.full(array.shape, 3e38) for name, array in read_zeros(nano, tmp_path).items()}
    weights.write(tmp_path / "w.weights", nano, arrays)
    assert weights.read(tmp_path / "w.weights", nano)["layers.2.conv.bias"][0] == np.float32(3e38)
    with pytest.raises(NumericsError, match=r"bn.bias is NaN or infinite in 4 of 4 places"):
        weights.write(tmp_path / "w.weights", nano, {name: 10 * array for name, array in arrays.items()})


def test_a_negative_variance_is_refused(nano, tmp_path):
    values = np.zeros((NANO_BYTES - 20) // 4, "<f4")
    values[15] = -1e-3
    (tmp_path / "w.weights").write_bytes(Header().pack() + values.tobytes())
    with pytest.raises(WeightsError, match=r"block 0 \(nano.cfg:5\), bn.running_var has negative variances"):
        weights.read(tmp_path / "w.weights", nano)


def read_zeros(network: Network, folder: Path) -> dict[str, np.ndarray]:
    return weights.read(sparse(folder / "zeros.weights", file_bytes(network)), network)


def test_what_is_done_to_the_arrays_does_not_reach_the_file(nano, tmp_path):
    path = file_of_offsets(tmp_path / "w.weights", nano)
    before = path.read_bytes()
    for array in weights.read(path, nano).values():
        array[...] = 7
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("layers.2.conv.bias"), r"block 2 \(nano.cfg:17\), conv.bias: .*got nothing"),
        (
            lambda arrays: arrays.update({"layers.2.conv.weight": np.zeros((14, 2, 2, 1), np.float32)}),
            r"float \[14, 4, 1, 1\] was expected; got float32 \[14, 2, 2, 1\]",
        ),
        (lambda arrays: arrays.update({"layers.2.conv.bias": np.zeros(14, int)}), r"got int64 \[14\]"),
    ],
    ids=["missing", "shape", "type"],
)
def test_a_tensor_that_does_not_fit_is_not_written(change, message, nano, tmp_path):
    arrays = read_zeros(nano, tmp_path)
    change(arrays)
    with pytest.raises(ValueError, match=message):
        weights.write(tmp_path / "w.weights", nano, arrays)
    assert not (tmp_path / "w.weights").exists()


def test_only_regular_files_are_opened(nano, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "loop", tmp_path / "none", "/dev/zero", "a\0b"):
        for function in (weights.check, weights.read, weights.fitting_classes):
            with pytest.raises(WeightsError):
                function(path, nano)


MODELS = {
    "MobileNetV2-YOLO-Fastest-voc": 191_214,
    "MobileNetV2-YOLO-Fastest-voc-v2": 209_864,
    "MobileNetV2-YOLOv3-Nano-coco": 891_070,
    "MobileNetV2-YOLOv3-Nano-voc": 769_750,
    "yolo-fastest-1.1": 346_062,
    "yolo-fastest-1.1-xl": 923_486,
    "yolo-fastest-1.1_body": 294_396,
    "yoloface-500k": 130_140,
    "yoloface-500k-v2": 104_624,
    "yoloface-50k": 11_248,
    "yolov3-tiny": 8_858_734,
}
"""Published models and the float32 values in their files."""


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_read_to_its_last_byte_and_written_alike(name, shared, tmp_path):
    folder = shared / "data" / "weights"
    source, network = folder / f"{name}.weights", load(folder / f"{name}.cfg")
    arrays = weights.read(source, network)
    assert sum(array.size for array in arrays.values()) == MODELS[name]
    assert file_bytes(network) == source.stat().st_size == 20 + 4 * MODELS[name]
    weights.write(tmp_path / "w.weights", network, arrays, weights.read_header(source))
    assert (tmp_path / "w.weights").read_bytes() == source.read_bytes()


def test_a_published_backbone_is_read(shared):
    folder = shared / "data" / "weights"
    network = load(folder / "MobileNetV2-YOLO-Fastest-voc.cfg")
    path = folder / "MobileNetV2-YOLO-Fastest.conv.57"
    assert str(weights.check(path, network, partial=True)) == "layers 0–56 of 80 loaded"
    arrays = weights.read(path, network, partial=True)
    assert sum(array.size for array in arrays.values()) == 106_040
    with pytest.raises(WeightsError, match=r"ends after block 56 \(.*-voc.cfg:\d+\) of 80"):
        weights.check(path, network)


def test_a_published_model_of_another_class_count_gives_all_but_its_heads(shared):
    folder = shared / "data" / "weights"
    network = load(folder / "MobileNetV2-YOLOv3-Nano-voc.cfg")
    path = folder / "MobileNetV2-YOLOv3-Nano-coco.weights"
    contents = weights.check(path, network, partial=True)
    assert contents.classes == 80
    assert contents.skipped == tuple(head - 1 for head in network.heads)
    arrays = weights.read(path, network, partial=True)
    whole = weights.read(path, adapt_classes(network, 80))
    assert len(whole) - len(arrays) == 2 * len(network.heads)


def test_no_backbone_of_a_known_net_has_the_size_of_another_class_count(shared):
    """Else the two readings of a file could not be told apart by its size."""
    for path in [*shared.glob("darknet_cfg/*.cfg"), *shared.glob("data/weights/*.cfg")]:
        network = load(path)
        layout = weights.tensors(network)
        ends = accumulate(spec.bytes for spec in layout)
        assert [end for end in list(ends)[:-1] if weights._fitting_classes(network, layout, end) is not None] == []


def test_adapting_changes_heads_and_nothing_else(nano):
    other = adapt_classes(nano, 7)
    assert other.classes == 7
    assert [block.filters for block in other.blocks if isinstance(block, Convolutional)] == [4, 24, 12]
    assert adapt_classes(other, 2) == nano
    assert adapt_classes(nano, 2) is nano
    with pytest.raises(ValueError, match="at least one class"):
        adapt_classes(nano, 0)


def test_networks_that_differ_in_more_than_classes_and_anchors_are_told_apart(nano):
    other = adapt_classes(nano, 9)
    retrained = replace(other, net=Net(width=64, height=96, extra=(("batch", "64"),)))
    assert same_network(nano, nano)
    anchors = ((9, 9), *nano.blocks[3].anchors[1:])
    assert same_network(
        nano, replace(nano, blocks=(*nano.blocks[:3], replace(nano.blocks[3], anchors=anchors), *nano.blocks[4:]))
    )
    assert same_network(nano, retrained) and same_network(retrained, nano)
    for index, block in [
        (0, replace(nano.blocks[0], filters=5)),
        (1, Maxpool(size=2, stride_x=2, stride_y=2, padding=0)),
        (3, replace(nano.blocks[3], scale_x_y=1.1)),
        (3, replace(nano.blocks[3], mask=(0, 2))),
    ]:
        changed = replace(nano, blocks=(*nano.blocks[:index], block, *nano.blocks[index + 1 :]))
        assert not same_network(adapt_classes(changed, 9), nano)
    assert not same_network(nano, replace(nano, blocks=nano.blocks[:4]))
