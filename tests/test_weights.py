"""Darknet's .weights: layout, sizes, headers, backbones, other class counts, damage."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path

import numpy as np
import pytest

from tests.nets import HEAD, PUBLIC_MODELS, conv, one_head, tiny
from utils.darknet import weights
from utils.darknet.blocks import Convolutional, Maxpool, Net, Network, Se, Shortcut, Yolo
from utils.darknet.cfg import load
from utils.darknet.network import adapt_classes, file_bytes, same_network
from utils.darknet.weights import Contents, Header
from utils.errors import NumericsError, WeightsError

ANCHORS = ((4.0, 4.0), (8.0, 8.0), (16.0, 16.0))
BN = ("bn.bias", "bn.weight", "bn.running_mean", "bn.running_var")

BYTES = 9572
"""Of a file of the network of tests/nets.py."""


@pytest.fixture
def network() -> Network:
    return tiny()


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


def sparse(path: Path, size: int) -> Path:
    """A file of a given size that takes no room: a header and zeros."""
    path.write_bytes(Header().pack()[:size])
    os.truncate(path, size)
    return path


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


@pytest.mark.parametrize(
    ("header", "size"),
    [
        *((Header(*fields), 16) for fields in ((0, 0, 0, 5), (0, 1, 0, 77), (0, 1, 9))),
        *((Header(*fields), 20) for fields in ((0, 2, 0), (0, 2, 5, 1 << 40), (0, 3, 0, 5), (1, 0, 0, 5))),
    ],
)
def test_read_and_written_again_is_the_same_file(header, size, every_kind, tmp_path):
    """The number of images has eight bytes from version 0.2 on, four before."""
    source = file_of_offsets(tmp_path / "a.weights", every_kind, header)
    assert header.size == len(header.pack()) == size == source.stat().st_size - file_bytes(every_kind) + 20
    contents = weights.check(source, every_kind)
    assert contents.complete and contents.header == header == weights.read_header(source)
    weights.write(tmp_path / "b.weights", every_kind, weights.read(source, every_kind), contents.header)
    assert (tmp_path / "b.weights").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes; 16 or 20"),
        (b"\0" * 15, "15 bytes; 16 or 20"),
        (Header().pack()[:19], "19 bytes; 20 were expected"),
        (np.array([1001, 2, 5, 0, 0], "<i4").tobytes(), r"version 1001\.2\.5.*transposed"),
        (np.array([0, 2, 5, 0, 0], ">i4").tobytes(), "not a Darknet .weights file"),
        (np.array([0, -2, 5, 0, 0], "<i4").tobytes(), r"version 0\.-2\.5"),
        (np.array([0, 2, 5, -1, -1], "<i4").tobytes(), "-1 images"),
        (b"PK\x03\x04" + b"\0" * 60, "not a Darknet .weights file"),
    ],
)
def test_an_impossible_header_is_refused(data, message, network, tmp_path):
    (tmp_path / "w.weights").write_bytes(data)
    with pytest.raises(WeightsError, match=f"w.weights: .*{message}"):
        weights.check(tmp_path / "w.weights", network)


def test_a_cut_anywhere_is_refused_with_its_place_and_both_sizes(network, tmp_path):
    """At each field's end, one byte before and one after; a field's end at a block's end may be a backbone."""
    path, layout = tmp_path / "w.weights", weights.tensors(network)
    starts = accumulate((spec.bytes for spec in layout[:-1]), initial=20)  # behind the header
    for spec, start in zip(layout, starts, strict=True):
        for size in {start - 1, start, start + 1} - {19}:
            sparse(path, size)
            with pytest.raises(WeightsError) as raised:
                weights.check(path, network)
            message = str(raised.value)
            at = spec if size >= start else layout[layout.index(spec) - 1]
            inside = f"ends inside {network.where(at.block)}, {at.name}: "
            assert inside in message or (size == start and "ends after block" in message)
            number = f"{size:,}".replace(",", " ")
            assert f"expected 9 572 bytes, found {number}; it is cut short or belongs to another cfg" in message
            assert "(tiny.cfg:" in message


@pytest.mark.parametrize("surplus", [1, 4, 4096])
@pytest.mark.parametrize("partial", [False, True])
def test_surplus_bytes_are_refused(surplus, partial, network, tmp_path):
    path = sparse(tmp_path / "w.weights", BYTES + surplus)
    with pytest.raises(WeightsError, match=r"surplus bytes? after block 14 \(tiny.cfg:84\), conv.weight, the last"):
        weights.check(path, network, partial=partial)


def test_a_file_that_ends_with_a_block_is_a_backbone_for_those_who_take_one(network, tmp_path):
    path = file_of_offsets(tmp_path / "yolov3.weights", network)
    os.truncate(path, 20 + 4 * (32 + 216))
    with pytest.raises(WeightsError, match=r"ends after block 0 \(tiny.cfg:7\) of 16, as a backbone"):
        weights.read(path, network)
    contents = weights.check(path, network, partial=True)
    assert (contents.blocks, contents.of, contents.complete) == (1, 16, False)
    assert str(contents) == "layers 0–0 of 16 loaded"
    arrays = weights.read(path, network, partial=True)
    assert set(arrays) == {f"layers.0.{name}" for name in (*BN, "conv.weight")}
    assert arrays["layers.0.conv.weight"][-1, -1, -1, -1] == 32 + 216 - 1


def test_a_header_alone_is_no_backbone(network, tmp_path):
    with pytest.raises(WeightsError, match=r"ends inside block 0 .*, bn.bias: 32 of 32 bytes missing"):
        weights.check(sparse(tmp_path / "w.weights", 20), network, partial=True)


@pytest.mark.parametrize("classes", [1, 3, 20, 80])
def test_heads_of_another_class_count_are_skipped_and_named(classes, network, tmp_path):
    other = adapt_classes(network, classes)
    path = file_of_offsets(tmp_path / "w.weights", other)
    assert weights.fitting_classes(path, network) == classes
    with pytest.raises(WeightsError, match=f"it fits {classes} classes, and tiny.cfg has 2"):
        weights.read(path, network)
    contents = weights.check(path, network, partial=True)
    assert contents == Contents(Header(), 16, 16, classes, skipped=(8, 14))
    assert str(contents) == f"all 16 layers loaded but 8, 14: heads made for {classes} classes"
    arrays, all_arrays = weights.read(path, network, partial=True), weights.read(path, other)
    assert set(arrays) == {name for name in all_arrays if not name.startswith(("layers.8.", "layers.14."))}
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, all_arrays[name])


@pytest.mark.parametrize("classes", [2, 8, 20])
def test_what_reads_the_channels_of_a_head_is_skipped_too(classes, tmp_path):
    """Its kernel has as many inputs as the head has filters; counted without it, 8 classes look like 10."""
    network = one_head(HEAD, "[route]\nlayers=-2\n", conv(2))
    other = adapt_classes(network, classes)
    path = file_of_offsets(tmp_path / "w.weights", other)
    assert weights.fitting_classes(path, network) == classes
    assert weights.check(path, network, partial=True).skipped == (0, 3, 4)
    assert weights.read(path, network, partial=True) == {}
    assert weights.read(path, other).keys() == {spec.key for spec in weights.tensors(network)}


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
def test_values_that_are_not_finite_are_neither_read_nor_written(value, network, tmp_path):
    arrays = dict(weights.read(file_of_offsets(tmp_path / "w.weights", network), network))
    arrays["layers.14.conv.weight"][3, 1] = value
    message = r"block 14 \(tiny.cfg:84\), conv.weight is NaN or infinite in 1 of 294 places"
    with pytest.raises(NumericsError, match=message):
        weights.write(tmp_path / "bad.weights", network, arrays)
    assert not (tmp_path / "bad.weights").exists()
    bad = np.fromfile(tmp_path / "w.weights", "<f4", offset=20)
    bad[-1] = value
    (tmp_path / "bad.weights").write_bytes(Header().pack() + bad.tobytes())
    with pytest.raises(WeightsError, match=message):
        weights.read(tmp_path / "bad.weights", network)


def test_large_values_are_fine_as_long_as_float32_holds_them(network, tmp_path):
    arrays = {name: np.full(array.shape, 3e38) for name, array in read_zeros(network, tmp_path).items()}
    weights.write(tmp_path / "w.weights", network, arrays)
    assert weights.read(tmp_path / "w.weights", network)["layers.8.conv.bias"][0] == np.float32(3e38)
    with pytest.raises(NumericsError, match=r"bn.bias is NaN or infinite in 8 of 8 places"):
        weights.write(tmp_path / "w.weights", network, {name: 10 * array for name, array in arrays.items()})


def test_a_negative_variance_is_refused(network, tmp_path):
    values = np.zeros((BYTES - 20) // 4, "<f4")
    values[31] = -1e-3
    (tmp_path / "w.weights").write_bytes(Header().pack() + values.tobytes())
    with pytest.raises(WeightsError, match=r"block 0 \(tiny.cfg:7\), bn.running_var has negative variances"):
        weights.read(tmp_path / "w.weights", network)


def read_zeros(network: Network, folder: Path) -> dict[str, np.ndarray]:
    return weights.read(sparse(folder / "zeros.weights", file_bytes(network)), network)


def test_what_is_done_to_the_arrays_does_not_reach_the_file(network, tmp_path):
    path = file_of_offsets(tmp_path / "w.weights", network)
    before = path.read_bytes()
    for array in weights.read(path, network).values():
        array[...] = 7
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("layers.8.conv.bias"), r"block 8 \(tiny.cfg:57\), conv.bias: .*got nothing"),
        (
            lambda arrays: arrays.update({"layers.8.conv.weight": np.zeros((21, 6, 2, 1), np.float32)}),
            r"float \[21, 12, 1, 1\] was expected; got float32 \[21, 6, 2, 1\]",
        ),
        (lambda arrays: arrays.update({"layers.8.conv.bias": np.zeros(21, int)}), r"got int64 \[21\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_not_written(change, message, network, tmp_path):
    arrays = read_zeros(network, tmp_path)
    change(arrays)
    with pytest.raises(ValueError, match=message):
        weights.write(tmp_path / "w.weights", network, arrays)
    assert not (tmp_path / "w.weights").exists()


@pytest.mark.parametrize("name", PUBLIC_MODELS[:-1])
def test_a_published_model_is_read_to_its_last_byte_and_written_alike(name, shared, tmp_path):
    folder = shared / "data" / "weights"
    source, network = folder / f"{name}.weights", load(folder / f"{name}.cfg")
    arrays = weights.read(source, network)
    assert file_bytes(network) == source.stat().st_size == 20 + 4 * sum(array.size for array in arrays.values())
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


def test_no_backbone_of_a_known_net_has_the_size_of_another_class_count(shared):
    """Else the two readings of a file could not be told apart by its size."""
    for path in [*shared.glob("darknet_cfg/*.cfg"), *shared.glob("data/weights/*.cfg")]:
        network = load(path)
        layout = weights.tensors(network)
        ends = accumulate(spec.bytes for spec in layout)
        assert [end for end in list(ends)[:-1] if weights._fitting_classes(network, end) is not None] == []


def test_adapting_changes_heads_and_nothing_else(network):
    other = adapt_classes(network, 7)
    assert other.classes == 7
    assert [block.filters for block in other.blocks if isinstance(block, Convolutional)] == [8, 8, 4, 8, 12, 36, 6, 36]
    assert adapt_classes(other, 2) == network
    assert adapt_classes(network, 2) is network
    with pytest.raises(ValueError, match="at least one class"):
        adapt_classes(network, 0)


def test_networks_that_differ_in_more_than_classes_and_anchors_are_told_apart(network):
    head = network.blocks[9]

    def changed(index: int, block: object) -> Network:
        return replace(network, blocks=(*network.blocks[:index], block, *network.blocks[index + 1 :]))

    retrained = replace(adapt_classes(network, 9), net=Net(width=64, height=96, extra=(("batch", "64"),)))
    for other in (network, changed(9, replace(head, anchors=((9, 9), *head.anchors[1:]))), retrained):
        assert same_network(network, other) and same_network(other, network)
    for index, block in [
        (0, replace(network.blocks[0], filters=5)),
        (7, Maxpool(size=2, stride_x=2, stride_y=2, padding=0)),
        (9, replace(head, scale_x_y=1.1)),
        (9, replace(head, mask=(0, 2))),
    ]:
        assert not same_network(adapt_classes(changed(index, block), 9), network)
    assert not same_network(network, replace(network, blocks=network.blocks[:10]))


# The table of public files in weights/README.md

README_ROW = re.compile(r"^\| (\S+) \| ([0-9 ]+) \| (\S+\.cfg)", re.MULTILINE)


def backbone_bytes(network: Network, blocks: int) -> int:
    """Bytes of a backbone file: the header, and the tensors of the first blocks."""
    return 20 + sum(spec.bytes for spec in weights.tensors(network) if spec.block < blocks)


def test_the_bytes_of_public_files_in_the_readme_are_those_that_the_cfgs_ask_for(root, shared):
    text = (root / "weights" / "README.md").read_text(encoding="utf-8")
    sizes = {}
    for name, size, cfg in README_ROW.findall(text):
        network, sizes[name] = load(root / "cfg" / cfg), int(size.replace(" ", ""))
        blocks = int(name.rpartition(".conv.")[2]) if ".conv." in name else len(network.blocks)
        assert sizes[name] == backbone_bytes(network, blocks), name
    assert len(sizes) == 8
    size = backbone_bytes(load(root / "cfg" / "yolov3-tiny.cfg"), 15)
    assert f"{size:,}".replace(",", " ") + " bytes" in text
    assert (shared / "data" / "weights" / "yolov3-tiny.weights").stat().st_size == sizes["yolov3-tiny.weights"]
