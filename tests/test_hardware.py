"""The table of hardware: what it says of networks, what its rewrites mend, and where it is asked."""

from __future__ import annotations

import shlex
from dataclasses import replace
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest

import compress
from tests.nets import one_head, printed, tiny
from utils.darknet import cfg, info, rewrite
from utils.darknet.blocks import SECTIONS, Convolutional
from utils.darknet.data_file import DataConfig
from utils.darknet.targets import (
    HARDWARE,
    IN_FLOAT,
    ON_CPU,
    OPERATIONS,
    REFUSED,
    RUNS,
    UNKNOWN,
    check,
    operations,
    rewrite_command,
    support_of,
)
from utils.errors import InputError
from utils.files import ROOT
from utils.quantization.scheme import TARGETS, QuantSettings, export_command

CONV = "[convolutional]\nfilters=4\nsize={}\nstride={}\npad=1\nactivation={}\n"
POOL = "[maxpool]\nsize={}\nstride={}\n"


@pytest.mark.parametrize("name", HARDWARE)
def test_a_row_names_its_source_and_only_operations_there_are(name):
    row = HARDWARE[name]
    assert row.source and row.elsewhere in ("", ON_CPU, IN_FLOAT)
    assert {*row.runs, *row.lacks} <= set(OPERATIONS)
    assert bool(row.tools) == (name not in TARGETS)
    refuses = any(support.verdict == REFUSED for support in support_of(tiny(), name))
    assert refuses == (name == "fpga")  # shifts


@pytest.mark.parametrize("path", sorted((ROOT / "cfg").glob("*.cfg")), ids=lambda path: path.stem)
def test_every_block_of_cfg_that_computes_has_operations(path):
    for block in cfg.load(path).blocks:
        names = {operation.name for operation in operations(block, 1, head=False)}
        assert names <= set(OPERATIONS)
        assert names or block.SECTION in ("yolo", "route", "dropout", "shortcut")


@pytest.mark.parametrize(("channels", "name"), [(4, "depthwise"), (8, "grouped")])
def test_a_filter_that_reads_two_channels_is_not_depthwise(channels, name):
    (operation,) = operations(Convolutional(filters=4, groups=4, activation="linear"), channels, head=False)
    assert operation.name == name


def test_every_kind_of_section_is_known():
    without = {"yolo", "dropout", "depthwise", "route_lhalf", "route", "shortcut", "convolutional"}
    assert set(SECTIONS) - without <= set(OPERATIONS)


@pytest.mark.parametrize(
    ("target", "section", "operation", "verdict", "flag"),
    [
        ("dpu", CONV.format(3, 1, "mish"), "mish", ON_CPU, "--activation mish=leaky"),
        ("dpu", CONV.format(17, 1, "leaky"), "convolution 17 x 17", ON_CPU, ""),
        ("dpu", POOL.format(9, 1), "maxpool 9 x 9", ON_CPU, "--pools chained"),
        ("dpu", POOL.format(9, 1) + "padding=4\n", "maxpool 9 x 9", ON_CPU, ""),
        ("dpu", POOL.format(8, 8), "maxpool 8 x 8, stride 8", RUNS, ""),
        ("dpu", CONV.format(3, 1, "swish"), "swish", UNKNOWN, ""),
        ("edgetpu", CONV.format(3, 1, "leaky"), "leaky", ON_CPU, "--activation leaky=relu6"),
        ("edgetpu", "[se]\nreduction=2\n", "se", ON_CPU, "--drop-se"),
        ("ethos-u", CONV.format(3, 4, "relu"), "convolution 3 x 3, stride 4", ON_CPU, ""),
        ("ethos-u", CONV.format(3, 2, "relu"), "convolution 3 x 3, stride 2", RUNS, ""),
        ("tensorrt", "[shortcut]\nfrom=-1\n", "sum", IN_FLOAT, ""),
        ("cpu", CONV.format(1, 1, "mish"), "mish", IN_FLOAT, "--activation mish=leaky"),
        ("rknn", CONV.format(1, 1, "mish"), "mish", RUNS, ""),
        ("hailo", POOL.format(2, 2), "maxpool 2 x 2, stride 2", UNKNOWN, ""),
        ("fpga", CONV.format(1, 1, "swish"), "swish", REFUSED, "--activation swish=leaky"),
        ("fpga", "[avgpool]\n", "avgpool", REFUSED, ""),
    ],
)
def test_worked_examples(target, section, operation, verdict, flag):
    network = one_head("[convolutional]\nfilters=4\nactivation=relu\n", section)
    (support,) = [support for support in support_of(network, target) if str(support.operation) == operation]
    assert (support.verdict, support.blocks, support.rewrite) == (verdict, (1,), flag)


@pytest.mark.parametrize(("activation", "flag"), [("linear", "--drop-se"), ("relu", "")])
def test_drop_se_is_offered_only_for_gates_that_it_drops(activation, flag):
    gate = f"[avgpool]\n{CONV.format(1, 1, 'relu')}[scale_channels]\nfrom=-3\nactivation={activation}\n"
    network = one_head(CONV.format(3, 1, "relu"), gate)
    (support,) = [support for support in support_of(network, "tensorrt") if support.verdict == IN_FLOAT]
    assert support.rewrite == flag
    graph = rewrite.graph_of(network)
    assert (rewrite.drop_se(graph) != graph) == bool(flag)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ethosu") is None, reason="ethos-u-vela is not installed")
@pytest.mark.parametrize(
    "section",
    [
        *(CONV.format(3, 1, name) for name in ("leaky", "swish", "h_swish", "mish", "logistic", "hardsigmoid")),
        *(CONV.format(3, stride, "relu6") + "groups=4\n" for stride in (1, 4)),
        *(CONV.format(3, 1, "relu") + key for key in ("groups=2\n", "dilation=2\n")),
        *(POOL.format(size, stride) for size, stride in ((2, 2), (13, 1), (4, 4))),
        *("[upsample]\n", "[reorg]\nstride=2\n", "[route]\nlayers=-1\ngroups=2\n", "[se]\nreduction=2\n"),
        *(f"[shortcut]\nfrom=-1\nweights_type={weights}\nactivation=linear\n" for weights in ("none", "per_feature")),
        f"[avgpool]\n{CONV.format(1, 1, 'relu')}[scale_channels]\nfrom=-3\n",
    ],
)
def test_the_compiler_of_ethos_u_agrees(section, tmp_path):
    from tests.test_tflite import compiled, lively, quantized

    network, settings = one_head(CONV.format(3, 1, "relu"), section, width=48), QuantSettings(target="ethos-u")
    model = quantized(lively(network), settings)
    on_cpu = compiled(model, settings, tmp_path, "--accelerator-config", "ethos-u55-256")
    assert (on_cpu == 0) == all(support.verdict == RUNS for support in support_of(network, "ethos-u"))


@pytest.mark.parametrize("target", HARDWARE)
@pytest.mark.parametrize("name", ["yolov4", "yolov3-spp", "yolo-fastest", "mobilenetv2-yolov3"])
def test_the_command_mends_what_it_is_offered_for(name, target):
    network = cfg.load(ROOT / "cfg" / f"{name}.cfg")
    problems = [support for support in support_of(network, target) if support.rewrite]
    stored = rewrite_command(replace(network, path="a b.pt!cfg"), problems)
    assert not stored or stored.startswith("python -m utils.darknet.rewrite CFG --weights 'a b.pt' --")
    command = rewrite_command(network, problems)
    assert bool(command) == bool(problems)
    if problems:
        args = rewrite.parse_args(shlex.split(command)[3:])
        changes = [rewrite.EXACT["pools"]] * bool(args.pools) + [rewrite.drop_se] * args.drop_se
        graph = reduce(lambda graph, change: change(graph), changes, rewrite.graph_of(network))
        for swap in args.activation:
            graph = rewrite.swap_activation(*swap, graph)
        assert not [support for support in support_of(rewrite.lay_out(network, graph)[0], target) if support.rewrite]


def test_the_way_out_names_what_no_rewrite_mends():
    network = one_head(CONV.format(3, 1, "mish"), "[avgpool]\n")
    with pytest.raises(InputError, match=r"mish=leaky -o OUT\.cfg` writes a cfg without that, except avgpool$"):
        check(network, "fpga")


def test_many_equal_blocks_are_one_line_with_the_way_out():
    (line,) = check(cfg.load(ROOT / "cfg/yolov4.cfg"), "dpu")
    assert line.startswith("warning: --target dpu: block 0 (") and line.count("mish is not supported") == 1
    assert " and 71 more: mish" in line and "--activation mish=leaky --pools chained -o OUT.cfg`" in line
    assert check(cfg.load(ROOT / "cfg/yolov3-tiny.cfg"), "dpu") == ()


def test_integers_of_tflite_targets_are_those_of_arm_and_go_into_its_file():
    for name in ("tflite", "edgetpu", "ethos-u"):
        settings = QuantSettings(target=name, weight_bits=8)
        assert settings.activations() == QuantSettings(target="arm").activations()
        data = DataConfig(Path("d.data"), 1, ("a",), None, None)
        assert export_command(settings, data, "m.pt") == "python export.py --weights m.pt --int8 --format tflite"


def test_info_prints_a_line_for_equal_blocks_and_the_command(capsys):
    path = str(ROOT / "cfg/yolov4.cfg")
    info.main([path, "--target", "dpu"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["runs", "on", "the", "CPU", "mish", "72", "0", "…", "104"] in [line[:9] for line in lines]
    document = printed(capsys, info.main, path, "--target", "dpu")
    assert document["layers"] == 162 and document["target"]["source"] == HARDWARE["dpu"].source
    assert shlex.join(lines[-1][1:]) == document["target"]["next"]
    assert document["target"]["operations"][0]["blocks"][-1] == 104


def test_compress_warns_before_it_trains(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("stages: {a: {script: train}, b: {script: quantize, target: edgetpu}}\n")
    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), "--recipe", "r.yaml", "--dry-run"]
    compress.main(files)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: --target edgetpu")]
    assert len(warnings) == 1 and "leaky is not in the list" in warnings[0]


def table() -> str:
    """The table of docs/export.md."""
    lines = ["| `--target` | hardware | not computed, and limits | source |\n", "| --- | --- | --- | --- |\n"]
    for name, row in HARDWARE.items():
        bounds = {key: bound._asdict().items() for key, bound in row.runs.items() if any(bound)}
        limits = {key: ", ".join(f"{kind} up to {most}" for kind, most in bounds[key] if most) for key in bounds}
        unknown = [key for key in OPERATIONS if key not in {*row.runs, *row.lacks}]
        parts = [f"{row.elsewhere or REFUSED}: {', '.join(row.lacks)}"] * bool(row.lacks)
        parts += [f"{key}: {limit}" for key, limit in limits.items()]
        silent = ", ".join(unknown) if len(unknown) < 12 else f"all but {', '.join(row.runs)}"
        parts += [f"{UNKNOWN}: {silent}"] * bool(unknown)
        parts += [part for part in (row.note, row.tools and f"quantized by {row.tools}") if part]
        lines.append(f"| `{name}` | {row.what} | {'<br>'.join(parts) or '–'} | {row.source} |\n")
    return "".join(lines)


def test_the_page_has_the_table():
    assert table() in (ROOT / "docs/export.md").read_text(encoding="utf-8"), table()
