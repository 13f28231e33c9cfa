"""The pruning scripts: what they print and write, and that others can read it."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import normal_prune
import slim_prune
from models import Darknet, load_arrays
from tests.nets import csv_rows, printed, tiny
from utils.checkpoint import load_model, read_checkpoint, write_darknet
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.data.draw import GAP, SHORTEST, STRIP
from utils.data.images import read_image
from utils.detection.evaluate import Accuracy
from utils.errors import InfeasibleError, InputError, ResourceError
from utils.flags import choose_model
from utils.pruning import report, workflow

AMOUNTS = {
    **dict.fromkeys(("normal", "regular", "shortcut", "slim"), ("--percent", "0.2")),
    "layer": ("--shortcut", "1"),
    "layer_channel": ("--shortcut", "1", "--percent", "0.2"),
}
"""What each script removes of the tiny network, which has one residual unit: blocks 2 to 4."""
FILES = {
    *("args.yaml", "env.json", "model.cfg", "model.pt", "model.weights", "plan.json", "report.md"),
    *("channels.csv", "channels.png", "detections.jpg", "importance.png"),
}
FIGURES = {"map50", "map50_95", "parameters", "macs", "weights_bytes", "ms"}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(workflow, "interleaved", partial(workflow.interleaved, rounds=5, warm=1))


@pytest.fixture
def arrays(files) -> dict[str, np.ndarray]:
    """Tensors of the network."""
    return weights_file.read(files[3], tiny())


def written(document: dict) -> tuple:
    """The network and the tensors of a run."""
    network = cfg_file.load(document["cfg"])
    return network, weights_file.read(document["weights"], network)


@pytest.mark.parametrize("name", AMOUNTS)
def test_a_pruned_network_is_written_proved_and_can_be_used(files, folder, tmp_path, capsys, name):
    project = ("--project", str(tmp_path / "runs"))
    script = importlib.import_module(f"{name}_prune").main
    document = printed(capsys, script, *files, *AMOUNTS[name], "--data", str(folder / "d.data"), *project)
    assert document["strategy"] == name
    assert (document["max_percent"] is None) == (name == "layer")
    assert set(document["before"]) == set(document["after"]) == FIGURES
    assert document["after"]["parameters"] <= document["before"]["parameters"]
    assert None not in {*document["after"].values(), *document["before"].values(), *document["absorbed"].values()}
    assert document["after"]["ms"] == document["latency"]["compact"]["median"] > 0
    faster, less = (document["before"][key] / document["after"][key] for key in ("ms", "macs"))
    assert document["efficiency"] == pytest.approx(faster / less)
    assert max(document["certificate"][key] for key in ("compact_vs_silenced", "compact_vs_keep_size")) < 1e-4
    network, arrays = written(document)
    assert Path(document["weights"]).stat().st_size == document["after"]["weights_bytes"]
    model = load_arrays(network, {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}).eval()
    stored = load_model(choose_model(None, str(Path(document["run_dir"]) / "model.pt"))).model.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(image).heads, stored(image).heads, strict=True))
    run = Path(document["run_dir"])
    wanted = f"; efficiency {faster / less:.2f}: time ÷ {faster:.2f}, multiply-adds ÷ {less:.2f}\n"
    assert wanted in report.text(document) and wanted in (run / "report.md").read_text()
    assert {path.name for path in run.iterdir()} == FILES - ({"importance.png"} if name == "layer" else set())
    height, width, _ = read_image(run / "detections.jpg").shape
    assert width == 2 * SHORTEST + GAP and (height + GAP - STRIP) % (SHORTEST + GAP) < STRIP * 2
    again = ("--cfg", document["cfg"], "--weights", document["weights"], "--no-test", "--percent", "0.1")
    assert printed(capsys, slim_prune.main, *again, *project)["run_dir"].endswith("exp2")


def test_plan_and_table_say_what_went(prune, files):
    document = prune("layer_channel", *AMOUNTS["layer_channel"], "--no-test")
    run = Path(document["run_dir"])
    plan = json.loads((run / "plan.json").read_text())
    assert plan["policy"]["percent"] == 0.2 and plan["policy"]["layer_keep"] == 0.01
    assert plan["channels"]["removed"] == int(0.2 * plan["channels"]["candidates"])
    assert plan["channels"]["threshold"] > 0
    assert [(unit["source"], unit["blocks"]) for unit in plan["units"]] == [(1, [2, 3, 4])]
    assert plan["reconstructed"] == 0
    for key in ("before", "after", "certificate", "max_percent", "advised_percent", "run_dir"):
        assert plan[key] == document[key]
    rows = {int(row["block"]): row for row in csv_rows(run / "channels.csv")}
    network = cfg_file.load(document["cfg"])
    assert len(network.blocks) == len(tiny().blocks) - 3
    for block, row in rows.items():
        assert (row["new_block"] == "") == (row["unit"] == "4") == (block in (2, 3))
        if row["new_block"]:
            assert network.blocks[int(row["new_block"])].filters == int(row["after"])
        else:
            assert row["after"] == "0"
    assert yaml.safe_load((run / "args.yaml").read_text())["percent"] == [0.2]
    assert "| pruned" in (run / "report.md").read_text()
    measured = (document["silenced"], document["absorbed"], document["latency"], document["efficiency"])
    assert {*measured, document["after"]["map50"]} == {None}
    assert not (run / "detections.jpg").exists()


def test_a_network_pruned_in_its_own_folder_knows_what_it_was(prune):
    once = prune("slim", "--percent", "0.2", "--no-test")
    before = hashlib.sha256(Path(once["weights"]).read_bytes()).hexdigest()
    own = ("--cfg", once["cfg"], "--weights", once["weights"], "--name", "exp", "--exist-ok")
    prune("slim", "--percent", "0.2", "--no-test", *own)
    lineage = read_checkpoint(Path(once["run_dir"]) / "model.pt")["lineage"]
    assert lineage[-1]["sha256"] == before


def test_a_grid_has_a_row_for_every_combination(prune, tmp_path):
    document = prune("layer_channel", "--percent", "0.1", "0.5", "--shortcuts", "0", "1", "2", "--dry-run")
    assert [(row["percent"], row["shortcut"]) for row in document["grid"]] == [*product((0.1, 0.5), (0, 1, 2))]
    for row in document["grid"]:
        assert (row["after"] is None) == (row["shortcut"] == 2) == ("works is 1" in str(row["infeasible"]))
    macs = [row["after"]["macs"] for row in document["grid"] if row["after"]]
    assert macs[0] > macs[1] > macs[3] and macs[0] > macs[2] > macs[3]
    assert document["residual_units"] == 1
    assert not (tmp_path / "runs").exists()


def test_a_grid_shows_what_is_infeasible(files, capsys):
    normal_prune.main([*files, "--percent", "0.1", "0.99", "--dry-run"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "--importance gamma: there are no training images" in err
    assert [line.split()[0] for line in lines[2:5]] == ["–", "0.1", "0.99"]
    assert lines[4].endswith("infeasible")
    assert any(line.startswith("the largest percent that works is 0.") for line in lines)


def test_too_much_is_refused_with_what_works(prune, tmp_path):
    with pytest.raises(InfeasibleError, match=r"the largest percent that works is 0\.\d{4}$") as caught:
        prune("normal", "--percent", "0.99", "--no-test")
    with pytest.raises(InfeasibleError, match="would lose all"):
        prune("normal", "--percent", "0.99", "--dry-run")
    with pytest.raises(InfeasibleError, match=r"--shortcut 2: .* largest number that works is 1"):
        prune("layer", "--shortcut", "2", "--no-test")
    assert not (tmp_path / "runs").exists()
    largest = str(caught.value).split()[-1]
    assert prune("normal", "--percent", largest, "--no-test")["max_percent"] == float(largest)


def test_a_network_without_residual_units_is_named(root, prune, tmp_path):
    cfg, weights = str(root / "cfg" / "yolov3-tiny.cfg"), tmp_path / "t.weights"
    write_darknet(weights, Darknet(cfg_file.load(cfg)))
    flags = ("--cfg", cfg, "--weights", str(weights), "--no-test")
    with pytest.raises(InputError, match=r"--shortcut: .*yolov3-tiny\.cfg has no residual unit.*slim_prune\.py"):
        prune("layer", "--shortcut", "1", *flags)
    assert not (tmp_path / "runs").exists()


def test_a_certificate_that_fails_ends_the_run_before_it_writes(prune, tmp_path, monkeypatch):
    def doubled(graph, arrays, _):
        return workflow.PrunedNetwork(graph.network, {name: 2 * array for name, array in arrays.items()})

    monkeypatch.setattr(workflow, "prune_network", doubled)
    with pytest.raises(InfeasibleError, match=r"certificate: .* nothing is written"):
        prune("slim", "--percent", "0.2", "--no-test")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["model.weights", "model.pt", "model.cfg"])
def test_a_run_that_cannot_write_leaves_no_cfg_without_its_weights(prune, tmp_path, monkeypatch, kind):
    """Whatever cannot be written, at the moment its temporary file becomes the file; a folder that was there stays."""
    (tmp_path / "runs" / "exp").mkdir(parents=True)
    real = os.replace

    def full(source, target, *more, **flags):
        if str(target).endswith(kind):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return real(source, target, *more, **flags)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError):
        prune("slim", "--percent", "0.2", "--no-test", "--exist-ok")
    left = {path.name for path in (tmp_path / "runs" / "exp").iterdir()}
    assert {"model.cfg", kind}.isdisjoint(left)
    assert not any(name.endswith(".tmp") for name in left)


@pytest.mark.parametrize("name", ["slim", "layer_channel"])
def test_the_rows_of_the_table_are_those_networks(prune, folder, monkeypatch, name):
    """With the mean of all heads for AP: absorbed equals compact; silenced equals compact without absorption."""

    @torch.no_grad()
    def mean(self, name, model):
        image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        value = float(torch.cat([head.ravel() for head in model(image).heads]).mean())
        return Accuracy(value, value), [(np.zeros((3, 64, 64), np.uint8), np.zeros((0, 6)))]

    monkeypatch.setattr(workflow.Pruner, "accuracy", mean)
    flags = (*AMOUNTS[name], "--data", str(folder / "d.data"), "--importance", "gamma", "--reconstruct", "0")
    absorbed, bare = prune(name, *flags), prune(name, *flags, "--no-absorb")
    original, silenced, taken, compact = (absorbed[key]["map50"] for key in ("before", "silenced", "absorbed", "after"))
    assert taken == pytest.approx(compact, abs=1e-6)
    assert bare["silenced"]["map50"] == silenced == pytest.approx(bare["after"]["map50"], abs=1e-6)
    assert bare["before"]["map50"] == original and bare["absorbed"] is None
    assert min(abs(original - silenced), abs(original - taken), abs(silenced - taken)) > 1e-5


def test_readers_are_fitted_where_there_are_training_pictures(prune, folder):
    flags = ("--percent", "0.2", "--no-test", "--data", str(folder / "d.data"), "--batch-size", "4")
    fitted, few, constants = (
        prune("slim", *flags, *more) for more in ((), ("--reconstruct", "4"), ("--reconstruct", "0"))
    )
    assert [document["reconstructed"] for document in (fitted, few, constants)] == [9, 4, 0]
    assert fitted["certificate"]["border"] is None and constants["certificate"]["border"] > 0
    networks = [written(document) for document in (fitted, few, constants)]
    assert networks[0][0].blocks == networks[2][0].blocks
    one, other = (np.concatenate([array.ravel() for array in arrays.values()]) for _, arrays in networks[::2])
    assert not np.allclose(one, other)


def test_what_was_fitted_and_ranked_by_is_said(files, folder, tmp_path, capsys):
    flags = ("--percent", "0.2", "--data", str(folder / "d.data"), "--project", str(tmp_path))
    slim_prune.main([*files, *flags])
    out, err = capsys.readouterr()
    assert "--reconstruct 128: 9 images are used; there are no more" in err
    assert "--importance taylor: what masking a channel does to the loss" in err
    assert "pruned, readers fitted" in out and "border" not in out


def test_the_end_of_a_run_tells_how_to_go_on(files, folder, tmp_path, capsys):
    flags = ("--percent", "0.5", "--data", str(folder / "d.data"), "--importance", "gamma", "--reconstruct", "0")
    slim_prune.main([*files, *flags, "--project", str(tmp_path / "a b"), "--img_size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["original", "masked", "constants", "pruned"]
    assert lines[6].startswith("ms: forward pass of one image, 32 × 32") and "rounds" in lines[6]
    assert lines[7].startswith("certificate: pruned = masked to ")
    assert lines[8].startswith("advised: ") and "train.py -sr" in lines[9]
    run = tmp_path / "a b" / "exp"
    assert lines[10] == (
        f"next: python train.py --weights '{run / 'model.pt'}' --data {folder / 'd.data'} --img_size 32 "
        f"--t_cfg {files[1]} --t_weights {files[3]} --epochs 50"
    )


@pytest.mark.parametrize(("sides", "side"), [(("64", "32"), None), (("64", "64"), "64")])
def test_two_sides_are_no_range_of_sizes_in_the_next_command(prune, sides, side):
    words = prune("slim", "--percent", "0.2", "--no-test", "--img_size", *sides)["next"].split()
    assert ("--img_size" in words) == (side is not None)
    assert side is None or words[words.index("--img_size") + 1 :][:2] == [side, "--t_cfg"]


@pytest.mark.parametrize(("percent", "warned"), [(0.3, False), (0.47, False), (0.5, True), (None, False)])
def test_more_than_is_advised_is_warned_of(percent, warned):
    document = {"percent": percent, "advised_percent": 0.47}
    free, *warning = report.advice(document)
    assert free.startswith("advised: --percent 0.47; the weakest 47 % of the channels hold at most 5 % of any layer's")
    assert bool(warning) == warned
    assert list(report.advice(document | {"advised_percent": None})) == []
    assert next(report.advice(document | {"advised_percent": 0.0})).startswith("advised: no pruning yet")


def test_the_input_size_is_that_of_costs_and_latency(prune, folder):
    flags = ("--percent", "0.2", "--data", str(folder / "d.data"))
    small, large = prune("slim", *flags, "--no-test"), prune("slim", *flags, "--img_size", "128", "64")
    assert large["before"]["macs"] == 2 * small["before"]["macs"]
    assert (large["latency"]["height"], large["latency"]["width"]) == (128, 64)


def test_widths_are_rounded_and_more_convolutions_prune_if_asked_for(prune):
    document = prune("slim", "--percent", "0.6", "--no-test", "--multiple-of", "4", "--all-convs")
    rows = csv_rows(f"{document['run_dir']}/channels.csv")
    widths = {row["block"]: int(row["after"]) for row in rows if row["candidate"] == "1"}
    assert widths and all(width % 4 == 0 or (block, width) == ("11", 6) for block, width in widths.items())
    classic, every = (prune("slim", "--percent", "0.6", "--dry-run", *flag) for flag in ((), ("--all-convs",)))
    assert every["after"]["parameters"] != classic["after"]["parameters"]


def test_explain_says_why_channels_are_tied(files, capsys):
    slim_prune.main([*files[:2], "--explain", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("block 3 (") and "8 channels" in lines[0]
    assert "  tied: blocks 3 and 1, added by the shortcut" in "\n".join(lines)
    assert [line.split()[-1] for line in lines if "candidate of set" in line] == ["no", "yes", "yes"]
    assert "blocks 2 to 4" in lines[-1]
    document = printed(capsys, slim_prune.main, *files[:2], "--explain", "11")
    assert document["schema"] == 1 and document["block"] == 11
    assert any(line.endswith("with --all-convs") for line in document["explanation"])
    assert "in group 2 of group_prune.py, top-down, to the first upsampled head" in "\n".join(document["explanation"])


def test_explain_needs_no_torch(files, python):
    code = "import sys, layer_prune; layer_prune.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = python("-c", code, *files[:2], "--explain", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("block 0 (")


@pytest.mark.parametrize(
    ("name", "flags", "match"),
    [
        ("slim", "--percent 1", "--percent: 1 is outside 0 <= value < 1"),
        ("slim", "--percent nan", "--percent: 'nan' is not a number"),
        ("slim", "--percent 0.5", "--data: is needed"),
        ("slim", "--percent 0.5 --no-test --multiple-of 0", "--multiple-of: 0: allowed are 1 to 1024"),
        ("slim", "--percent 0.5 --no-test --multiple-of auto", "--multiple-of: auto is gone; give 8"),
        ("slim", "--percent 0.5 --shortcut 1", "unknown flag --shortcut"),
        ("slim", "--percent 0.1 0.2 --no-test", "several values are compared with --dry-run"),
        ("slim", "--percent 0.1 --no-test --recalibrate 2", "unknown flag --recalibrate"),
        ("slim", "--explain 16", "--explain 16: .*n.cfg has the blocks 0 to 15"),
        ("slim", "--sensitivity", "--sensitivity: is no flag here; compare amounts with --dry-run"),
        ("slim", "--percent 0.1 --sensitivity-pictures 2", "--sensitivity-pictures: is no flag here; --max-drop"),
        ("group", "--group-percent auto --target-macs 0.5", "--group-percent: auto is gone; give numbers"),
        ("group", "--group-percent half", "--group-percent: 'half' is not a number"),
        ("group", "--group-percent 0.1 --no-test", "1 values, but .*n.cfg has 2 groups: 1 backbone.*; 2 top-"),
        ("group", "--group-percent 0.1 1", "--group-percent: 1 is outside 0 <= value < 1"),
        ("group", "--percent 0.1 --group-percent 0.1 0.2", "--group-percent: takes the place of --percent"),
        ("group", "--no-test", "--percent: is needed, or --group-percent"),
        ("slim", "--percent 0.2 --dry-run --merge mean", "unknown flag --merge"),
        ("slim", "--target-macs 0.5 --percent 0.5", "not allowed with argument --"),
        ("slim", "--target-macs 1", "--target-macs: 1 is outside 0 < value < 1"),
        ("slim", "--max-drop 101", "--max-drop: 101 is outside 0 < value <= 100"),
        ("slim", "--max-drop 5 --no-test", "--max-drop: needs --data"),
        ("group", "--target-macs 0.5 --group-percent 0.5 0.5", "takes the place of --target-macs"),
        ("layer_channel", "--target-macs 0.5 --shortcut 0 1 --dry-run", "give one --shortcut"),
        ("slim", "--no-test", "--percent: is needed, or a target, such as --target-macs 0.5"),
        ("layer", "--no-test", "--shortcut: is needed, or a target"),
        ("slim", "--percent 0.2 --no-test --importance taylor", "--importance taylor: needs --data"),
        ("slim", "--percent 0.2 --no-test --reconstruct 2", "--reconstruct: needs --data"),
        ("slim", "--percent 0.2 --no-test --reconstruct 2 --no-absorb", "--reconstruct: fits what --no-absorb leaves"),
        ("slim", "--percent 0.2 --no-test --rounds 2 --dry-run", "--rounds: does not go with --dry-run"),
        ("layer_channel", "--shortcut 1 --no-test", "--percent: is needed"),
    ],
)
def test_bad_flags_are_one_line(prune, tmp_path, name, flags, match):
    with pytest.raises(InputError, match=match):
        prune(name, *flags.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("data", "flags", "match"),
    [
        ("train=train.txt", [], "names no valid images"),
        ("valid=val.txt", ["--importance", "taylor"], "names no train images, which --importance taylor needs"),
        ("valid=val.txt", ["--reconstruct", "1"], "names no train images, which --reconstruct needs"),
        ("valid=val.txt\nclasses=3\nnames=3.names", [], "a network of 2 classes, but .* has 3"),
    ],
)
def test_data_that_does_not_do_is_refused(prune, folder, tmp_path, data, flags, match):
    (folder / "3.names").write_text("a\nb\nc\n")
    (folder / "x.data").write_text(data if "names" in data else f"{data}\nclasses=2\nnames=d.names")
    with pytest.raises(InputError, match=match):
        prune("slim", "--percent", "0.1", "--data", str(folder / "x.data"), *flags)
    assert not (tmp_path / "runs").exists()
