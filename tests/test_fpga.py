"""Networks of shifts: the integers that are written are the simulation in every bit, and the folder alone says so."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import export
from models import ConvBlock, Darknet, fuse, load_arrays
from tests.nets import TINY, one_head, printed
from tests.random_nets import networks
from tests.test_export import pictures
from tests.test_integers import SHIFTS, write
from tests.test_models import CONV, lively
from tests.test_quantized_networks import calibrated
from utils.checkpoint import load_model
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.cfg import parse
from utils.darknet.targets import check
from utils.errors import InfeasibleError, InputError
from utils.export.fpga import CodeRange, Program, Step, program, prove, shift
from utils.flags import ModelFiles
from utils.quantization.quantizers import MOST_SHIFT
from utils.quantization.scheme import SHIFT_SLOPE, QuantSettings

LEAKY = TINY.replace("mish", "leaky")


def shifting(network: Network, found: QuantSettings = SHIFTS) -> tuple[Darknet, torch.Tensor]:
    """A quantized model, and pictures its bounds are those of."""
    images = pictures(network, 2)
    return calibrated(lively(network), images, found), images


@settings(max_examples=30)
@given(
    network=networks(shifts=True),
    bits=st.tuples(*[st.integers(2, 16)] * 3),
    even=st.booleans(),
    scheme=st.sampled_from(("google", "google", "dorefa")),
)
def test_the_integers_are_the_simulation_in_every_bit(network, bits, even, scheme):
    """Whatever blocks, bits and ties: also for a picture whose values leave the bounds that were found."""
    weight_bits, activation_bits, bias_bits = bits
    found = QuantSettings(scheme, "fpga", weight_bits, activation_bits, True, half_even=even, bias_bits=bias_bits)
    model, images = shifting(network, found)
    made = program(model)
    assert prove(made, model, images[:1])[2]["codes"] > 0
    prove(made, model, 3 * images[1:])


def test_a_changed_integer_is_found():
    model, images = shifting(parse(LEAKY, "n.cfg"))
    made = program(model)
    made.steps[3].weight[0, 0, 1, 1] += 3
    with pytest.raises(InfeasibleError, match=r"block 3 .*codes differ from the simulation in float64"):
        prove(made, model, images[:1])


@given(a=st.integers(-(2**40), 2**40), places=st.integers(-10, 70), even=st.booleans())
@settings(max_examples=300)
def test_a_shift_rounds_as_fractions_do(a, places, even):
    exact = Fraction(a) / Fraction(2) ** places
    whole, rest = divmod(abs(exact), 1)
    up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and (whole % 2 == 1 or not even))
    want = (1 if a >= 0 else -1) * (whole + up)
    assert int(shift(np.array([a]), places, even)[0]) == want


def slopes_of(model: Darknet) -> set[float]:
    return {module.negative_slope for module in model.modules() if isinstance(module, nn.LeakyReLU)}


def test_leaky_is_13_128_in_the_quantized_network_only():
    model, _ = shifting(parse(LEAKY, "n.cfg"))
    assert slopes_of(model) == slopes_of(fuse(model)) == {SHIFT_SLOPE} == {13 / 128}
    assert slopes_of(lively(parse(LEAKY, "n.cfg"))) == {0.1}


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e-4])
def test_silent_channels_keep_the_accumulator_within_32_bits(scale):
    """Sparse training leaves channels with γ next to 0 beside β; their bias is a whole number of units all the same."""
    dilated = CONV.replace("size=3", "size=3\ndilation=2\ngroups=2")
    network = one_head(CONV.format(6, "leaky") + CONV.format(8, "relu6") + dilated.format(8, "relu"))
    model = lively(network)
    with torch.no_grad():
        for layer in model.layers:
            if isinstance(layer, ConvBlock) and layer.bn is not None:
                layer.bn.weight[::2] *= scale
    images = torch.rand(2, 3, 16, 16)
    model = calibrated(model, images, SHIFTS)
    made = program(model)
    _, needed, _ = prove(made, model, images[:1])
    assert max(needed) <= 32
    for step in made.steps:
        assert all(0 <= places <= MOST_SHIFT for places in step.up) or step.kind != "convolution"
    assert all(torch.isfinite(head).all() for head in model(images).heads)


def test_a_network_of_zeros_puts_out_zeros():
    network = one_head(CONV.format(4, "leaky"))
    model = Darknet(network).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model = calibrated(model, torch.zeros(2, 3, 16, 16), SHIFTS)
    assert (model(torch.rand(1, 3, 16, 16)).heads[0] == 0).all()
    prove(program(model), model, torch.rand(1, 3, 16, 16))


def test_sums_bound_what_any_input_gives():
    """Inputs at their limits, with the signs of the weights, reach the bits that are said, and no more."""
    network = one_head(CONV.format(4, "linear"))
    model, _ = shifting(network)
    made = program(model)
    step = made.steps[0]
    needed = step.accumulator_bits([made.image])
    largest = 0
    for o in range(4):
        signs = np.sign(step.weight[o]) * (np.sign(step.bias[o]) or 1)
        patch = np.where(signs < 0, made.image.low, made.image.high)[:, :3, :3]
        sums = (patch * step.weight[o]).sum() + (int(step.bias[o]) << step.up[o])
        largest = max(largest, abs(int(sums)))
    assert needed - 1 <= largest.bit_length() + 1 <= needed


def test_gradients_pass_through_rounded_biases():
    model, images = shifting(one_head(CONV.format(6, "leaky")))
    model.train().requires_grad_(True)
    model(images).heads[0].square().sum().backward()
    layer = model.layers[0]
    assert (layer.bn.bias.grad != 0).any() and (layer.conv.weight.grad != 0).any()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[se]\nreduction=2\n", "block 1 .*se needs more than shifts"),
        ("[shortcut]\nfrom=-1\nweights_type=per_feature\n", "weighted sum needs more than shifts; take another"),
        ("[shortcut]\nfrom=-1\nactivation=swish\n", "swish needs more than shifts; .*--activation swish=leaky"),
    ],
)
def test_blocks_that_need_more_than_shifts_are_refused(section, message):
    network = one_head(CONV.format(4, "leaky") + section)
    with pytest.raises(InputError, match=message):
        check(network, "fpga")
    check(network, "cpu")


@pytest.mark.parametrize("change", [{"heads": "float"}, {"first": "float"}, {"kept": (1,)}, {"published": True}])
def test_nothing_stays_float(change):
    with pytest.raises(ValueError, match="no float arithmetic"):
        QuantSettings(target="fpga", **change)


@pytest.fixture
def folder(tmp_path, capsys):
    """The folder of a network with ties away from 0, and what was said."""
    write(tmp_path / "a.pt", QuantSettings("google", "fpga", 5, 7, fold=True, half_even=False))
    flags = ("--weights", f"{tmp_path}/a.pt", "--format", "fpga", "--output", f"{tmp_path}/a.fpga")
    return tmp_path / "a.fpga", printed(capsys, export.main, *flags)


def read(folder: Path) -> tuple[Program, dict[str, np.ndarray], dict]:
    """A network from its folder alone, as somebody else's program would read it."""
    layout, arrays = json.loads((folder / "layout.json").read_text()), dict(np.load(folder / "model.npz"))
    blocks = parse(layout["cfg"], "read.cfg").blocks
    even, steps = layout["rounding"] == "half to even", []
    for block, section in zip(layout["blocks"], blocks, strict=True):
        own = {key: arrays.get(f"block{block['block']:03d}.{key}") for key in ("weight", "bias")}
        own = {key: None if value is None else value.astype(float) for key, value in own.items()}
        limits = (block["exponent"], block["low"], block["high"], block["bits"])
        codes = CodeRange(*limits, even, block["activation"] == "leaky")
        places = (tuple(block.get("up", ())), tuple(block.get("down", ())))
        steps.append(Step(block["computes"], section, tuple(block["reads"]), codes, *places, **own))
    image = layout["image"]
    picture = CodeRange(image["exponent"], -128, 127, image["bits"], even)
    return Program(picture, tuple(steps)), arrays, layout


def test_the_folder_alone_says_what_to_compute(folder):
    path, document = folder
    made, arrays, layout = read(path)
    codes = made.run(arrays["image"].astype(float))
    for index, block in enumerate(layout["blocks"]):
        if block["computes"] != "pass":
            np.testing.assert_array_equal(codes[index], arrays[f"block{index:03d}.output"], str(block))
    kinds = {"convolution", "shortcut", "product", "route", "maxpool", "upsample", "reorg", "pass"}
    assert {block["computes"] for block in layout["blocks"]} <= kinds
    assert document["bytes"] == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert document["max_abs_error"] == 0 and document["float32"]["share"] < 0.01


def test_text_has_the_same_codes(folder):
    path, _ = folder
    arrays = np.load(path / "model.npz")
    assert sorted(arrays.files) == sorted(file.stem for file in (path / "hex").iterdir())
    for name in arrays.files:
        lines = (path / "hex" / f"{name}.hex").read_text().split()
        bits = 4 * len(lines[0])
        values = [int(line, 16) - (int(line, 16) >> (bits - 1) << bits) for line in lines]
        assert values == arrays[name].ravel().tolist()


def test_text_of_a_network_that_was_there_before_goes(tmp_path, monkeypatch):
    """It had more blocks."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.pt", SHIFTS)
    call, text = ["--weights", "a.pt", "--format", "fpga", "--exist-ok"], Path("runs/export/exp/model.fpga/hex")
    export.main(call)
    names = sorted(text.iterdir())
    (text / "block099.weight.hex").write_text("00\n")
    export.main(call)
    assert sorted(text.iterdir()) == names


def test_a_sample_picture_is_the_one_that_is_written(tmp_path, capsys):
    from utils.data.images import write_image

    write(tmp_path / "a.pt", SHIFTS)
    write_image(tmp_path / "p.png", np.full((64, 64, 3), 51, np.uint8))
    sample = ["--sample", f"{tmp_path}/p.png"]
    export.main(["--weights", f"{tmp_path}/a.pt", "--format", "fpga", "--output", f"{tmp_path}/a.fpga", *sample])
    text = capsys.readouterr().out
    assert "the same in every bit of" in text and f"its outputs for {tmp_path}/p.png differ" in text
    _, arrays, layout = read(tmp_path / "a.fpga")
    assert (arrays["image"] == round(0.2 * 2.0 ** -layout["image"]["exponent"])).all()


def test_a_stored_network_has_its_slope_and_its_biases_when_loaded(tmp_path):
    model = write(tmp_path / "a.pt", SHIFTS)
    loaded = load_model(ModelFiles(None, tmp_path / "a.pt", True)).model.eval()
    images = torch.rand(1, 3, 64, 64)
    for mine, theirs in zip(model(images).heads, loaded(images).heads, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov3-tiny", "yolo-fastest-1.1", "MobileNetV2-YOLOv3-Nano-coco"])
def test_a_trained_network_is_exact(name, shared):
    """Residual units, depthwise convolutions, relu6 and leaky, at a size that a test can afford."""
    folder = shared / "data" / "weights"
    network = parse((folder / f"{name}.cfg").read_text(), f"{name}.cfg")
    network = dataclasses.replace(network, net=dataclasses.replace(network.net, width=128, height=128))
    arrays = weights_file.read(folder / f"{name}.weights", network)
    model = load_arrays(network, {key: torch.from_numpy(array) for key, array in arrays.items()}).eval()
    images = torch.rand(1, 3, 128, 128)
    model = calibrated(model, images, SHIFTS)
    _, needed, facts = prove(program(model), model, images)
    assert max(needed) <= 32
    assert facts["float32"]["share"] < 1e-3
