"""The networks of cfg/: totals that are published, Darknet's blocks where it has them, and read by OpenCV."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from utils.darknet import cfg, weights
from utils.darknet import network as darknet
from utils.darknet.blocks import Convolutional, Network
from utils.report.cost import network_cost

# Conv weights, BN channels, parameters, bytes of .weights, {size: BFLOPs of convolutions, BFLOPs as AlexeyAB counts}.
REFERENCE = {
    "yolov3": (
        (107, 75, 61_895_776, 26_304, 61_949_149, 248_007_048),
        {320: (38.973, 38.981), 416: (65.864, 65.879), 608: (140.692, 140.723)},
    ),
    "yolov3-spp": (
        (114, 76, 62_944_352, 26_816, 62_998_749, 252_209_544),
        {416: (66.218, 66.257), 608: (141.449, 141.531)},
    ),
    "yolov3-tiny": (
        (24, 13, 8_845_488, 3_184, 8_852_366, 35_434_956),
        {416: (5.565, 5.571), 608: (11.887, 11.899)},
    ),
    "yolov4": (
        (162, 110, 64_296_032, 33_152, 64_363_101, 257_717_640),
        {320: (35.565, 35.584), 416: (60.105, 60.137), 512: (91.046, 91.095), 608: (128.389, 128.459)},
    ),
    "yolov4-tiny": (
        (38, 21, 6_049_888, 3_104, 6_056_606, 24_251_276),
        {416: (6.908, 6.910), 608: (14.756, 14.761)},
    ),
    "yolov4-csp": (
        (175, 115, 52_855_904, 32_384, 52_921_437, 211_944_840),
        {512: (76.953, 77.003), 640: (120.240, 120.317)},
    ),
}
DARKNETS = ("yolov3", "yolov3-spp", "yolov3-tiny", "yolov4", "yolov4-tiny")
"""Those of which ../shared has Darknet's own file."""
FOLDER = Path(__file__).parents[1] / "cfg"
NAMES = sorted(path.stem for path in FOLDER.iterdir())
LARGE = {name for name in NAMES if name.startswith(("yolov3", "yolov4")) and "tiny" not in name}
BY_SIZE = [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in NAMES]


def load(name: str) -> Network:
    return cfg.load(FOLDER / f"{name}.cfg")


def without_training_keys(network: Network) -> Network:
    """Darknet's files differ from one another, and from ours, in what `[net]` says about batches."""
    return dataclasses.replace(network, net=dataclasses.replace(network.net, extra=()))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_read_without_a_warning_and_written_back(name):
    warnings = []
    network = cfg.load(FOLDER / f"{name}.cfg", warnings.append)
    assert warnings == []
    text = (FOLDER / f"{name}.cfg").read_text(encoding="utf-8")
    assert text[text.index("[net]") :] == cfg.format_network(network)


@pytest.mark.parametrize("name", REFERENCE)
def test_totals_are_the_reference_to_the_digit(name):
    network = load(name)
    convolutions = [block for block in network.blocks if isinstance(block, Convolutional)]
    specs = darknet.tensors(network)
    totals = (
        len(network.blocks),
        len(convolutions),
        sum(spec.size for spec in specs if spec.name == "conv.weight"),
        sum(spec.size for spec in specs if spec.name == "bn.weight"),
        darknet.parameter_count(network),
        darknet.file_bytes(network),
    )
    expected, by_size = REFERENCE[name]
    assert totals == expected
    costs = {size: network_cost(network, size, size) for size in by_size}
    assert {size: (round(2 * cost.macs / 1e9, 3), round(cost.bflops, 3)) for size, cost in costs.items()} == by_size


@pytest.mark.parametrize("name", DARKNETS)
def test_blocks_and_input_are_darknets(name, shared):
    ours = load(name)
    darknets = cfg.load(shared / "darknet_cfg" / f"{name}.cfg")
    assert without_training_keys(ours) == without_training_keys(darknets)
    training, theirs = dict(ours.net.extra), dict(darknets.net.extra)
    assert training.keys() == theirs.keys()
    batch = {"batch", "subdivisions"}  # 1 and 1 in some of Darknet's files: set for testing
    assert {key for key in training if training[key] != theirs[key]} <= batch


def test_yolo_fastest_computes_what_the_public_network_computes(shared):
    ours = load("yolo-fastest")
    public = shared / "data" / "weights" / "yolo-fastest-1.1"
    assert ours.blocks == cfg.load(public.with_name("yolo-fastest-1.1.cfg")).blocks
    assert weights.check(public.with_name("yolo-fastest-1.1.weights"), ours)


@pytest.mark.parametrize("leaky", ["yolov4-leaky", "yolov4-leaky-spp557"])
def test_leaky_twins_differ_from_yolov4_in_activation_and_pools_alone(leaky):
    original, twin = load("yolov4"), load(leaky)
    for block, other in zip(original.blocks, twin.blocks, strict=True):
        changed = {
            field.name
            for field in dataclasses.fields(block)
            if field.compare and getattr(block, field.name) != getattr(other, field.name)
        }
        assert changed <= {"activation", "size", "padding"}
    assert {block.activation for block in twin.blocks if isinstance(block, Convolutional)} == {"leaky", "linear"}
    assert darknet.tensors(twin) == darknet.tensors(original)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("yolov3", (32, 16, 8)),
        ("yolov4", (8, 16, 32)),
        ("yolov4-csp", (8, 16, 32)),
        ("yolov4-tiny", (32, 16)),
        ("mobilenetv2-yolov3", (32, 16, 8)),
        ("yolo-fastest", (32, 16)),
        ("demo", (16, 8)),
    ],
)
def test_strides_of_the_heads(name, expected):
    assert darknet.strides(load(name)) == expected


def random_arrays(network: Network) -> dict[str, np.ndarray]:
    """He's weights for convolutions, γ and variances near 1."""
    generator = np.random.default_rng(0)
    arrays = {}
    for spec in darknet.tensors(network):
        if spec.name in ("bn.weight", "bn.running_var"):
            array = generator.uniform(0.5, 1.5, spec.shape)
        elif spec.name == "conv.weight":
            array = generator.standard_normal(spec.shape) * (2 / np.prod(spec.shape[1:])) ** 0.5
        else:
            array = generator.standard_normal(spec.shape) * 0.1
        arrays[spec.key] = array.astype(np.float32)
    return arrays


def settle(model, images) -> None:
    """Give every batch normalisation the statistics of these images, so that signals neither die nor explode.

    Behind large max pools maps are constant and have no variance, hence the floor.
    """
    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    for module in norms:
        module.momentum = 1.0
    model.train()(images)
    model.eval().requires_grad_(False)
    for module in norms:
        module.running_var.clamp_(min=1.0)


@pytest.mark.parametrize("name", BY_SIZE)
def test_opencv_reads_the_file_and_computes_the_same_heads(name, tmp_path):
    """The heads' convolutions of OpenCV's reader of Darknet files and of models.Darknet, on random weights."""
    cv2 = pytest.importorskip("cv2")
    if not hasattr(cv2.dnn, "readNetFromDarknet"):
        pytest.skip("this OpenCV has no reader of Darknet files: pip install -r requirements-dev.txt")
    torch = pytest.importorskip("torch")
    from models import Darknet

    network = load(name)
    size = 2 * darknet.max_stride(network)
    images = np.random.default_rng(1).uniform(0, 1, (1, 3, size, size)).astype(np.float32)
    model = Darknet(network, initialize=False)
    model.load_state_dict({k: torch.from_numpy(a) for k, a in random_arrays(network).items()}, strict=False)
    settle(model, torch.from_numpy(images))
    weights.write(tmp_path / "random.weights", network, {k: v.numpy() for k, v in model.state_dict().items()})
    opencv = cv2.dnn.readNetFromDarknet(str(FOLDER / f"{name}.cfg"), str(tmp_path / "random.weights"))
    opencv.setInput(images)
    names = opencv.getLayerNames()
    before_detections = [names[names.index(f"permute_{head}") - 1] for head in network.heads]
    got = opencv.forward(before_detections)

    with torch.no_grad():
        want = [head.numpy() for head in model(torch.from_numpy(images)).heads]
    assert [array.shape for array in got] == [array.shape for array in want]
    for ours, theirs in zip(want, got, strict=True):
        assert np.abs(ours - theirs).max() / max(1, np.abs(theirs).max()) <= 1e-3
