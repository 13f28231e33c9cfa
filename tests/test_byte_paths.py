"""A name is bytes: folders and files whose names are not UTF-8 work in every script, in JSON, in YAML and in prints."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.media import write_video
from tests.test_convert import CAT, voc_root, xml
from utils.cli import run as run_script

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names"),
    pytest.mark.usefixtures("no_plots"),
]
NAME = os.fsdecode(b"caf\xe9")


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """The data set of `folder` below a folder of such a name, with pictures of such names."""
    place = Path(shutil.copytree(folder, tmp_path_factory.mktemp("bytes") / NAME))
    for file in [*place.glob("images/*"), *place.glob("labels/*")]:
        file.rename(file.with_name(f"{NAME}{file.name}"))
    names = [f"images/{NAME}{number}.png\n" for number in range(9)]
    for split, part in (("train", names[3:]), ("val", names[:3])):
        (place / f"{split}.txt").write_bytes(os.fsencode("".join(part)))
    return place


def call(module: str, *flags: str) -> None:
    """Run a script of the project as its command line does."""
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: main(list(flags)))
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def trained(place):
    weights = place / "runs" / "t" / "weights" / "best.pt"
    flags = ("--cfg", str(place / "n.cfg"), "--data", str(place / "d.data"), "--project", str(place / "runs"))
    call("train", *flags, "--epochs", "1", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--name", "t")
    return weights


@pytest.fixture(scope="module")
def exported(trained):
    call("export", "--weights", str(trained), "--project", str(trained.parents[2]), "--name", "e")
    return trained.parents[2] / "e" / "model.onnx"


VOC = f"{{place}}/voc/{NAME}"
COMMANDS = {
    "resume": ("train", "--resume", "{place}/runs/t"),
    "detect": ("detect", "--weights", "{weights}", "--source", "{place}/images", "--output", "{place}/o", "--save-txt"),
    "slim_prune": ("slim_prune", "--weights", "{weights}", "{data}", "--percent", "0.3", "{project}", "--device=cpu"),
    "quantize": ("quantize", "--weights", "{weights}", "{data}", "{project}", "--device=cpu"),
    "darknet": ("export", "--weights", "{weights}", "{project}", "--format", "darknet"),
    "doctor": ("utils.data.doctor", "{place}/d.data"),
    "info": ("utils.darknet.info", "{place}/n.cfg"),
    "rewrite": ("utils.darknet.rewrite", "{place}/n.cfg", "--activation", "mish=leaky", "-o", "{place}/leaky.cfg"),
    "convert": ("utils.data.convert", "voc", VOC, "--output", "{place}/converted", "--val-share", "0.5"),
    "report": ("utils.report.__main__", "{place}/runs/t", "--out", "{place}/report"),
    "toy": ("utils.data.toy", "--output", "{place}/toy", "--train", "2", "--val", "1"),
    "compress": (
        "compress",
        "--cfg={place}/n.cfg",
        "{data}",
        "--recipe=data/recipes/demo.yaml",
        "{project}",
        "--dry-run",
    ),
}
"""Script → its flags."""
ELSEWHERE = {"test", "utils.pruning.command"}
"""Modules with a `main` that other tests call, and the one that makes those of the pruners."""


def test_every_script_is_tried(sources):
    modules = {
        source.module
        for source in sources
        for node in source.tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "main" and not source.path.startswith(("tests", "bench"))
    }
    assert modules <= {command[0] for command in COMMANDS.values()} | ELSEWHERE


@pytest.fixture(scope="module")
def voc(place):
    """Two pictures with annotations of Pascal VOC."""
    voc_root(place / "voc" / NAME, {f"{NAME}{number}": xml(CAT) for number in range(2)})


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("voc")
def test_every_script_takes_names_that_are_not_utf_8(name, place, trained):
    words = {"place": place, "weights": trained, "project": f"--project={place}/runs", "data": f"--data={place}/d.data"}
    call(*(word.format(**words) for word in COMMANDS[name]))


@pytest.mark.parametrize("runtime", ["onnxruntime", "opencv"])
def test_exported_files_run_and_say_where_they_come_from(runtime, exported, place, script, capsys):
    with pytest.raises(SystemExit) as stop:
        flags = ["--weights", str(exported), "--data", str(place / "d.data"), "--runtime", runtime, "--json"]
        run_script(lambda: script.main(flags))
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["weights"] == str(exported)


def test_a_video_is_read(place, trained):
    write_video(place.parent / "a.avi", np.zeros((3, 48, 64, 3), np.uint8)).rename(place / f"{NAME}.avi")
    flags = ("--source", str(place / f"{NAME}.avi"), "--output", str(place / "frames"), "--nosave")
    call("detect", "--weights", str(trained), *flags)
