"""compress.py: recipes, the order of stages, and journeys that are stopped and gone on with."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from models import Darknet
from tests.nets import one_head, refused, tiny
from utils.checkpoint import model_document, read_checkpoint, write_checkpoint, write_darknet
from utils.compress.journey import STATE, Journey, StageError
from utils.compress.recipe import Recipe, read_recipe
from utils.darknet.network import adapt_classes
from utils.errors import InfeasibleError, InputError
from utils.files import sha256
from utils.quantization.quantizers import quantize
from utils.quantization.scheme import QuantSettings

CHAIN = """
stages:
  train: {script: train, epochs: 3}
  sparse: {script: train, sr: true, prune: 1, s: auto, epochs: 2}
  prune: {script: slim_prune, percent: 0.3, dry-run: false}
  tune: {script: train, epochs: 2, teacher: train, KDstr: 3}
  whole: {script: export, from: train}
  int8: {script: quantize}
  measure: {script: test, from: whole}
"""


INTEGERS = "a: {script: train}, b: {script: quantize}"
FPGA = "a: {script: train}, b: {script: quantize, FPGA: true}"
FLOAT = "a: {script: train}, b: {script: export, format: torchscript}"
WITH_NMS = "a: {script: train}, b: {script: export, nms: true}"
STARTS = ("--weights start2.weights", "--weights start2.pt")


def recipe_of(tmp_path: Path, text: str = CHAIN, changes: Sequence[tuple[str, str, Any]] = ()) -> Recipe:
    (tmp_path / "r.yaml").write_text(text)
    return read_recipe(tmp_path / "r.yaml", compress.first_spelling, changes)


def journey_of(tmp_path: Path, text: str = CHAIN, changes: Sequence[tuple[str, str, Any]] = ()) -> Journey:
    return Journey(recipe_of(tmp_path, text, changes), tmp_path / "j", "d.data", "n.cfg", None)


def planned(recipe: Recipe, weights: str | None = None) -> list[list[str]]:
    """Commands of a journey that has no folder yet."""
    return Journey(recipe, Path("j"), "d.data", "n.cfg", weights, 96).planned()


def value(command: list[str], flag: str) -> str | None:
    return command[command.index(flag) + 1] if flag in command else None


def test_each_stage_begins_with_the_network_of_the_one_before(tmp_path):
    recipe = recipe_of(tmp_path)
    commands = planned(recipe)
    scripts = "train.py train.py slim_prune.py train.py export.py quantize.py test.py"
    assert [command[0] for command in commands] == scripts.split()
    assert [value(command, "--weights") for command in commands] == [
        None,
        "j/train/weights/best.pt",
        "j/sparse/weights/best.pt",
        "j/prune/model.pt",
        "j/train/weights/best.pt",
        "j/tune/weights/best.pt",
        "j/whole/model.onnx",
    ]
    assert [value(command, "--cfg") for command in commands] == ["n.cfg", *[None] * 6]
    assert value(commands[3], "--t_weights") == "j/train/weights/best.pt"
    assert "-sr" in commands[1] and value(commands[1], "--s") == "auto" and "--dry-run" not in commands[2]
    for command, stage in zip(commands, recipe.stages, strict=True):
        assert value(command, "--img_size") == "96"
        assert value(command, "--name") == (None if stage.script == "test" else stage.name)


def test_with_weights_the_first_training_is_left_out(tmp_path):
    """Start, teacher and source of an export are one .pt, which --cfg and --weights are read into."""
    commands = planned(recipe_of(tmp_path).started(), "w.weights")
    start = [value(commands[0], flag) for flag in ("--cfg", "--weights", "--format", "--name")]
    assert [commands[0][0], *start] == ["export.py", "n.cfg", "w.weights", "pt", "original"]
    assert commands[1][0] == "test.py" and commands[2][0] == "train.py" and "-sr" in commands[2]
    assert [value(commands[number], "--weights") for number in (1, 2, 5)] == ["j/original/model.pt"] * 3
    assert value(commands[4], "--t_weights") == "j/original/model.pt"
    assert not any("w.weights" in command or "n.cfg" in command for command in commands[1:])


@pytest.mark.parametrize(
    "flags", ["sr: true, prune: 1", "sparsity-regularization: true, prune: 1", "quantized: 1", "Quantized: 1"]
)
def test_a_recipe_that_begins_with_a_trained_network_keeps_its_first_stage(tmp_path, flags):
    recipe = recipe_of(tmp_path, f"stages: {{a: {{script: train, {flags}}}, b: {{script: test}}}}").started()
    assert [stage.name for stage in recipe.stages] == ["original", "original-accuracy", "a", "b"]
    assert [stage.source for stage in recipe.stages] == [None, "original", "original", "a"]


def test_stages_that_make_no_network_may_come_first_where_there_is_one(tmp_path):
    text = "stages: {a: {script: test}, b: {script: export}, c: {script: slim_prune}, d: {script: train, teacher: c}}"
    recipe = recipe_of(tmp_path, text).started()
    assert [stage.source for stage in recipe.stages] == [None, "original", "original", "original", "c"]


def test_the_network_of_weights_may_teach_where_no_stage_trains_it(tmp_path):
    text = "stages: {a: {script: slim_prune}, b: {script: train, teacher: original}, c: {script: test, from: original}}"
    recipe = recipe_of(tmp_path, text).started()
    assert (recipe.stages[2].teacher, recipe.stages[3].source) == ("original", "original")
    with pytest.raises(InputError, match=r"teacher: original is no stage before it .* are a"):
        recipe_of(tmp_path, "stages: {a: {script: train}, b: {script: train, teacher: original}}")


NO_RECIPES = {
    "stages: [": "not valid YAML",
    "stages: {a: {script: train},\n a: {script: test}}": r"r\.yaml:2: not valid YAML: a stands there twice",
    "- a": "a recipe is `stages:`",
    "stages: {a: {script: train}}\nmore: 1": "a recipe is `stages:`",
    "all: 3\nstages: {a: {script: train}}": "a recipe is `stages:`",
    "all: {epoch: 3}\nstages: {a: {script: train}}": "all: no script of its stages has a flag --epoch",
    "all: {teacher: a}\nstages: {a: {script: train}}": "all: teacher belongs to a stage",
    "all: {weights: a.pt}\nstages: {a: {script: train}}": "all: weights is set by compress.py",
}
NO_STAGES = {
    "all: {script: train}": "and is not report or original or original-accuracy or all",
    "../a: {script: train}": "a name has letters, digits, - and _",
    "a: {script: rm}": "stage a: needs `script:` and one of train, slim_prune",
    "a: train": "stage a: needs `script:`",
    "a: {script: train, allow: x}": "allow: x is outside 0 <= value <= 100, in points of AP50",
    "a: {script: train, allow: 101}": "allow: 101 is outside",
    "a: {script: train}, b: {script: export, allow: 1}": r"allow: export\.py measures no accuracy",
    "a: {script: train, weights: x.pt}": "weights is set by compress.py",
    "a: {script: train, Data: x.data}": "Data is set by compress.py",
    "a: {script: train, exist-ok: true}": "exist-ok is set by compress.py",
    "a: {script: train, single-cls: true}": "with single-cls no network is made that",
    "a: {script: train}, b: {script: slim_prune, dry-run: true}": "with dry-run no network is made",
    "a: {script: train, 'weights=x.pt': true}": "'weights=x.pt' is no flag",
    "a: {script: train, no-flip: Yes}": "stage a: no-flip: Yes; write true or false",
    "a: {script: train, epochs: {x: 1}}": "epochs: .* a flag is true, a number, a text",
    "a: {script: train}, b: {script: train, from: c}": "from: c is no stage before it .* are a",
    "a: {script: train, teacher: a}": "teacher: a is no stage before it .* there are none",
    f"{FLOAT}, c: {{script: test, from: b}}": r"c: b makes a file of format torchscript, which test\.py does not run",
    f"{WITH_NMS}, c: {{script: test, from: b}}": "c: b makes a file with NMS, whose confidence threshold lowers AP",
    "a: {script: train}, b: {script: export, int8: true}": "b: makes integers of a, which is float",
    f"{INTEGERS}, c: {{script: slim_prune}}": "b, which is quantized",
    f"{INTEGERS}, c: {{script: export}}": "add `int8: true`",
    f"{INTEGERS}, c: {{script: export, format: fpga}}": "b is quantized with target cpu; this file takes fpga",
    f"{FPGA}, c: {{script: export, int8: true}}": "b is quantized with target fpga; this file takes cpu, cpu-vnni, arm",
    f"{FPGA.lower()}, c: {{script: export, int8: true}}": "b is quantized with target fpga; this file takes cpu",
}


@pytest.mark.parametrize(
    ("text", "message"),
    [*NO_RECIPES.items(), *((f"stages: {{{stages}}}", message) for stages, message in NO_STAGES.items())],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        recipe_of(tmp_path, text)


def checkpoint(path: Path, model: Darknet, names: Sequence[str] = ("a", "b"), **more: Any) -> None:
    """A trained network in a .pt file."""
    write_checkpoint(path, model_document(model.state_dict(), model.network, names, (), kept=None, **more))


def start_file(folder: Path, suffix: str, classes: int = 2) -> str:
    """A trained network in a file of its own, .pt or .weights."""
    torch.manual_seed(1)
    model = Darknet(adapt_classes(tiny(), classes))
    path = folder / f"start{classes}{suffix}"
    if suffix == ".pt":
        checkpoint(path, model, [str(number) for number in range(classes)])
    else:
        write_darknet(path, model)
    return str(path)


@pytest.fixture(scope="module")
def inputs(folder):
    """Beside n.cfg and d.data of conftest.py: recipes, networks and data files, good and bad."""
    recipe_of(folder)
    data = (folder / "d.data").read_text()
    texts = {
        "layers.yaml": "stages: {a: {script: train}, b: {script: layer_prune, shortcut: 1}}",
        "pruned.yaml": "stages: {a: {script: slim_prune, percent: 0.3}}",
        "bad.yaml": "[]\n",
        "nowhere.yaml": "train: nowhere\nval: nowhere\nnames: [a, b]\n",
        "no-train.data": data.replace("train=train.txt\n", ""),
        "no-valid.data": data.replace("valid=val.txt\n", ""),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    for suffix, classes in itertools.product((".pt", ".weights"), (2, 3)):
        start_file(folder, suffix, classes)
    checkpoint(folder / "other.pt", Darknet(one_head("[convolutional]\nfilters=4\nsize=1\nstride=8\n")))
    settings = QuantSettings()
    checkpoint(folder / "int.pt", quantize(Darknet(tiny()), settings), quantization=settings.document())
    return folder


NET = "--cfg n.cfg"
CHECKED = {
    "--set tune.freeze=99": "stage tune: --freeze 99: nothing would be left to train",
    "--set whole.target=fpga": r"stage whole: --target fpga: block 1 .*; `python -m utils\.darknet\.rewrite .*n\.cfg ",
}
"""Refused by a script before the first stage runs, whatever that begins with."""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *((f"{NET} {start} {flag}", CHECKED[flag]) for start in ("", *STARTS) for flag in CHECKED),
        (f"{NET} --set tune.hyp=none.yaml", r"stage tune: none\.yaml: no such file"),
        (f"{NET} --set tune.hyp=bad.yaml", r"stage tune: bad\.yaml: a mapping 'key: value' is needed"),
        (f"{NET} --set sparse.KDstr=3", "stage sparse: --KDstr: there is nobody to learn from"),
        (f"{NET} --set sparse.BN_Fold=true", "stage sparse: --BN_Fold: says how to quantize"),
        (f"{NET} --set int8.target=fpga", r"stage int8: --target fpga: block 1 \(.*n\.cfg:\d+\): mish needs more than"),
        (f"{NET} --set tune.device=99", "stage tune: --device 99: this machine has"),
        (f"{NET} --set prune.percent=1.5", r"r\.yaml: stage prune: --percent: 1\.5 is outside 0 <= value < 1"),
        (f"{NET} --set prune.percent=[0.1,0.2]", "--percent, --shortcut: several values are compared with --dry-run"),
        (f"{NET} --set measure.runtime=ncnn", r"--runtime ncnn: .*model\.onnx is run by onnxruntime, opencv"),
        (f"{NET} --set tune.epoch=3", r"stage tune: unknown flag --epoch; did you mean --epochs"),
        (f"{NET} --set x.epochs=3", "there is no stage x; there are train, sparse"),
        (f"{NET} --set epochs=3", r"'epochs=3' is not STAGE\.FLAG=VALUE"),
        (f"{NET} --weights none.pt", r"none\.pt: no such file or directory"),
        (f"{NET} --weights d.names", r"d\.names"),
        (f"{NET} --weights other.pt", r"other\.pt: made for another network \(3 blocks, .* than .*n\.cfg"),
        (f"{NET} --weights int.pt", r"--weights int\.pt: is quantized already"),
        (f"{NET} --weights start3.pt", r"--weights .*: a network of 3 classes, but .*d\.data has 2"),
        (f"{NET} --weights start3.weights", r"--weights .*: a network of 3 classes, but .*d\.data has 2"),
        (f"{NET} --recipe none.yaml", r"none\.yaml: no such file"),
        (f"{NET} --img_size 97", "--img_size 97: not a multiple of 8"),
        (f"{NET} --data nowhere.yaml", "nowhere: no such file or directory"),
        (f"{NET} --data no-train.data", r"no-train\.data: no train = …"),
        (f"{NET} --data no-valid.data", r"no-valid\.data: no valid = …"),
        ("--cfg ROOT/cfg/yolov3-tiny.cfg --recipe layers.yaml", "stage b: --shortcut: ROOT/cfg/yolov3-tiny.cfg has no"),
        ("", "--cfg: is needed"),
        ("--pretrained start3.pt", r"--cfg: is needed, unless --weights is a \.pt"),
        (f"{NET} --pretrained start3.pt --weights start3.pt", "--pretrained: not allowed with --weights"),
        (f"{NET} --pretrained start3.pt --recipe pruned.yaml", r"pruned\.yaml: begins with slim_prune, .* before it"),
    ],
)
def test_all_that_cannot_work_is_refused_before_the_first_stage_runs(inputs, monkeypatch, root, flags, message):
    monkeypatch.chdir(inputs)
    flags, message = (text.replace("ROOT", str(root)) for text in (flags, message))
    with pytest.raises(InputError, match=message):
        compress.main(["--data", "d.data", "--recipe", "r.yaml", *flags.split()])
    assert not Path("runs").exists()


def in_process(command: list[str]) -> str:
    """Runs a stage as `python` does, but in this process; what it printed."""
    module = compress.script_module(command[0].removesuffix(".py"))
    output = io.StringIO()
    with redirect_stdout(output):
        module.main(command[1:])
    return output.getvalue()


WHOLE = """
all: {batch-size: 4, workers: 0, device: cpu}
stages:
  train: {script: train, epochs: 1}
  sparse: {script: train, sr: true, prune: 1, epochs: 1, allow: 100}
  prune: {script: slim_prune, percent: 0.3}
  tune: {script: train, epochs: 1, teacher: train, allow: 100}
  darknet: {script: export, from: tune, format: darknet}
  same: {script: test, from: darknet}
  float: {script: export, from: tune}
  quantize: {script: quantize, calib: 4}
  file: {script: export, int8: true}
"""


@pytest.mark.usefixtures("no_plots", "short_timings")
def test_the_first_row_of_the_page_is_the_file_that_was_given(folder, tmp_path, monkeypatch, capsys):
    """From a file alone to the page; its accuracy is what test.py finds, its time that of the runtime of the last.

    So are all times, but that the simulation of integers has none.
    """
    monkeypatch.setattr(compress, "python", in_process)
    monkeypatch.chdir(tmp_path)
    recipe_of(tmp_path, WHOLE)
    data, weights = str(folder / "d.data"), start_file(tmp_path, ".weights")
    flags = ["--cfg", str(folder / "n.cfg"), "--data", data, "--weights", weights]
    compress.main([*flags, "--recipe", "r.yaml", "--project", r"ru\ns"])
    printed = capsys.readouterr().out
    assert "\nDeploy\n" in printed and r"    python examples/onnxruntime_client.py 'ru\ns/r-d/f" in printed
    assert r"* file: ru\ns/r-d/f" in printed
    run = tmp_path / r"ru\ns/r-d"
    document = json.loads((run / "report/report.json").read_text())
    first, *others = document["runs"]
    alone = json.loads(in_process(["test.py", *flags, "--json"]))
    assert first["title"] == "original network" and first["lineage"][-1]["path"] == weights
    assert first["measured"]["map50"][0] == pytest.approx(alone["map50"], abs=1e-9)
    assert first["lineage"][-1]["sha256"] == sha256(Path(weights))
    assert [row["name"] for row in others if row["measured"] is None] == []
    assert document["baselines"][0]["name"].startswith("first @")
    text = (run / "report/report.md").read_text()
    assert f"from {first['measured']['map50'][0]:.3f}" in text
    times = {row["name"]: row["figures"]["ms"] for row in document["runs"]}
    assert times.pop("quantize") == {} and len({tuple(programs) for programs in times.values()}) == 1
    assert "onnxruntime" in next(iter(times["original"])) and times["tune"] == times["float"] != times["original"]
    assert "* Time: " in text and document["deploy"]["run"] in ("float", "file")
    assert document["deploy"]["client"].startswith("python examples/onnxruntime_client.py ")


FROM_OTHERS = """
all: {batch-size: 4, workers: 1}
stages:
  train: {script: train, epochs: 2, device: 7}
  prune: {script: slim_prune, percent: 0.3, no-test: true}
  tune: {script: train, epochs: 2, teacher: train, allow: 100}
  quantize: {script: quantize, calib: 4}
  int8: {script: export, int8: true}
"""
NEXT = "slim_prune.py train.py quantize.py export.py test.py"


def test_the_first_training_starts_from_weights_of_other_classes(folder, tmp_path, monkeypatch, capsys):
    """--device and --workers win over the recipe; a dry run says the epochs; the same command resumes the journey."""
    monkeypatch.setattr(compress, "python", in_process)
    monkeypatch.setattr(compress, "write_page", lambda journey, done, device: journey.folder / device)
    monkeypatch.chdir(tmp_path)
    recipe_of(tmp_path, FROM_OTHERS)
    public = ["--pretrained", start_file(tmp_path, ".weights", classes=3)]
    flags = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), "--recipe", "r.yaml", "--json"]
    flags += ["--device", "cpu", "--workers", "0"]
    compress.main([*flags, *public, "--dry-run", "--project", "a b"])
    output = capsys.readouterr()
    assert all("--project 'a b/r-d' --name" in line for line in output.out.splitlines())
    assert "epochs: train 2, tune 2; 4 in all" in output.err and "--device 7" not in output.out
    commands = [line.split() for line in output.out.splitlines()]
    assert ["-pt" in command for command in commands] == [True, *[False] * 4]
    assert [value(command, "--workers") for command in commands] == ["0", None, "0", None, None]
    assert [value(command, "--device") for command in commands] == [*["cpu"] * 4, None]
    for _ in range(2):
        compress.main([*flags, *public])
        output = capsys.readouterr()
        left = [line.rpartition(" s, ")[2] for line in output.err.splitlines() if line.startswith("epoch ")]
        assert (not left) == ("stage 1 of 5, train: is done" in output.err)
        assert re.sub("[0-9]+ s", "T", "; ".join(left[::2])) in (
            "",
            "T left, about T with the trainings after it; T left",
        )
        made = json.loads(output.out)
        coming = [shlex.split(stage["document"]["next"]) for stage in made["stages"]]
        assert " ".join(Path(script).name for _, script, *_ in coming) == NEXT
        for _, script, *words in coming:
            compress.check_stage(Path(script).stem, words)
        lineage = read_checkpoint(Path(made["stages"][0]["made"]))["lineage"]
        assert [entry["path"] for entry in lineage] == public[1:] and made["report"].endswith("r-d/cpu")
    with pytest.raises(InputError, match=r"holds another journey, whose stage train is .* -pt "):
        compress.main(flags)


@pytest.mark.parametrize("name", ["quick", "balanced", "smallest", "demo"])
def test_recipes_have_flags_that_their_scripts_take(name, root, folder, capsys, monkeypatch):
    monkeypatch.chdir(root)
    flags = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), "--dry-run"]
    compress.main([*flags, "--recipe", f"data/recipes/{name}.yaml"])
    commands = capsys.readouterr().out.splitlines()
    assert all(command.startswith("python ") for command in commands) and len(commands) >= 5
    for command in commands:
        words = command.split()
        if "--hyp" in words:
            assert (root / value(words, "--hyp")).is_file()


class Interrupted(Exception):  # noqa: N818
    """A kill."""


class Scripts:
    """Stands in for the scripts: a stage's file is made of its command, and a call may be a kill.

    A training that is killed leaves last.pt.

    Args:
        kill_at: number of the call that is a kill.
        scores: what the document of a stage has beside, by the stage's name, or by the script where that has none.
    """

    def __init__(self, kill_at: int | None = None, scores: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.commands: list[list[str]] = []
        self.kill_at, self.scores = kill_at, scores or {}

    @property
    def calls(self) -> list[str]:
        return [command[0] for command in self.commands]

    def __call__(self, command: list[str]) -> str:
        script, name, killed = command[0], value(command, "--name"), len(self.commands) == self.kill_at
        run = value(command, "--resume") or (name and f"{value(command, '--project')}/{name}")
        if run and (script == "train.py" or not killed):
            files = {"train.py": f"weights/{'last' if killed else 'best'}.pt", "export.py": "model.onnx"}
            path = Path(run, files.get(script, "model.pt"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(" ".join(command))
        if killed:
            raise Interrupted
        self.commands.append(command)
        return json.dumps({"schema": 1, "script": script, **self.scores.get(name or script, {})})


@pytest.mark.parametrize("kill_at", range(7))
def test_a_journey_goes_on_where_it_was_killed(tmp_path, kill_at):
    journey = journey_of(tmp_path)
    whole = replace(journey, folder=tmp_path / "whole").finish(Scripts())
    first, second = Scripts(kill_at), Scripts()
    with pytest.raises(Interrupted):
        journey.finish(first)
    done = journey.finish(second)
    assert len(first.calls) == kill_at and first.calls + second.calls == [entry["command"][0] for entry in whole]
    assert [entry["name"] for entry in done] == [entry["name"] for entry in whole]
    third = Scripts()
    assert journey.finish(third) == done and not third.calls


def test_another_journey_and_changed_files_are_refused(tmp_path):
    journey = journey_of(tmp_path)
    done = journey.finish(Scripts())
    other = replace(journey, data="other.data")
    with pytest.raises(InputError, match=r"holds another journey, whose stage train is `python train\.py --data"):
        other.finish(Scripts())
    Path(done[2]["made"]).write_text("changed")
    with pytest.raises(InputError, match=r"model\.pt: is missing or was changed since stage prune"):
        journey.finish(Scripts())
    for text in ("{", '{"stages": [{"command": []}]}', "[]"):
        (tmp_path / "j" / STATE).write_text(text)
        with pytest.raises(InputError, match=r"journey\.json(:1)?: is damaged: .*; choose another --name"):
            journey.finish(Scripts())


def test_a_training_that_was_begun_is_gone_on_with_as_it_was_begun(tmp_path):
    """Neither other flags nor another network come into it."""
    (tmp_path / "w.pt").write_text("one")
    text = "stages: {sparse: {script: train, epochs: 3}, file: {script: export}}"
    journey = Journey(recipe_of(tmp_path, text), tmp_path / "j", "d.data", None, str(tmp_path / "w.pt"))
    with pytest.raises(Interrupted):
        journey.finish(Scripts(kill_at=0))
    other = replace(journey, recipe=recipe_of(tmp_path, text.replace("3", "4")))
    with pytest.raises(InputError, match=r"holds another journey, whose stage sparse is .*--epochs 3"):
        other.finish(Scripts())
    (tmp_path / "w.pt").write_text("other")
    with pytest.raises(InputError, match=r"w\.pt: is missing or was changed since stage sparse"):
        journey.finish(Scripts())
    (tmp_path / "w.pt").write_text("one")
    scripts = Scripts()
    journey.finish(scripts)
    assert scripts.commands[0] == ["train.py", "--resume", str(tmp_path / "j/sparse"), "--json"]


def test_a_training_that_was_begun_at_another_place_is_not_gone_on_with(tmp_path):
    """A stage was put before it since, so it begins with another network. Nothing runs before this is refused."""
    text = "stages: {train: {script: train}, tune: {script: train}}"
    with pytest.raises(Interrupted):
        journey_of(tmp_path, text).finish(Scripts(kill_at=1))
    journey, scripts = journey_of(tmp_path, text.replace("tune", "cut: {script: slim_prune}, tune")), Scripts()
    with pytest.raises(InputError, match="j/tune: is there, but this stage has not begun; move it away, or choose"):
        journey.finish(scripts)
    assert not scripts.calls
    (tmp_path / "j/tune").rename(tmp_path / "tune")
    journey.finish(scripts)
    assert scripts.calls == ["slim_prune.py", "train.py"]


def test_flags_of_all_stages_go_to_those_whose_script_has_them_and_a_stage_has_the_last_word(tmp_path):
    text = CHAIN.replace("stages:", "all: {batch-size: 4, workers: 1, no-flip: true}\nstages:").replace(
        "sr: true", "sr: true, batch_size: 8, no-flip: false"
    )
    commands = {value(command, "--name") or "measure": command for command in planned(recipe_of(tmp_path, text))}
    owners = {
        flag: " ".join(name for name, command in commands.items() if flag in command)
        for flag in ("--batch-size", "--no-flip", "--workers")
    }
    assert owners == {
        "--batch-size": "train prune tune int8 measure",
        "--no-flip": "train tune",
        "--workers": "train sparse tune measure",
    }
    assert value(commands["sparse"], "--batch_size") == "8"
    no_test = recipe_of(tmp_path, FROM_OTHERS.replace("no-test", "no_test"), [("prune", "no-test", False)])
    assert not any("test" in flag for flag in no_test.stages[1].flags)
    for shared, stage, change in (
        ("{cache: ram}", "cache-images: false", ()),
        ("{cache-images: true}", "epochs: 1", ("a", "cache", False)),
        ("{BN_Flod: true, cache: ram}", "BN_Fold: false", ("all", "cache_images", False)),
        ("{}", "sr: true", ("a", "sparsity-regularization", False)),
    ):
        other = f"all: {shared}\nstages: {{a: {{script: train, {stage}}}}}"
        assert set(recipe_of(tmp_path, other, [change] if change else ()).stages[0].flags) <= {"--epochs", "1"}
    recipe = recipe_of(tmp_path, text, [("all", "batch-size", 2), ("all", "device", "cpu")])
    assert recipe.stages[0].value("--batch-size") == "2"
    text = "stages: {a: {script: train}, b: {script: export}, c: {script: test, from: b}, d: {script: test, from: a}}"
    commands = planned(recipe_of(tmp_path, text, [("all", "device", 1)]))
    assert [value(command, "--device") for command in commands] == ["1", None, None, "1"]
    accuracy = recipe.started().stages[1]
    assert (accuracy.name, accuracy.script, accuracy.source) == ("original-accuracy", "test", "original")
    assert accuracy.flags == ("--batch-size", "2", "--workers", "1", "--device", "cpu")


def test_off_is_a_value_as_any_other(tmp_path):
    """YAML 1.1 takes it for false, which removes a flag."""
    assert compress.change_of("all.amp=off") == ("all", "amp", "off")
    assert compress.change_of("a.no-flip=false")[2] is False and compress.change_of("a.no-flip=true")[2] is True
    recipe = recipe_of(tmp_path, "all: {amp: off}\nstages: {a: {script: train, no-flip: false}}")
    assert recipe.stages[0].value("--amp") == "off" and "--no-flip" not in recipe.stages[0].flags


@pytest.mark.parametrize(
    ("stages", "measured"),
    [
        ("train: {script: train}, prune: {script: slim_prune, percent: 0.3}, tune: {script: train}", False),
        ("train: {script: train}, int8: {script: quantize}, tune: {script: train, from: train}", False),
        ("train: {script: train}, prune: {script: slim_prune, no-test: true}, tune: {script: train}", True),
        ("sparse: {script: train, sr: true, prune: 1}, prune: {script: slim_prune}", True),
        ("train: {script: train}, prune: {script: slim_prune}, int8: {script: quantize}", False),
        ("train: {script: train}, file: {script: export}, measure: {script: test, from: file, allow: 2}", True),
    ],
)
def test_the_original_is_measured_where_a_gate_needs_it_and_nothing_else_says_it(tmp_path, stages, measured):
    names = [stage.name for stage in recipe_of(tmp_path, f"stages: {{{stages}}}").started().stages]
    assert ("original-accuracy" in names) == measured


TUNED, SPARSE = ("tune", "allow", 40), ("sparse", "allow", 8)
SCORES = {
    "train": {"map50": 0.9},
    "sparse": {"map50": 0.81},
    "prune": {"before": {"map50": 0.81}, "after": {"map50": 0.2}},
    "tune": {"map50": 0.5},
    "int8": {"before": {"map50": 0.5}, "after": {"map50": 0.1}, "map50": {"before": 0.5, "after": 0.1}},
    "test.py": {"map50": 0.4},
}


def test_a_training_that_loses_too_much_ends_the_journey_and_a_higher_allow_goes_on(tmp_path):
    """To the best before it; a pruning and the other stages lose what they like, unless their recipe says otherwise."""
    scripts = Scripts(scores=SCORES)

    def finish(*changes: tuple[str, str, Any]) -> list[str]:
        scripts.commands.clear()
        journey_of(tmp_path, CHAIN, changes).finish(scripts)
        return scripts.calls

    def refused_at(message: str, *changes: tuple[str, str, Any]) -> list[str]:
        with refused(InfeasibleError, message, 6):
            finish(*changes)
        return scripts.calls

    tuned = "stage tune: AP50 fell from 0.900 to 0.500, by 40.0 points; 10 are allowed. Try more epochs.* tune.allow=40"
    assert refused_at(tuned) == ["train.py", "train.py", "slim_prune.py", "train.py"]
    assert refused_at("39 are allowed", ("tune", "allow", 39)) == []
    assert refused_at("stage tune", ("tune", "epochs", 5)) == ["train.py"]
    refused_at(r"stage sparse: AP50 fell .* 0\.810, by 9\.0 points; 8 .*smaller s-share", SPARSE, TUNED)
    quantized = r"stage int8: AP50 fell from 0\.900 to 0\.100.*began with had 0\.500.* Keep layers float"
    assert refused_at(quantized, TUNED, ("int8", "allow", 5)) == ["train.py", "export.py", "quantize.py"]
    assert finish(TUNED) == ["test.py"]
    for _ in range(2):
        refused_at("stage sparse", SPARSE)
        assert finish(TUNED) == []
    refused_at("stage sparse", SPARSE)
    longer = ("sparse", "epochs", 9)
    assert len(finish(longer, TUNED)) == 6
    refused_at("stage measure", longer, TUNED, ("measure", "allow", 1))
    assert finish(longer, TUNED, ("measure", "allow", 100)) == []
    assert not any(entry["refused"] for entry in json.loads((tmp_path / "j" / "journey.json").read_text())["stages"])
    left = sorted(path.name for path in (tmp_path / "j").glob("*.refused*"))
    stages = ("int8.1", "prune.1", "sparse.1", "tune.1", "tune.2", "tune.3", "whole.1")
    assert left == [name.replace(".", ".refused") for name in stages]


def test_an_accuracy_that_is_not_known_is_no_loss(tmp_path, capsys):
    journey_of(tmp_path).finish(Scripts())
    assert "stage tune: AP50 before or after it is not known, so `allow` is not checked" in capsys.readouterr().err


def test_a_script_ends_with_its_journey_and_the_same_command_goes_on(tmp_path, python):
    """A journey is killed by kill -9 in its second stage; what the first one made is kept.

    A script that outlives it keeps the pipe of stderr open, so that the call runs into its time limit.
    """
    code = (
        "import sys; from pathlib import Path; from utils.compress import journey; from tests.test_compress import *\n"
        "folder = Path(sys.argv[1])\n"
        "def call(command):\n"
        "    if value(command, '--name') == 'sparse':\n"
        "        journey.python(['s.py'])\n"
        "    return Scripts()(command)\n"
        "journey.ROOT = folder\n"
        "journey_of(folder).finish(call)\n"
    )
    (tmp_path / "s.py").write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(90)\n")
    done = python("-c", code, tmp_path, timeout=60)
    assert done.returncode == -signal.SIGKILL
    scripts = Scripts()
    assert len(journey_of(tmp_path).finish(scripts)) == 1 + len(scripts.calls)


def test_ctrl_c_in_a_terminal_reaches_a_script_once(tmp_path, root):
    """The terminal sends it to all processes of the journey, which hands it on; a second one would end at once."""
    (tmp_path / "s.py").write_text(
        "import signal, time\ncame = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda *_: came.append(1))\n"
        f"open('{tmp_path}/begun', 'w')\n"
        "while not came: time.sleep(0.01)\n"
        f"time.sleep(0.3)\nopen('{tmp_path}/came', 'w').write(str(len(came)))\n"
    )
    code = (
        "from pathlib import Path; from utils.compress import journey;"
        f"journey.ROOT = Path({str(tmp_path)!r}); journey.python(['s.py'])"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert (tmp_path / "came").read_text() == "1"


def test_flags_are_kept_to_the_last_digit_and_each_stage_has_its_own(tmp_path):
    text = "stages:\n  a: &a {script: train, epochs: 3, lr: 0.123456789}\n  b: *a\n"
    recipe = recipe_of(tmp_path, text, [("b", "epochs", 9)])
    assert [stage.value("--epochs") for stage in recipe.stages] == ["3", "9"]
    assert recipe.stages[0].value("--lr") == "0.123456789"
    given = compress.parse_args(["--data", "d", "--recipe", "r", "--set", "a.x=1", "--set", "b.y=2"])
    assert given.set == [("a", "x", 1), ("b", "y", 2)]


def test_a_stage_that_fails_ends_the_journey_with_its_status(folder, tmp_path):
    text = "stages: {train: {script: train, epochs: 1, hyp: none.yaml}}"
    journey = Journey(recipe_of(tmp_path, text), tmp_path / "j", str(folder / "d.data"), str(folder / "n.cfg"), None)
    with refused(StageError, r"train\.py ended with status 2", 2):
        journey.finish(compress.python)
    for number, status in ((signal.SIGKILL, 5), (signal.SIGSEGV, 139)):
        (tmp_path / "dies.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
        with refused(StageError, r"dies\.py ended by ", status):
            compress.python([str(tmp_path / "dies.py")])
    mended = replace(journey, recipe=recipe_of(tmp_path, "stages: {train: {script: train, epochs: 1}}"))
    assert mended.finish(Scripts())[0]["document"]["script"] == "train.py"


SHORT = """
all: {batch-size: 4, workers: 0, device: cpu}
stages:
  train: {script: train, epochs: 4}
  prune: {script: slim_prune, percent: 0.3}
  tune: {script: train, epochs: 4, teacher: train, allow: 100}
  quantize: {script: quantize}
  int8: {script: export, int8: true}
  measure: {script: test, from: int8}
"""


@pytest.mark.slow
def test_a_journey_killed_at_any_time_ends_as_one_that_was_not(folder, tmp_path, root):
    """The processes themselves, stopped again and again by SIGTERM."""
    (tmp_path / "r.yaml").write_text(SHORT)

    files = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), "--recipe", str(tmp_path / "r.yaml")]

    def command(project: str) -> list[str]:
        script = [sys.executable, str(root / "compress.py")]
        return [*script, *files, "--project", project, "--name", "j", "--json"]

    quiet = {"cwd": tmp_path, "stderr": subprocess.DEVNULL}
    whole = json.loads(subprocess.run(command("whole"), stdout=subprocess.PIPE, check=True, **quiet).stdout)
    for seconds in (6, 9, 12, 15, 18):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, **quiet)
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (0, 143, -signal.SIGTERM)  # the last while the interpreter begins or ends
    killed = json.loads(subprocess.run(command("killed"), stdout=subprocess.PIPE, check=True, **quiet).stdout)
    for stage in ("train/weights/best.pt", "prune/model.pt", "tune/weights/best.pt", "quantize/model.pt"):
        one, other = (read_checkpoint(tmp_path / project / "j" / stage)["model"] for project in ("whole", "killed"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert killed["stages"][-1]["document"]["map50"] == whole["stages"][-1]["document"]["map50"]
    assert (tmp_path / killed["report"]).is_file()
