"""README's table for users of Darknet and of the older suites: every command of it runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

from models import Darknet
from tests.nets import TINY
from utils.checkpoint import write_darknet
from utils.darknet import cfg as cfg_file

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Coming from Darknet")[2].partition("\n## ")[0]
COMMANDS = re.findall(r"\| `python ([^`]+)` \|$", TABLE, re.MULTILINE)
QUICK = {
    "train.py": "--epochs 1 --batch-size 4 --workers 0 --notest --device cpu",
    "test.py": "--workers 0 --device cpu",
    "detect.py": "--device cpu",
    "export.py": "",
}
PRUNING = "--no-test --importance-batches 1 --reconstruct 1 --device cpu"


@pytest.fixture(scope="module")
def work(folder, tmp_path_factory):
    """A folder with the files that the commands name."""
    work = tmp_path_factory.mktemp("readme")
    (work / "NET.cfg").write_text(TINY.replace("mish", "leaky"))
    torch.manual_seed(0)
    write_darknet(work / "NET.weights", Darknet(cfg_file.load(work / "NET.cfg")))
    (work / "PICTURE").write_bytes((folder / "images/0.png").read_bytes())
    data = (folder / "d.data").read_text()
    (work / "DATA.data").write_text(re.sub("=([a-z])", f"={folder}/\\1", data))
    (work / "BACKBONE").write_bytes((work / "NET.weights").read_bytes())
    return work


@pytest.fixture(scope="module")
def last(work):
    """A trained network."""
    train = importlib.import_module("train").main
    files = ["--data", f"{work}/DATA.data", "--cfg", f"{work}/NET.cfg", "--weights", f"{work}/NET.weights"]
    train([*files, *QUICK["train.py"].split(), "--project", f"{work}/runs", "--name", "last"])
    return work / "runs/last/weights/last.pt"


def test_the_table_has_the_commands():
    assert len(COMMANDS) >= 18 and len(set(COMMANDS)) == len(COMMANDS)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, work, last, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(work)
    name, *words = shlex.split(command.replace("LAST.pt", str(last)))
    words = ["1" if before == "--epochs" else word for before, word in zip([name, *words], words, strict=False)]
    flags = QUICK.get(name, PRUNING).split()
    if name != "test.py":
        flags += ["--project", str(tmp_path)]
    main = script.main if name == "test.py" else importlib.import_module(name.removesuffix(".py")).main
    main([*words, *flags])
    assert capsys.readouterr().out
