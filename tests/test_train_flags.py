"""What train.py refuses before it loads torch, and which flags may stand beside --resume."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import quantize
import train
from tests.nets import TINY, refused
from utils.checkpoint import read_checkpoint
from utils.device import named_device, select_device
from utils.errors import CheckpointError, InputError
from utils.old_flags import OLD_FLAGS
from utils.report.run_dir import read_results

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
    ("--evolve --data t.data", "names no valid pictures"),
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
                with pytest.raises(InputError, match=re.escape(f"{flag}: is gone; {OLD_FLAGS[name]}")):
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

    pytestmark = pytest.mark.usefixtures("no_plots")

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

    def test_a_run_that_used_a_flag_which_is_gone_is_refused(self, run, done):
        """Where the flag was left out, the run is resumed."""
        with (done / "args.yaml").open("a") as file:
            file.write("s_coach: null\nevaluator: numpy\n")
        assert run("--resume", str(done))["epochs"] == 2
        with (done / "args.yaml").open("a") as file:
            file.write("s_coach: 0.5\n")
        with pytest.raises(CheckpointError, match=r"unknown flag 's_coach'; it is of another version"):
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

    def test_a_finished_run_says_so_and_trains_nothing(self, run, done, capsys, monkeypatch):
        before, lines = (done / "weights" / "last.pt").read_bytes(), []
        monkeypatch.setattr("utils.training.workflow.log", lambda *texts: lines.extend(texts))
        assert run("--resume", str(done))["epochs"] == 2
        assert f"{done}: is finished, after epoch 2 of 2; its best weights are evaluated again" in lines
        assert (done / "weights" / "last.pt").read_bytes() == before

    def test_a_run_that_patience_ended_is_finished(self, run, monkeypatch):
        monkeypatch.setattr("utils.training.loop.fitness", lambda *_: 0.5)
        directory = Path(run("--epochs", "9", "--patience", "1")["run_dir"])
        assert read_results(directory / "results.csv")["epoch"] == [1, 2]
        assert run("--resume", str(directory))["epochs"] == 2
        assert read_checkpoint(directory / "weights" / "last.pt")["progress"]["epoch"] == 2


def test_keys_of_heads_that_training_does_not_use_are_named_once(run, folder, tmp_path, monkeypatch, no_plots):
    """Only those that differ from Darknet's defaults, with what --hyp has in their place."""
    told: list[str] = []
    monkeypatch.setattr("utils.training.workflow.log", lambda *texts: told.extend(texts))
    run("--epochs", "1")
    assert not [line for line in told if "does not use" in line]
    more = "iou_loss=giou\niou_normalizer=0.07\ncls_normalizer=1.0\nmax_delta=5\nnms_kind=greedynms\n"
    (tmp_path / "k.cfg").write_text((folder / "n.cfg").read_text().replace("[yolo]\n", f"[yolo]\n{more}"))
    run("--epochs", "1", "--cfg", str(tmp_path / "k.cfg"))
    keys = "iou_loss=giou, iou_normalizer=0.07, max_delta=5.0, nms_kind=greedynms"
    way = "in their place --hyp has iou_loss, box_gain, clip_norm"
    assert [line for line in told if "does not use" in line] == [
        f"{tmp_path}/k.cfg: training does not use {keys}; {way}"
    ]


def test_off_values_and_spellings_of_older_suites_are_taken():
    args = train.parse_args(
        ["--prune", "-1", "--kdstr", "-1", "--AT-str", "-1", "--quantized", "-1", "--Img-Size", "64"]
    )
    assert (args.prune, args.KDstr, args.AT_str, args.img_size) == (0, None, None, [64])
    assert train.parse_args(["-sr", "--prune", "1"]).prune == 1
