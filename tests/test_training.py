"""Training: flags, schedule, averages, and runs of a few steps on a few pictures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

import quantize
import train
from models import Darknet
from tests.nets import HEAD, TINY, conv, csv_rows, one_head, printed, refused, tiny
from utils.checkpoint import load_model, model_document, read_checkpoint, write_checkpoint
from utils.cli import OLD_FLAGS
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.network import adapt_classes
from utils.device import named_device, select_device
from utils.errors import CheckpointError, InputError, NumericsError, WeightsError
from utils.flags import ModelFiles, choose_model
from utils.quantization.quantizers import quantize as quantize_network
from utils.quantization.scheme import QuantSettings
from utils.report.run_dir import read_results
from utils.training import loop, workflow
from utils.training.checkpointing import Start, initial_model
from utils.training.hyperparameters import Hyperparameters, OptimizerSettings, hyperparameters, load_hyperparameters
from utils.training.loop import rescaled
from utils.training.optimizer import AveragedModel, Schedule, accumulation, build_optimizer, set_step
from utils.training.settings import TrainSettings


@pytest.fixture(autouse=True)
def quick(request):
    """Only the test of what a run leaves draws its plots."""
    if "leaves_everything" not in request.node.name:
        request.getfixturevalue("no_plots")


def tensors(path):
    return read_checkpoint(Path(path))["model"]


def same(a, b) -> bool:
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def table(document: dict) -> list[dict[str, str]]:
    """The rows of a run's results.csv."""
    return csv_rows(f"{document['run_dir']}/results.csv")


@pytest.mark.parametrize(("accumulate", "first"), [(1, 10), (4, 10), (16, 17)])
def test_a_multi_scale_run_begins_with_its_largest_size_and_then_varies(accumulate, first):
    """Until a batch follows the first optimizer step; all follows from the seed, the epoch and the position."""
    settings = TrainSettings(size=(96, 64), sizes=(60, 130), seed=1, accumulate=accumulate)

    def heights(epoch, positions, batches=200):
        images = torch.zeros(1, 3, 96, 64)
        return [rescaled(images, settings, 32, epoch, position, batches).shape[2] for position in positions]

    assert heights(0, range(first)) == [128] * first
    assert [heights(epoch, [0], batches=1) for epoch in range(first)] == [[128]] * first, "epochs of a batch each"
    later = heights(0, range(first, 200)) + heights(1, range(200))
    assert set(later) == {64, 96, 128}
    assert heights(0, [3, 40]) == [128, heights(0, range(41))[40]]


class TestSchedule:
    """Step sizes."""

    schedule = Schedule(OptimizerSettings(warmup=0.1), epochs=10, batches=21, accumulate=2)

    def test_the_rate_rises_then_falls_to_lrf_and_momentum_rises_to_its_value(self):
        """An epoch ends with a step."""
        assert (self.schedule.steps_per_epoch, self.schedule.steps, self.schedule.warmup_steps) == (11, 110, 11)
        rates = [self.schedule.rate(step) for step in range(110)]
        assert rates.index(max(rates)) == 11
        assert rates[:12] == sorted(rates[:12]) and rates[11:] == sorted(rates[11:], reverse=True)
        assert rates[-1] == pytest.approx(0.01, abs=1e-3)
        assert self.schedule.momentum(0) < 0.82 and self.schedule.momentum(11) == pytest.approx(0.937)

    @pytest.mark.parametrize(
        ("batch", "batches", "epochs", "expected"),
        [(16, 1000, 10, 4), (16, 19, 60, 1), (16, 200, 10, 2), (128, 9, 9, 1)],
    )
    def test_batches_are_accumulated_only_where_a_thousand_steps_are_left(self, batch, batches, epochs, expected):
        assert accumulation(batch, batches, epochs) == expected


@pytest.mark.parametrize(
    ("epochs", "most", "processes", "count"),
    [(1, 99, 1, 16), (8000, 99, 1, 64), (8000, 99, 2, 32), (8000, 31, 1, 16), (1, 1, 1, 1)],
)
def test_a_gpu_takes_the_largest_batch_that_fits_and_leaves_a_thousand_steps(
    epochs, most, processes, count, monkeypatch
):
    """Of 9 pictures; 8000 epochs have 72 000, of which a step of 64 leaves 1125 steps."""
    monkeypatch.setattr(workflow, "_fits", lambda *arguments: arguments[4] <= most)
    plan = SimpleNamespace(settings=TrainSettings(batch_size="auto", epochs=epochs))
    team = SimpleNamespace(device=torch.device("cuda"), size=processes, gather=lambda value: [value])
    assert workflow.chosen_batch(plan, range(9), Start(None), None, team) == count


def test_only_weights_of_convolutions_decay():
    model = Darknet(tiny())
    optimizer = build_optimizer(model, OptimizerSettings(), adam=False)
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == name.endswith("conv.weight")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    set_step(optimizer, TestSchedule.schedule, 11)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.03 * TestSchedule.schedule.rate(11))
    for momentum in (0.0, 0.9):
        (group, _) = build_optimizer(model, OptimizerSettings(momentum=momentum), adam=False).param_groups
        assert (group["momentum"], group["nesterov"]) == (momentum, momentum > 0)


def test_the_average_moves_by_its_decay_and_copies_counters():
    """Update 1: decay min(0.5, 2 / 11); 1 of 2 becomes 1 + 9 / 11."""
    model = torch.nn.BatchNorm1d(1)
    average = AveragedModel(model, 0.5)
    model.weight.data += 1
    model.num_batches_tracked += 7
    average.update()
    assert average.model.weight.item() == pytest.approx(1 + 9 / 11)
    assert average.model.num_batches_tracked.item() == 7
    assert not average.model.weight.requires_grad


class TestHyperparameters:
    """The --hyp file."""

    def test_a_file_of_all_keys_gives_the_same_values(self, tmp_path):
        hyp = hyperparameters({"lr0": 0.02, "assignment": "darknet", "mosaic": 0})
        (tmp_path / "hyp.yaml").write_text(yaml.safe_dump(hyp.flat))
        assert load_hyperparameters(tmp_path / "hyp.yaml") == hyp
        assert (hyp.optimizer.lr0, hyp.loss.assignment, hyp.augmentation.mosaic) == (0.02, "darknet", 0.0)
        assert len(hyp.flat) == sum(len(vars(part)) for part in (hyp.optimizer, hyp.loss, hyp.augmentation))

    def test_a_number_needs_no_point_before_its_exponent(self, tmp_path):
        """As 1e-3, which is a text for PyYAML."""
        (tmp_path / "hyp.yaml").write_text("lr0: 1e-3\nbox_gain: 1E+1\n")
        assert load_hyperparameters(tmp_path / "hyp.yaml") == hyperparameters({"lr0": 0.001, "box_gain": 10})

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("lr: 0.1", "unknown key 'lr'; did you mean 'lr"),
            ("lr0: fast", "lr0 is 'fast'; a float is needed"),
            ("lr0: true", "lr0 is True"),
            ("lr0: .nan", "lr0 is nan"),
            (f"lr0: {'9' * 400}", "lr0 is 9"),
            ("momentum: 2", "momentum 2.0: allowed is 0 <= value <= 1"),
            ("mosaic: 3", "mosaic"),
            ("- 1", "a mapping"),
            ("a: [", r":\d: not valid YAML"),
            ("!!python/object/apply:os.system ['x']", "not valid YAML"),
        ],
    )
    def test_a_bad_file_is_refused_in_one_line(self, tmp_path, text, match):
        (tmp_path / "hyp.yaml").write_text(text)
        with refused(InputError, f"^{re.escape(str(tmp_path / 'hyp.yaml'))}.*{match}"):
            load_hyperparameters(tmp_path / "hyp.yaml")


class TestRun:
    """Runs of train.py."""

    def test_a_run_leaves_everything_that_was_promised(self, run, folder):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        document = run("--epochs", "2")
        directory = document["run_dir"]
        wanted = "args.yaml hyp.yaml env.json model.cfg data.yaml results.csv results.png labels.jpg train_batch0.jpg "
        wanted += "val_batch0_labels.jpg val_batch0_pred.jpg PR_curve.png confusion_matrix.png"
        assert set(wanted.split()) <= {path.name for path in Path(directory).iterdir()}
        assert document["epochs"] == 2
        assert {"best_epoch", "map50", "map50_95", "best", "last", "schema"} <= document.keys()
        rows = table(document)
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert document["median_epochs"] == 2
        for key in ("map50", "map50_95"):
            assert document[f"median_{key}"] == pytest.approx(sum(float(row[key]) for row in rows) / 2)
        network = cfg_file.load(f"{directory}/model.cfg")
        assert network.blocks == tiny().blocks
        assert (network.net.width, network.net.height) == (64, 64)
        arrays = weights_file.read(f"{directory}/weights/best.weights", network)
        best = tensors(document["best"])
        assert all(np.array_equal(array, best[key].numpy()) for key, array in arrays.items())
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_it_learns(self, run, tmp_path):
        (tmp_path / "hyp.yaml").write_text("lr0: 0.03\nmosaic: 0\nscale: 0\ntranslate: 0\n")
        document = run("--epochs", "25", "--no-flip", "--notest", "--hyp", str(tmp_path / "hyp.yaml"))
        first, *_, last = [float(row["box_loss"]) + float(row["class_loss"]) for row in table(document)]
        assert last < 0.8 * first

    def test_a_network_that_saw_no_mirrored_pictures_is_not_fine_tuned_with_them(self, run, folder, tmp_path, capsys):
        """From a training, through a pruning and a .pt of export.py; unless --flip or -pt is given."""
        files = ("--data", str(folder / "d.data"), "--project", str(tmp_path / "runs"), "--json")

        def flips(weights: str, *flags: str) -> tuple[dict, float, bool, str]:
            train.main([*files, "--weights", weights, "--epochs", "1", "--batch-size", "4", "--workers", "0", *flags])
            output = capsys.readouterr()
            document = json.loads(output.out)
            folder = Path(document["run_dir"])
            hyp, args = (yaml.safe_load((folder / name).read_text()) for name in ("hyp.yaml", "args.yaml"))
            return document, hyp["flip_lr"], args["flip"], output.err

        def made(script: str, weights: str, *flags: str) -> str:
            main = importlib.import_module(script).main
            main([*files[: 4 if script == "export" else 5], "--weights", weights, "--name", script, *flags])
            capsys.readouterr()
            return str(tmp_path / "runs" / script / "model.pt")

        base = run("--epochs", "1", "--no-flip")["best"]
        pruned = made("slim_prune", base, "--percent", "0.2", "--no-test")
        copy = made("export", pruned, "--format", "pt")
        for weights in (base, pruned, copy):
            document, flip, mirrored, told = flips(weights)
            assert (flip, mirrored) == (0, False)
            assert f"--no-flip: taken over from the training of {weights}; --flip mirrors images" in told
        document, flip, mirrored, told = flips(document["best"], "--flip")
        assert (flip, mirrored) == (Hyperparameters().augmentation.flip_lr, True) and "taken over" not in told
        assert flips(document["best"])[1] > 0
        assert flips(base, "-pt")[1] > 0

    def test_ignored_boxes_take_their_negatives_from_a_run_and_nothing_else(self, run, folder, tmp_path):
        """One step over pictures that are ignored as a whole, or not: the other two terms of the loss are equal."""
        (tmp_path / "hyp.yaml").write_text("mosaic: 0\nscale: 0\ntranslate: 0\n")
        shutil.copytree(folder, tmp_path / "set")
        (tmp_path / "set/ignored").mkdir()
        for number in range(9):
            (tmp_path / f"set/ignored/{number}.txt").write_text("0 0.5 0.5 1 1\n")
        rows = []
        for data in (folder / "d.data", tmp_path / "set/d.data"):
            flags = ["--epochs", "1", "--batch-size", "9", "--notest", "--hyp", str(tmp_path / "hyp.yaml")]
            rows += table(run(*flags, "--data", str(data)))
        plain, spared = rows
        assert float(spared["objectness_loss"]) < 0.7 * float(plain["objectness_loss"])
        assert [plain[key] for key in ("box_loss", "class_loss")] == [spared[key] for key in ("box_loss", "class_loss")]

    def test_same_seed_same_weights_and_another_seed_others(self, run):
        """On a CPU a batch size that is chosen is the default."""
        flags = (("--seed", "3"), ("--seed", "3", "--batch-size", "auto"), ("--seed", "4"))
        first, second, other = (run("--epochs", "1", "--batch-size", "16", *each)["last"] for each in flags)
        assert same(first, second) and read_checkpoint(Path(second))["plan"]["batch"] == 16
        assert not same(first, other)

    def test_a_step_draws_from_seed_epoch_and_position(self, run, monkeypatch):
        """The seed of a step is (10⁶ + 3)² · seed + (10⁶ + 3) · epoch + position, as runs of before have it."""
        drawn = []
        monkeypatch.setattr("utils.training.loop.torch.manual_seed", drawn.append)
        run("--epochs", "2", "--seed", "9")
        factor = 1_000_003
        assert drawn == [9, *((9 * factor + epoch) * factor + place for epoch in (0, 1) for place in (0, 1))]

    def test_a_fine_tuning_that_ends_below_its_weights_says_so(self, run, monkeypatch):
        """New weights are not measured before the first step; a resumed run remembers what those of a file had."""
        first = run("--epochs", "1")
        scores = iter((0.5, 0.25, 0.25))
        measured = [*loop.SCORES, "map50", "objects"]
        monkeypatch.setattr(
            loop,
            "evaluate",
            lambda *_, **__: SimpleNamespace(metrics=SimpleNamespace(**dict.fromkeys(measured, next(scores)))),
        )
        second = run("--epochs", "1", "--weights", first["best"])
        assert (first["start_map50"], second["start_map50"]) == (None, 0.5)
        assert run("--resume", second["run_dir"])["start_map50"] == 0.5
        text = train._summary(second | {"map50": 0.25, "median_epochs": 8, "median_map50": 0.2, "median_map50_95": 0.1})
        assert text.startswith("best of 1 epochs is 1: AP50 0.2500, AP50-95 ")
        assert "median of the last 8: AP50 0.2000, AP50-95 0.1000" in text
        assert "warning: the weights that it started from have AP50 0.5000" in text
        assert "warning" not in train._summary(second | {"map50": 0.5}) + train._summary(first | {"map50": 0.0})
        assert next(scores) == 0.25, "two evaluations: before the first step and after the epoch"

    def test_a_checkpoint_that_no_training_can_go_on_from_is_status_3(self, run):
        directory = Path(run("--epochs", "1")["run_dir"])
        shutil.copy(directory / "weights" / "best.pt", directory / "weights" / "last.pt")
        (directory / "weights" / "prev.pt").unlink()
        with pytest.raises(CheckpointError, match="has no 'optimizer'"):
            run("--resume", str(directory))
        (directory / "weights" / "last.pt").write_bytes(b"PK\x03\x04" + bytes(99))
        with pytest.raises(CheckpointError, match="damaged"):
            run("--resume", str(directory))

    def test_anchors_of_the_weights_win_over_those_of_the_cfg(self, run, folder):
        document = run("--epochs", "1", "--auto-anchors")
        own = cfg_file.load(f"{document['run_dir']}/model.cfg").yolos
        loaded = load_model(choose_model(str(folder / "n.cfg"), document["best"]))
        assert loaded.model.network.yolos == own != tiny().yolos
        assert "its own anchors" in loaded.notes[0]
        for flags, expected in (((), own), (("--single-cls", "-pt"), tiny().yolos), (("--auto-anchors",), own)):
            other = run("--epochs", "1", *flags, "--weights", document["best"])
            yolos = cfg_file.load(f"{other['run_dir']}/model.cfg").yolos
            assert [yolo.anchors for yolo in yolos] == [yolo.anchors for yolo in expected]

    def test_the_network_of_a_run_has_the_classes_and_the_size_that_it_was_tested_with(self, run, tmp_path):
        (tmp_path / "five.cfg").write_text(TINY.replace("filters=21", "filters=30").replace("classes=2", "classes=5"))
        document = run("--epochs", "1", "--cfg", str(tmp_path / "five.cfg"), "--img_size", "32", "64", "96")
        assert cfg_file.load(f"{document['run_dir']}/model.cfg").classes == 2
        assert load_model(choose_model(None, document["best"])).model.network.net.width == 96

    def test_weights_of_another_class_count_need_pt(self, run, tmp_path):
        document = run("--epochs", "1", "--single-cls")
        single = document["best"]
        assert document["next"] == f"python slim_prune.py --weights {single} --target-macs 0.5 --no-test"
        for path in (single, single.replace(".pt", ".weights")):
            with pytest.raises(WeightsError, match="made for 1 classes, 2 are wanted; add -pt"):
                run("--epochs", "1", "--weights", path)
            document = run("--epochs", "1", "--weights", path, "-pt")
            lineage = read_checkpoint(Path(document["best"]))["lineage"]
            assert [entry["path"] for entry in lineage] == [path]

    @pytest.mark.parametrize("flags", [(), ("--single-cls",)])
    def test_the_data_yaml_of_a_run_names_its_data_set(self, flags, run, script, capsys, tmp_path, monkeypatch):
        """Also where all labels are one class."""
        document = run("--epochs", "1", *flags)
        monkeypatch.chdir(tmp_path)
        command = ("--data", f"{document['run_dir']}/data.yaml", "--weights", document["best"], "--device", "cpu")
        assert printed(capsys, script.main, *command, *flags)["map50"] == pytest.approx(document["map50"])

    @pytest.mark.parametrize("quant", [None, QuantSettings()])
    def test_weights_of_other_classes_start_anew_where_a_block_reads_a_head(self, quant, tmp_path, lines):
        """Its kernel has as many inputs as the head has filters; bounds of a quantized network belong to no block."""
        network = one_head(conv(3), HEAD, "[route]\nlayers=-2\n", conv(2))
        model = Darknet(network)
        if quant is not None:
            quantize_network(model, quant)
        stored = model_document(
            model.state_dict(), network, ["a"], (), quantization=None if quant is None else quant.document()
        )
        write_checkpoint(tmp_path / "one.pt", stored)
        start = initial_model(ModelFiles(adapt_classes(network, 3), tmp_path / "one.pt", True), pretrained=True)
        assert "but the heads of 1 classes (layers 1, 4, 5), which start anew" in lines[0]
        loaded = start.model.state_dict()
        same = {key for key, value in model.state_dict().items() if key in loaded and value.equal(loaded[key])}
        assert {key for key in loaded if key.startswith("layers.0.")} <= same
        assert not {"layers.1.conv.weight", "layers.4.conv.weight", "layers.5.conv.weight"} & same

    def test_a_pruned_network_of_other_classes_can_be_pruned_again(self, run, tmp_path):
        """Its heads are wider than those it was pruned with."""
        best = run("--epochs", "1", "--single-cls")["best"]
        for name in ("once", "again"):
            flags = ("--percent", "0.2", "--no-test", "--project", str(tmp_path), "--name", name)
            importlib.import_module("slim_prune").main(["--weights", best, *flags])
            files = ("--cfg", str(tmp_path / name / "model.cfg"), "--weights", str(tmp_path / name / "model.pt"))
            best = run("--epochs", "1", *files, "-pt")["best"]
            assert load_model(choose_model(None, best)).model.network.classes == 2

    def test_frozen_blocks_stay_as_they_were(self, run):
        first = run("--epochs", "1")
        second = run("--epochs", "1", "--weights", first["best"], "--freeze", "4")
        old, new = tensors(first["best"]), tensors(second["last"])
        frozen = [key for key in old if int(key.split(".")[1]) < 4]
        assert all(torch.equal(old[key], new[key]) for key in frozen)
        assert not torch.equal(old["layers.6.conv.weight"], new["layers.6.conv.weight"])

    def test_without_validation_pictures_the_last_epoch_is_the_best(self, run, folder):
        (folder / "t.data").write_text("classes=2\ntrain=train.txt\nnames=d.names\n")
        document = run("--epochs", "2", "--nosave", "--data", str(folder / "t.data"))
        assert (document["best_epoch"], document["map50"]) == (2, None)
        assert document["next"].endswith("--target-macs 0.5 --no-test") and "t.data" in document["next"]
        last = read_checkpoint(Path(document["last"]))["ema"]
        assert all(torch.equal(value, last[key]) for key, value in tensors(document["best"]).items())

    @pytest.mark.parametrize("flag", ["--single-cls", "--nosave"])
    def test_the_next_command_measures_what_no_file_can_hold(self, flag, run, script, folder, capsys):
        """With the classes and the images that there are."""
        (folder / "t.data").write_text("classes=2\ntrain=train.txt\nnames=d.names\n")
        data = ("--data", str(folder / "t.data"))
        document = run("--epochs", "1", "--quantized", "1", "--a_bit", "4", flag, *data)
        command = shlex.split(document["next"])[2:]
        assert printed(capsys, script.main, *command, "--device", "cpu")["split"] == "train"

    def test_a_loss_that_is_not_finite_stops_before_the_step(self, run, monkeypatch, tmp_path):
        real, calls = loop.detection_loss, []

        def broken(*args):
            calls.append(1)
            terms = real(*args)
            return terms._replace(total=terms.total * float("nan")) if len(calls) == 5 else terms

        monkeypatch.setattr(loop, "detection_loss", broken)
        match = r"epoch 3, batch 1, step 5: loss is not finite .*images .*\.png, .*\.png; "
        with pytest.raises(NumericsError, match=match):
            run("--epochs", "3")
        assert read_checkpoint(tmp_path / "runs" / "exp" / "weights" / "last.pt")["progress"]["epoch"] == 2


def test_resuming_without_a_run_is_a_checkpoint_error(run, tmp_path):
    with pytest.raises(CheckpointError, match="no run in"):
        run("--resume")
    with pytest.raises(CheckpointError, match=r"args\.yaml is missing; give the folder of a run, as runs/train/exp"):
        run("--resume", str(tmp_path / "weights" / "last.pt"))


NOBODY = "there is nobody to learn from"
REFUSED = [
    ("--epochs 0", "--epochs: 0 is below 1"),
    ("--epoch 3", "unknown flag --epoch; did you mean --epochs"),
    ("--img_size 60", "--img_size 60: not a multiple of 8.*try 64"),
    ("--img_size 96 64", "MIN is above MAX"),
    ("--multi-scale --img_size 32 64", "--multi-scale: --img_size MIN MAX gives the range already"),
    ("--name a/b", r"--name 'a/b': not a plain folder name"),
    ("--name a\x1b[31m", r"--name 'a\\x1b\[31m': not a plain folder name"),
    ("--device gpu", "--device: 'gpu' is not a device; allowed are cpu, cuda, .* 1 or cuda:1"),
    ("--device 0,2", r"GPUs, .*CUDA_VISIBLE_DEVICES=0,2 torchrun --nproc-per-node 2 train\.py"),
    ("--device cuda:0,cuda:2", r"GPUs, .*CUDA_VISIBLE_DEVICES=0,2 torchrun --nproc-per-node 2 train\.py"),
    ("--sync-bn", "--sync-bn: goes with several processes; start train.py with torchrun"),
    ("--weights no.pt", r"no\.pt: no such file"),
    ("--hyp no.yaml", r"no\.yaml"),
    ("--patience 3 --nosave", "--patience: needs the best weights kept; leave out --nosave"),
    ("--patience 3 --notest", "--patience: needs a fitness of every epoch; leave out --notest"),
    ("--patience 3 --data t.data", "^--patience: needs AP50 of valid images, and .*t.data names none"),
    ("--evolve --data t.data", "^--evolve: needs AP50"),
    ("-sr --s auto --data t.data", "^--s auto: needs AP50"),
    # Sparse training
    ("--prune 1", "--prune: says how to train sparse; add -sr"),
    ("--s auto", "--s: says how"),
    ("-sr --prune -1", "--prune -1: with -sr, say which channels"),
    ("-sr --patience 3", "--patience: a sparse training goes to its end"),
    ("-sr --s auto --notest", "--s auto: is guided by AP50 after every epoch; leave out --notest"),
    ("-sr --s-share 0.3", "--s-share: goes with --s auto"),
    ("-sr --s-drop 2", "--s-drop: goes with --s auto"),
    ("-sr --s auto --s-drop 0", "--s-drop: 0 is outside 0 < value <= 100"),
    ("-sr --s auto --s-schedule global", "--s-schedule: --s auto chooses the channels itself"),
    *((f"-sr --s {s}", "--s") for s in ("0", "-1", "nan", "11", "fast")),
    # Distillation
    ("--KDstr 3", f"--KDstr: {NOBODY}; add --t_weights"),
    ("--AT_str 2", f"--AT_str: {NOBODY}"),
    ("--kd-weight 2", "--kd-weight: there is nobody"),
    ("--KDstr 6", "--KDstr: invalid choice: '6' .choose from 1, 2"),
    ("--AT_str 0", "--AT_str: invalid choice: '0'"),
    ("--kd-weight 0", "--kd-weight: 0 is outside 0 < value"),
    ("--kd-weight nan", "--kd-weight: 'nan' is not a number"),
    ("--t_cfg x.cfg", r"--t_cfg x\.cfg: a teacher needs what it has learnt; add --t_weights"),
    ("--t_weights missing.pt", r"missing\.pt"),
    ("--t_weights w.weights", r"--t_weights w\.weights: a Darknet .* does not say its network; add --t_cfg"),
    # Quantization
    ("--w_bit 4", "--w_bit: says how to quantize; add --quantized"),
    ("--quantized 1 --FPGA --target arm", "--target arm: contradicts --FPGA"),
    ("--quantized 2 --dorefa-grid", "--dorefa-grid: is no flag here; --quantized 2 rounds to levels"),
    ("--quantized 1 --b_bit 8", "--b_bit: goes with --FPGA"),
    ("--bit-warmup 0.5", "--bit-warmup: says how to quantize"),
    ("--quantized 1 --bit-warmup 1", "--bit-warmup.* 0 <= value < 1"),
    ("--quantized 4", "--quantized.*4"),
    ("--quantized 1 --a_bit 1", "--a_bit.*2 to 16 bits"),
    ("--quantized 1 --FPGA", "block 1 .*mish needs more than shifts"),
]
SEVERAL = [
    ("--evolve", "without torchrun"),
    ("--sync-bn --quantized 1 --BN_Fold", "--sync-bn: with --BN_Fold and --FPGA each process folds"),
    ("--sync-bn --quantized 1 --FPGA --cfg leaky.cfg", "--sync-bn: with --BN_Fold and --FPGA each process folds"),
]
"""Refused to several processes."""


@pytest.mark.parametrize(
    ("processes", "flags", "match"), [*((1, *case) for case in REFUSED), *((2, *case) for case in SEVERAL)]
)
def test_flags_that_cannot_be_used_are_refused_before_torch_is_loaded(
    run, folder, monkeypatch, tmp_path, processes, flags, match
):
    monkeypatch.setitem(sys.modules, "utils.training.workflow", None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.chdir(folder)
    Path("t.data").write_text("classes=2\ntrain=train.txt\nnames=d.names\n")
    Path("leaky.cfg").write_text(TINY.replace("mish", "leaky"))
    Path("w.weights").write_bytes(bytes(100))
    with refused(InputError, match, 2):
        run("--epochs", "1", *flags.split())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("flag", "package"), [("--evolve", "optuna"), ("--tensorboard", "tensorboard")])
def test_without_its_package_a_flag_is_refused_before_torch_is_loaded(run, monkeypatch, flag, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "utils.training.workflow", None)
    with pytest.raises(InputError, match=rf"{flag}: needs .*{package}.*pip install -r requirements-"):
        run("--epochs", "1", flag)


@pytest.mark.parametrize(("flags", "match"), [("--freeze 15", "at most 14"), ("--device 7", "--device 7")])
def test_flags_that_do_not_fit_network_or_machine_leave_no_run(run, tmp_path, flags, match):
    with pytest.raises(InputError, match=match):
        run("--epochs", "1", *flags.split())
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_flags_of_older_suites_and_versions_are_answered_in_any_spelling():
    """No answer is for a flag that every script has, but for those of quantize.py that detect.py lacks."""
    scripts = {
        script: {flag.lstrip("-").replace("-", "_").lower() for flag in script.make_parser()._option_string_actions}
        for script in (train, quantize)
    }
    assert set.intersection(*scripts.values()) & OLD_FLAGS.keys() <= {"fpga", "a_bit", "w_bit"}
    for script, known in scripts.items():
        for name in OLD_FLAGS.keys() - known:
            for flag in (f"--{name}", f"--{name.replace('_', '-').title()}"):
                with pytest.raises(InputError, match=re.escape(f"{flag}: is no flag here; {OLD_FLAGS[name]}")):
                    script.main([f"{flag}=2", "--weights", "no.pt", "--data", "no.data"])


def test_a_gpu_is_named_by_its_number_or_as_pytorch_does_and_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    chosen = [select_device(text) for text in ("", "cuda", "0", "cuda:0", "1", "cuda:1")]
    assert [str(device) for device in chosen] == ["cuda:0"] * 4 + ["cuda:1"] * 2
    assert current == chosen
    assert not torch.backends.cudnn.allow_tf32  # TensorFloat-32 has 11 bits
    assert str(select_device("cpu")) == "cpu" and str(named_device("1")) == "cuda:1" and len(current) == 6
    with pytest.raises(InputError, match="--device cuda:2: this machine has 2 GPUs"):
        select_device("cuda:2")


class TestResume:
    """Flags beside --resume."""

    @pytest.fixture
    def done(self, run):
        """A run of two epochs."""
        return Path(run("--epochs", "2", "--seed", "3")["run_dir"])

    def test_a_flag_that_differs_from_the_runs_is_refused(self, run, done):
        for flags, match in {
            "--epochs 4": r"exp: --epochs is 4 here and 2 in the run; leave it out",
            "--img_size 32": r"--img_size is \[32\] here and None in the run",
            "--batch_size 2": "--batch-size is 2 here and 4 in the run",
            "--adam": "--adam is True here and False in the run",
            "--cfg other.cfg": r"--cfg is 'other\.cfg' here",
            "--name exp2": "--name is 'exp2' here and 'exp' in the run",
        }.items():
            with pytest.raises(InputError, match=match):
                run("--resume", str(done), *flags.split())

    def test_a_run_that_used_a_flag_or_value_which_is_gone_is_refused(self, run, done):
        """Where the flag was left out, the run is resumed."""
        with (done / "args.yaml").open("a") as file:
            file.write("s_coach: null\nevaluator: numpy\n")
        assert run("--resume", str(done))["epochs"] == 2
        with (done / "args.yaml").open("a") as file:
            file.write("s_coach: 0.5\n")
        with pytest.raises(CheckpointError, match=r"unknown flag 's_coach'; it is of another version"):
            run("--resume", str(done))
        args = (done / "args.yaml").read_text()
        (done / "args.yaml").write_text(args.replace("s_coach: 0.5", "KDstr: cwd"))
        with pytest.raises(CheckpointError, match=r"--KDstr: invalid choice: 'cwd'.* 1, 2, 3, 4, 5"):
            run("--resume", str(done))

    def test_flags_that_equal_the_runs_are_fine_and_some_may_change(self, run, done, folder, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        same = ["--epochs", "2", "--seed", "3", "--cfg", str(folder / "n.cfg"), "--name", "exp", "--exist-ok"]
        assert run("--resume", "runs/exp", *same, "--workers", "1")["epochs"] == 2
        assert yaml.safe_load((done / "args.yaml").read_text())["workers"] == 0
        plans = []
        monkeypatch.setattr("utils.training.workflow.run_training", lambda plan: plans.append(plan) or {"map50": None})
        monkeypatch.setattr(train, "_summary", str)
        for flags in (["--workers", "1", "--device", "cpu"], []):
            train.main(["--resume", str(done), *flags])
        settings = [plan.settings for plan in plans]
        assert [(one.workers, one.device, one.epochs) for one in settings] == [(1, "cpu", 2), (0, "cpu", 2)]

    def test_a_finished_run_says_so_and_trains_nothing(self, run, done, lines):
        before = (done / "weights" / "last.pt").read_bytes()
        assert run("--resume", str(done))["epochs"] == 2
        assert f"{done}: is finished, after epoch 2 of 2; its best weights are evaluated again" in lines
        assert (done / "weights" / "last.pt").read_bytes() == before

    def test_a_run_that_patience_ended_is_finished(self, run, monkeypatch):
        monkeypatch.setattr("utils.training.loop.fitness", lambda *_: 0.5)
        directory = Path(run("--epochs", "9", "--patience", "1")["run_dir"])
        assert read_results(directory / "results.csv")["epoch"] == [1, 2]
        assert run("--resume", str(directory))["epochs"] == 2
        assert read_checkpoint(directory / "weights" / "last.pt")["progress"]["epoch"] == 2

    def test_a_new_run_in_its_folder_is_never_gone_on_with_from_its_state_or_table(self, run, done, monkeypatch):
        """With --exist-ok; stopped before it has a state, it cannot be resumed. Its table may have other columns."""
        anew = ("--epochs", "3", "--exist-ok", "--t_weights", str(done / "weights" / "best.pt"))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("utils.training.workflow._draw_start", Mock(side_effect=KeyboardInterrupt))
            run(*anew)
        with pytest.raises(CheckpointError, match=r"weights/last\.pt is missing"):
            run("--resume", str(done))
        assert run(*anew)["epochs"] == 3
        assert read_results(done / "results.csv")["epoch"] == [1, 2, 3]


def test_keys_of_heads_that_training_does_not_use_are_named_once(run, folder, tmp_path, lines, no_plots):
    """Only those that differ from Darknet's defaults, with what --hyp has in their place."""
    run("--epochs", "1")
    assert not [line for line in lines if "does not use" in line]
    more = "iou_loss=giou\niou_normalizer=0.07\ncls_normalizer=1.0\nmax_delta=5\nnms_kind=greedynms\n"
    (tmp_path / "k.cfg").write_text((folder / "n.cfg").read_text().replace("[yolo]\n", f"[yolo]\n{more}"))
    run("--epochs", "1", "--cfg", str(tmp_path / "k.cfg"))
    keys = "iou_loss=giou, iou_normalizer=0.07, max_delta=5.0, nms_kind=greedynms"
    way = "in their place --hyp has iou_loss, box_gain, clip_norm"
    assert [line for line in lines if "does not use" in line] == [
        f"{tmp_path}/k.cfg: training does not use {keys}; {way}"
    ]


def test_off_values_and_spellings_of_older_suites_are_taken():
    args = train.parse_args(
        ["--prune", "-1", "--kdstr", "-1", "--AT-str", "-1", "--quantized", "-1", "--Img-Size", "64"]
    )
    assert (args.prune, args.KDstr, args.AT_str, args.img_size) == (0, None, None, [64])
    assert train.parse_args(["-sr", "--prune", "1"]).prune == 1
