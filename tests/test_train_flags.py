"""What train.py refuses before it loads torch, and which flags may stand beside --resume."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
import yaml

import quantize
import train
from utils.checkpoint import read_checkpoint
from utils.cli import Parser
from utils.device import named_device, select_device
from utils.errors import CheckpointError, InputError, WeightsError
from utils.model_files import choose_model
from utils.old_flags import OLD_FLAGS
from utils.report.run_dir import read_results


@pytest.fixture
def no_training(monkeypatch):
    """What imports torch cannot be imported."""
    monkeypatch.setitem(sys.modules, "utils.training.workflow", None)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--name", "a/b"], r"--name 'a/b': not a plain folder name"),
        (["--name", "a\x1b[31m"], r"--name 'a\\x1b\[31m': not a plain folder name"),
        (["--device", "gpu"], "--device: 'gpu' is not a device; allowed are cpu, cuda, .* 1 or cuda:1"),
        *(
            (["--device", text], r"GPUs, .*CUDA_VISIBLE_DEVICES=0,2 torchrun --nproc-per-node 2 train\.py")
            for text in ("0,2", "cuda:0,cuda:2")
        ),
        (["--sync-bn"], "--sync-bn: goes with several processes; start train.py with torchrun"),
        (["--multi-scale", "--img_size", "32", "64"], "--multi-scale: --img_size MIN MAX gives the range already"),
    ],
)
def test_flags_that_cannot_be_used_are_refused_before_torch_is_loaded(run, tmp_path, flags, match):
    with pytest.raises(InputError, match=match):
        run("--epochs", "1", *flags)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("folds", ["--BN_Fold", "--FPGA"])
def test_folding_has_no_statistics_of_all_processes(run, root, monkeypatch, folds):
    monkeypatch.setenv("WORLD_SIZE", "2")
    leaky = {"--FPGA": ["--cfg", str(root / "cfg/yolov4-tiny.cfg")]}.get(folds, [])
    with pytest.raises(InputError, match="--sync-bn: with --BN_Fold and --FPGA each process folds"):
        run("--sync-bn", "--quantized", "1", folds, *leaky)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"w\.pt: is empty"),
        (b"PNG", r"w\.pt: ends inside the header: 3 bytes.*no archive of torch\.save either"),
        (b"<html><body>404</body></html>", r"w\.pt: is a web page, not the file; download it again"),
        (b"no weights at all " * 9, r"w\.pt: .*not a Darknet \.weights file.*no archive of torch\.save either"),
    ],
    ids=["empty", "short", "html", "text"],
)
def test_a_file_that_holds_no_weights_is_told_so_with_and_without_a_cfg(folder, tmp_path, data, match):
    path = tmp_path / "w.pt"
    path.write_bytes(data)
    for cfg in (None, str(folder / "n.cfg")):
        with pytest.raises(WeightsError, match=match):
            choose_model(cfg, str(path))
    with pytest.raises(WeightsError, match=match):
        train.main(["--data", str(folder / "d.data"), "--weights", str(path)])


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


def test_given_flags_are_those_of_the_command_line_with_their_values():
    parser = Parser("text")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--adam", action="store_true")
    assert parser.given([]) == {}
    assert parser.given(["--epochs", "3", "--adam"]) == {"epochs": 3, "adam": True}
    assert vars(parser.parse_args([])) == {"epochs": 3, "adam": False, "debug": False}


class TestResume:
    """Flags beside --resume."""

    pytestmark = pytest.mark.usefixtures("no_plots")

    @pytest.fixture
    def done(self, run):
        """A run of two epochs."""
        return Path(run("--epochs", "2", "--seed", "3")["run_dir"])

    @pytest.mark.parametrize(
        ("flags", "match"),
        [
            (["--epochs", "4"], r"exp: --epochs is 4 here and 2 in the run; leave it out"),
            (["--img_size", "32"], r"--img_size is \[32\] here and None in the run"),
            (["--batch_size", "2"], "--batch-size is 2 here and 4 in the run"),
            (["--adam"], "--adam is True here and False in the run"),
            (["--cfg", "other.cfg"], r"--cfg is 'other\.cfg' here"),
            (["--name", "exp2"], "--name is 'exp2' here and 'exp' in the run"),
        ],
    )
    def test_a_flag_that_differs_from_the_runs_is_refused(self, run, done, flags, match):
        with pytest.raises(InputError, match=match):
            run("--resume", str(done), *flags)

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
        document = run("--resume", "runs/exp", *same, "--workers", "1")
        assert document["epochs"] == 2
        assert yaml.safe_load((done / "args.yaml").read_text())["workers"] == 0

    def test_what_may_change_reaches_the_training(self, done, monkeypatch):
        plans = []
        monkeypatch.setattr("utils.training.workflow.run_training", lambda plan: plans.append(plan) or {"map50": None})
        monkeypatch.setattr(train, "_summary", str)
        train.main(["--resume", str(done), "--workers", "1", "--device", "cpu"])
        train.main(["--resume", str(done)])
        found = [(plan.settings.workers, plan.settings.device, plan.settings.epochs) for plan in plans]
        assert found == [(1, "cpu", 2), (0, "cpu", 2)]

    def test_a_finished_run_says_so_and_trains_nothing(self, run, done, capsys, monkeypatch):
        before = (done / "weights" / "last.pt").read_bytes()
        lines = []
        monkeypatch.setattr("utils.training.workflow.log", lambda *texts: lines.extend(texts))
        assert run("--resume", str(done))["epochs"] == 2
        assert [line for line in lines if "finished" in line] == [
            f"{done}: is finished, after epoch 2 of 2; its best weights are evaluated again"
        ]
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


def test_the_summary_has_the_best_epoch_and_the_median_of_the_last_ones():
    """The best one is chosen among as many as there are."""
    document = {"epochs": 40, "best_epoch": 31, "map50": 0.942, "map50_95": 0.6, "best": "best.pt"}
    document |= {"next": "python quantize.py", "start_map50": None}
    found = train._summary(document | {"median_epochs": 8, "median_map50": 0.87, "median_map50_95": 0.55})
    assert found.splitlines() == [
        "best of 40 epochs is 31: AP50 0.9420, AP50-95 0.6000",
        "median of the last 8: AP50 0.8700, AP50-95 0.5500",
        "best.pt",
        "next: python quantize.py",
    ]


@pytest.mark.parametrize(
    ("script", "flags", "match"),
    [
        ("train", ["--transfer"], "--transfer: is gone; --freeze"),
        ("train", ["--mixedprecision"], "--mixedprecision: is gone; it is --amp"),
        ("train", ["-mpt"], "-mpt: is gone; it is --amp"),
        ("train", ["--local_rank", "0"], "--local_rank: is gone; torchrun"),
        ("train", ["--img-weights"], "--img-weights: is gone; name pictures"),
        ("train", ["--accumulate=2"], "--accumulate: is gone; batches are accumulated"),
        ("detect", ["--nms-thres", "0.5"], "--nms-thres: is gone; it is --iou-thres"),
        ("detect", ["--a-bit", "8"], "--a-bit: is gone; the file of --weights"),
        ("layer_prune", ["--percent", "0.5"], "--percent: is gone; .*--shortcuts"),
        ("slim_prune", ["--gray-scale"], "--gray-scale: is gone; .*channels=1"),
        ("train", ["-sr", "--prune", "-1"], "--prune -1: with -sr, say which channels"),
        ("train", ["--KDstr", "9"], "--KDstr: invalid choice: '9' .choose from 1, 2"),
    ],
)
def test_flags_of_older_suites_are_answered(script, flags, match):
    with pytest.raises(InputError, match=match):
        importlib.import_module(script).main([*flags, "--weights", "no.pt"])


def test_off_values_and_spellings_of_older_suites_are_taken():
    args = train.parse_args(
        ["--prune", "-1", "--kdstr", "-1", "--AT-str", "-1", "--quantized", "-1", "--Img-Size", "64"]
    )
    assert (args.prune, args.KDstr, args.AT_str, args.img_size) == (0, None, None, [64])
    assert train.parse_args(["-sr", "--prune", "1"]).prune == 1


def test_no_answer_is_for_a_flag_that_every_script_has():
    known = [set(make()._option_string_actions) for make in (train.make_parser, quantize.make_parser)]
    both = {flag.lstrip("-").replace("-", "_").lower() for flag in set.intersection(*known)}
    assert not both & (OLD_FLAGS.keys() - {"fpga", "a_bit", "w_bit"})
