"""Trainings with a teacher, through train.py."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

from models import Darknet, fuse
from tests.nets import TINY, csv_rows, refused, tiny
from tests.test_resume import assert_same, at_call, state
from tests.test_team import FLAGS, torchrun
from utils.checkpoint import load_model, model_document, read_checkpoint, write_checkpoint
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network, parse
from utils.darknet.network import adapt_classes
from utils.distillation.strategies import AT, DEFAULT, KD
from utils.errors import InputError, Interrupted
from utils.files import sha256
from utils.flags import ModelFiles
from utils.training import workflow

pytestmark = pytest.mark.usefixtures("no_plots")
QUICK = ("--epochs", "1", "--seed", "3")
WIDE = parse(TINY.replace("filters=12", "filters=20"), "wide.cfg")
"""The tiny network with more channels before its first head, so that an adapter is needed there."""


def checkpoint(path: Path, network: Network, seed: int = 5, kept: dict | None = None) -> str:
    """A file of the network with new weights."""
    torch.manual_seed(seed)
    model = Darknet(network)
    for name, value in model.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            value.normal_(std=0.2)
    names = [f"class {i}" for i in range(network.classes)]
    write_checkpoint(path, model_document(model.state_dict(), network, names, [], kept=kept))
    return str(path)


@pytest.fixture
def teacher(tmp_path) -> str:
    """A teacher of the tiny network."""
    return checkpoint(tmp_path / "teacher.pt", tiny())


@pytest.fixture
def wide(tmp_path) -> str:
    """A teacher that is reached through an adapter."""
    return checkpoint(tmp_path / "wide.pt", WIDE)


def columns(document: dict) -> dict[str, list[float]]:
    """Those of results.csv that tell of the distillation."""
    rows = csv_rows(f"{document['run_dir']}/results.csv")
    return {key: [float(row[key]) for row in rows] for key in rows[0] if key.startswith("kd_")}


@pytest.mark.parametrize(
    ("flags", "terms"),
    [
        (("--KDstr", "2"), KD["2"].terms),
        (("--KDstr", "5", "--AT_str", "2", "--kd-weight", "0.5"), KD["5"].terms | AT["2"].terms),
    ],
    ids=["2", "5 and attention"],
)
def test_every_term_has_a_column_and_the_teacher_an_entry_in_the_lineage(run, teacher, flags, terms):
    document = run(*QUICK, "--t_weights", teacher, *flags)
    losses = columns(document)
    assert list(losses) == [f"kd_{term}_loss" for term in terms]
    assert all(math.isfinite(value) and value >= 0 for values in losses.values() for value in values)
    assert sum(values[0] for values in losses.values()) > 0
    for path in (document["last"], document["best"]):
        assert read_checkpoint(Path(path))["lineage"] == [
            {"path": teacher, "sha256": sha256(Path(teacher)), "teacher": " ".join(flags)}
        ]


def test_the_loss_is_that_of_the_labels_and_what_is_learnt(run, teacher):
    """The weight of all that is learnt counts: next to nothing changes nothing."""
    plain = run(*QUICK, "--name", "plain")
    little = run(*QUICK, "--name", "little", "--t_weights", teacher, "--kd-weight", "1e-30")
    ours, theirs = (read_checkpoint(Path(document["last"]))["model"] for document in (plain, little))
    assert max((ours[key] - theirs[key]).abs().max() for key in ours) < 1e-5
    much = run(*QUICK, "--name", "much", "--t_weights", teacher, "--kd-weight", "2")
    much = read_checkpoint(Path(much["last"]))["model"]
    assert max((ours[key] - much[key]).abs().max() for key in ours) > 1e-3


def test_a_student_that_is_its_teacher_has_nothing_to_learn_before_its_first_step(run, tmp_path):
    """One batch; without batch normalisation, which takes the batch's statistics while it trains."""
    plain = parse(TINY.replace("batch_normalize=1\n", ""), "plain.cfg")
    path = checkpoint(tmp_path / "plain.pt", plain)
    (tmp_path / "plain.cfg").write_text(format_network(plain))
    files = ("--cfg", str(tmp_path / "plain.cfg"), "--weights", path, "--t_weights", path)
    document = run(*QUICK, *files, "--KDstr", "4", "--AT_str", "2", "--batch-size", "9")
    assert max(abs(values[0]) for values in columns(document).values()) < 1e-4


def test_the_teacher_stays_as_it_was_and_gets_no_gradient(run, teacher, monkeypatch):
    calls, models, real = [], [], workflow.Teacher

    def made_teacher(*args):
        made = real(*args)
        models.append(made._model)
        made._model.register_forward_hook(lambda *_: calls.append(1))
        return made

    monkeypatch.setattr(workflow, "Teacher", made_teacher)
    before = sha256(Path(teacher))
    document = run("--epochs", "2", "--t_weights", teacher, "--KDstr", "4", "--AT_str", "2", "--weights", teacher)
    (model,) = models
    wanted = fuse(load_model(ModelFiles(None, Path(teacher), True)).model).state_dict()
    assert_same(model.state_dict(), wanted)
    assert not model.training and len(calls) == 2 * 2
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert sha256(Path(teacher)) == before
    student = read_checkpoint(Path(document["last"]))["model"]
    assert not all(torch.equal(value, wanted[key]) for key, value in student.items() if key in wanted)


@pytest.mark.usefixtures("accumulating")
def test_a_resumed_run_is_bit_identical(run, wide, tmp_path, monkeypatch):
    flags = ("--epochs", "4", "--seed", "7", "--img_size", "32", "64", "64", "--batch-size", "2")
    flags += ("--KDstr", "5", "--AT_str", "3", "-sr", "--prune", "1", "--s", "1e-3", "--t_weights", wide)
    straight = Path(run(*flags, "--name", "straight")["last"])
    at_call(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="after epoch 1, batch 3"):
        run(*flags, "--name", "cut")
    cut = tmp_path / "runs" / "cut" / "weights" / "last.pt"
    run("--resume", str(cut.parent.parent))
    assert_same(state(cut), state(straight))
    (mine, theirs) = (read_checkpoint(path) for path in (cut, straight))
    assert mine["lineage"] == theirs["lineage"] and len(mine["lineage"]) == 1
    tables = [(path.parent.parent / "results.csv").read_text().splitlines() for path in (cut, straight)]
    assert [line.split(",")[:7] for line in tables[0]] == [line.split(",")[:7] for line in tables[1]]


class TestResume:
    """What a run remembers of its teacher."""

    def test_the_teacher_is_found_from_anywhere_and_must_be_the_same(self, run, teacher, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        document = run("--epochs", "2", "--t_weights", "teacher.pt", "--KDstr", "3")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert run("--resume", document["run_dir"])["epochs"] == 2
        lineage = read_checkpoint(Path(document["last"]))["lineage"]
        assert [Path(entry["path"]).name for entry in lineage] == ["teacher.pt"]
        last = Path(document["last"]).read_bytes()
        checkpoint(Path(teacher), tiny(), seed=6)
        with refused(InputError, r"--resume .*exp: its teacher was changed", 2):
            run("--resume", document["run_dir"])
        assert Path(document["last"]).read_bytes() == last
        Path(teacher).unlink()
        with refused(Exception, r"teacher\.pt", 2):
            run("--resume", document["run_dir"])

    def test_the_network_of_the_teacher_must_be_the_same_too(self, run, files):
        document = run("--epochs", "1", "--t_cfg", files[1], "--t_weights", files[3], "--KDstr", "3")
        assert read_checkpoint(Path(document["best"]))["lineage"][0]["path"] == files[3]
        Path(files[1]).write_text(TINY.replace("activation=leaky", "activation=mish", 1))
        with pytest.raises(InputError, match="its teacher was changed"):
            run("--resume", document["run_dir"])


class TestTeachers:
    """Which ones fit."""

    def test_without_a_strategy_the_one_that_measured_best_is_named_with_the_others(self, run, teacher, lines):
        document = run(*QUICK, "--t_weights", teacher)
        (line,) = [line for line in lines if "--KDstr left out" in line]
        assert "\n" not in line and f"taking {DEFAULT}" in line and "--AT_str" in line
        assert all(f" {key}" in line for key in (*KD, *AT))
        assert list(columns(document)) == [f"kd_{term}_loss" for term in KD[DEFAULT].terms]
        lines.clear()
        run(*QUICK, "--t_weights", teacher, "--AT_str", "1", "--name", "at")
        assert not any("left out" in line for line in lines)

    def test_one_of_other_classes_teaches_boxes_and_features_only(self, run, tmp_path, lines):
        other = checkpoint(tmp_path / "other.pt", adapt_classes(tiny(), 5))
        with refused(InputError, r"--KDstr 1: compares scores, but .*other\.pt.* has 5 classes and the student 2", 2):
            run(*QUICK, "--t_weights", other, "--KDstr", "1")
        assert list(columns(run(*QUICK, "--t_weights", other))) == ["kd_box_loss", "kd_attention_loss"]
        assert sum("5 classes and the student 2: objectness, classes left out" in line for line in lines) == 1
        assert list(columns(run(*QUICK, "--t_weights", other, "--AT_str", "1"))) == ["kd_attention_loss"]

    def test_an_input_that_its_stride_does_not_divide_is_refused(self, run, root, tmp_path):
        """The demo network has a head at stride 16, the tiny one's largest stride is 8."""
        coarse = checkpoint(tmp_path / "coarse.pt", adapt_classes(cfg_file.load(str(root / "cfg" / "demo.cfg")), 2))
        for flags, reason in (
            (("--img_size", "72"), "a side is 72"),
            (("--img_size", "64", "--multi-scale"), "sides are multiples of 8"),
            (("--img_size", "64", "96"), "sides are multiples of 8"),
        ):
            match = rf"coarse\.pt: needs an input with sides that are multiples of 16; {reason} here"
            with refused(InputError, match, 2):
                run(*QUICK, *flags, "--t_weights", coarse, "--AT_str", "1")
        document = run(*QUICK, "--img_size", "64", "--t_weights", coarse, "--KDstr", "3", "--AT_str", "1")
        assert len(columns(document)) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ("--multi-scale",),
        ("--rect",),
        ("-sr", "--prune", "1", "--s", "auto"),
        ("--adam", "--batch-size", "1", "--freeze", "3"),
    ],
    ids=lambda flags: " ".join(flags),
)
def test_all_else_goes_on_as_without_a_teacher(run, wide, flags):
    losses = columns(run("--epochs", "2", *flags, "--t_weights", wide, "--AT_str", "3", "--KDstr", "5"))
    assert len(losses) >= 6
    assert all(math.isfinite(value) for values in losses.values() for value in values)
    assert {len(values) for values in losses.values()} == {2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("teacher", ("--AT_str", "1")),
        ("wide", ("--KDstr", "5", "--AT_str", "1")),
        ("teacher", ("--KDstr", "4")),
        ("teacher", ("--KDstr", "2")),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(run, folder, tmp_path, kind, strategy):
    """To rounding; without batch normalisation. A last batch has two pictures here and three there."""
    plain = parse(TINY.replace("batch_normalize=1\n", ""), "plain.cfg")
    (tmp_path / "plain.cfg").write_text(format_network(plain))
    path = checkpoint(tmp_path / "t.pt", tiny() if kind == "teacher" else WIDE)
    files = ("--cfg", str(tmp_path / "plain.cfg"), "--data", str(folder / "d.data"), "--t_weights", path)
    flags = (*files, *FLAGS, *strategy)
    done = torchrun(*flags, "--batch-size", "2", "--project", str(tmp_path / "two"))
    two = json.loads(done.stdout)
    one = run(*flags, "--batch-size", "4")
    ours, theirs = (read_checkpoint(Path(document["last"]))["model"] for document in (one, two))
    assert all((ours[key] - theirs[key]).abs().max() < 1e-4 for key in ours)
    for name, values in columns(two).items():
        assert values == pytest.approx(columns(one)[name], rel=1e-3)
    assert done.stderr.count("learns") == 1
