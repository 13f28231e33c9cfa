"""Command lines: spelling of flags, values, one-line errors and exit statuses."""

from __future__ import annotations

import argparse
import fcntl
import importlib
import itertools
import json
import os
import re
import shlex
import struct
import sys
import termios
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from numpy.random import SeedSequence, default_rng

import compress
from utils import cli
from utils.errors import CheckpointError, InfeasibleError, InputError, NumericsError, ResourceError


def parser() -> cli.Parser:
    made = cli.Parser("What it does.", "python it.py --img_size 416", program="it.py")
    made.add_argument("--img_size", type=cli.image_side, nargs="+")
    made.add_argument("--conf-thres", type=cli.threshold)
    made.add_argument("-pt", "--pretrain", action="store_true")
    made.add_argument("--epochs", type=cli.positive_int)
    made.add_argument("--data")
    made.add_argument("--device", default="")
    made.add_argument("--resume", nargs="?", const="")
    return made


@pytest.mark.parametrize("flag", ["--img_size", "--img-size"])
def test_underscore_and_hyphen_are_the_same(flag):
    assert parser().parse_args([flag, "320", "416"]).img_size == [320, 416]
    assert parser().parse_args(["--conf_thres=0.5"]).conf_thres == 0.5
    assert parser().parse_args(["-pt", "--device", "", "--resume"]).pretrain


@dataclass(frozen=True)
class Settings:
    """Two flags, a switch, and a field without a flag."""

    size: tuple[int, ...] | None = cli.flag(None, "sides", "--img_size", type=cli.image_side, nargs="+")
    batch_size: int = cli.flag(16, "images", type=cli.positive_int)
    rect: bool = cli.flag(False, "as narrow as its images")
    classes: int = 1


def test_a_settings_dataclass_makes_its_flags_and_is_filled_from_them():
    made = cli.Parser("")
    made.add_settings("images", Settings)
    assert cli.settings_from(made.parse_args([]), Settings) == Settings()
    args = made.parse_args(["--img_size", "64", "32", "--batch-size", "4", "--rect"])
    assert cli.settings_from(args, Settings, classes=3) == Settings([64, 32], 4, True, 3)
    assert "images (default: 16)" in made.format_help() and "(default: None)" not in made.format_help()
    with pytest.raises(InputError, match="--Nms-Thres: is no flag here; it is --iou-thres"):
        made.parse_args(["--Nms-Thres", "3"])
    with pytest.raises(InputError, match="--batch-size: 0 is below 1"):
        made.parse_args(["--batch-size", "0"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs?"),
        (["--qqq"], "unknown flag --qqq; see --help"),
        (["stray"], "unexpected argument 'stray'; see --help"),
        (["--epochs", "0"], "--epochs: 0 is below 1, the smallest allowed"),
        (["--epochs", "1_0"], "--epochs: '1_0' is not an integer"),
        (["--conf-thres", "nan"], "--conf-thres: 'nan' is not a number"),
        (["--conf-thres", "1.5"], "--conf-thres: 1.5 is outside 0 <= value <= 1"),
        (["--conf-thres", "-1e-3"], "--conf-thres: -1e-3 is outside 0 <= value <= 1"),
        (["--data", ""], "--data: is empty; give a value, or leave the flag out"),
        (["--data="], "--data: is empty; give a value, or leave the flag out"),
        (["-help"], "unknown flag -help; did you mean --help?"),
        (["--img_size", "9999"], "--img_size: 9999 is outside 1..8192 pixels"),
    ],
)
def test_a_wrong_flag_is_one_line(given, message):
    with pytest.raises(InputError) as caught:
        parser().parse_args(given)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["0", "20261129", str(2**63 - 1)])
def test_a_seed_has_63_bits(text):
    """Of everything that draws: what numpy and PyTorch take."""
    value = cli.random_seed(text)
    assert value == int(text)
    default_rng([value, 1, 2]), SeedSequence([value, 1]), default_rng(value), torch.manual_seed(value)
    for bad, message in (("-1", "outside 0..9223372036854775807"), (str(2**63), "outside"), ("1e3", "not an integer")):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            cli.random_seed(bad)


@pytest.mark.parametrize(
    "call", ["train", "quantize", "utils.data.toy", "utils.data.convert voc", "utils.report.__main__"]
)
def test_scripts_that_draw_refuse_a_longer_seed(call):
    module, *words = call.split()
    script = importlib.import_module(module)
    with pytest.raises(InputError, match=r"--seed: 9223372036854775808 is outside 0\.\.9223372036854775807"):
        script.main([*words, "--seed", str(2**63)])


def test_a_fraction_is_below_one():
    assert [cli.fraction(text) for text in ("0", ".5", "1e-3")] == [0, 0.5, 0.001]
    with pytest.raises(argparse.ArgumentTypeError, match="0 <= value < 1"):
        cli.fraction("1")


def test_an_input_size_is_one_side_or_height_and_width_and_the_nearest_to_one_off_the_stride_is_named():
    for sides, expected in ((None, (288, 352)), ([320], (320, 320)), ([320, 416], (320, 416))):
        assert cli.input_size(sides, 32, (288, 352)) == expected
    with pytest.raises(InputError, match=r"--img_size 415: not a multiple of 32.*try 416"):
        cli.input_size([415], 32, (416, 416))


def test_control_characters_are_escaped():
    assert cli.one_line("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    assert cli.one_line("é \U0001f600") == "é \U0001f600"


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (InputError("x"), 2),
        (CheckpointError("x"), 3),
        (NumericsError("x"), 4),
        (ResourceError("x"), 5),
        (InfeasibleError("x"), 6),
        (MemoryError(), 5),
        (OSError(28, "No space left on device", "f"), 5),
        (FileNotFoundError(2, "No such file", "f"), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 5),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), 5),
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:41234"), 5),
    ],
)
def test_every_failure_has_its_exit_status_and_one_line(failure, status, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(Mock(side_effect=failure))
    assert caught.value.code == status
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_a_lack_of_memory_names_the_batch_and_the_next_smaller_one(failure):
    for batch, way_out in ((16, "--batch-size 8"), (3, "--batch-size 1"), (1, "a smaller --img_size")):
        message = f"out of memory with --batch-size {batch}; try {way_out} "
        with pytest.raises(ResourceError, match=message), cli.memory_for(batch):
            raise failure
    message = r"with --batch-size 16; resume it where .* last\.pt with --batch-size 8 "  # a run keeps its batch size
    with pytest.raises(ResourceError, match=message), cli.memory_for(16, resumed=True):
        raise failure


def test_scripts_that_lack_memory_name_their_batch(run, prune, monkeypatch):
    for name in ("training.workflow.loaders", "pruning.workflow.prune"):
        monkeypatch.setattr(f"utils.{name}", Mock(side_effect=RuntimeError("CUDA out of memory")))
    calls = (partial(run, "--epochs", "1"), partial(prune, "slim", "--percent", "0", "--no-test", "--batch-size", "4"))
    for call in calls:
        with pytest.raises(ResourceError, match="with --batch-size 4; try --batch-size 2 "):
            call()


def test_what_is_no_lack_of_memory_passes_as_it_is_and_a_bug_keeps_its_traceback():
    with pytest.raises(InputError, match="--name 'out of memory'"), cli.memory_for(2):
        raise InputError("--name 'out of memory'")
    with pytest.raises(KeyError), cli.memory_for(2):
        cli.run(Mock(side_effect=KeyError("bug")))


def test_json_is_one_document_with_its_schema(capsys):
    cli.print_json({"map50": 0.5})
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "map50": 0.5}
    with pytest.raises(ValueError, match="JSON compliant"):
        cli.print_json({"map50": float("nan")})


WORK = """
import sys, time
import compress
from utils import cli
cli.SILENCE, cli.DELAY = 0.2, 0.0
def main():
    time.sleep(0.5)
    for step in (bar := cli.ProgressBar("importance", range(5), unit="batches", done=2, total=7)):
        bar.note = f"loss {step}"
        time.sleep(0.15)
    with cli.ProgressBar(""):
        time.sleep(0.5)
    time.sleep(0.01)
    with cli.ProgressBar("certificate"):
        time.sleep(0.5)
cli.run(main)
"""


def test_a_log_file_has_lines_of_what_is_under_way_and_a_terminal_a_bar(python):
    """None of a part that speaks for itself; a bar needs no lines."""
    lines = python("-c", WORK, check=True).stderr.splitlines()
    titles = [title for title, _ in itertools.groupby(line.partition(":")[0] for line in lines)]
    assert titles == ["at work", "importance", "certificate"]
    counted = [line for line in lines if line.startswith("importance")]
    assert re.fullmatch(r"importance: [3-6] of 7 batches, [01] s, [01] s left; loss [0-4]", counted[-1])
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))  # lines and columns
    os.set_blocking(ours, False)
    python("-c", WORK, capture_output=False, stderr=theirs, check=True)
    shown = os.read(ours, 1 << 16).decode()
    assert "importance:  71%" in shown and "loss 3" in shown and "at work" not in shown and "certificate" not in shown


def test_there_is_one_kind_of_progress(sources):
    assert [source.path for source in sources if "tqdm" in source.text and not source.is_test] == ["utils/cli.py"]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (300, "5 min"), (7800, "2 h 10 min")])
def test_a_time_is_said_in_two_units_at_most(seconds, text):
    assert cli.duration(seconds) == text


SCRIPTS = sorted(path.name for path in Path(__file__).parent.parent.glob("*.py") if path.name != "models.py")


MODULES = ("utils.report.__main__", "utils.darknet.info", "utils.darknet.rewrite")
MODULES += ("utils.data.doctor", "utils.data.toy", "utils.data.convert")
MODULES += tuple(f"benchmarks.{name}" for name in ("compare", "latency", "results"))
OF_THE_USER = {"utils.data.convert": ("VOCdevkit", "data/voc")}


@pytest.mark.parametrize("program", [*SCRIPTS, *MODULES])
def test_an_example_is_a_command_whose_files_are_there_or_said_to_be_made(root, program, monkeypatch, capsys):
    """On a fresh clone; a file of `make demo` comes with a note, one of another origin is explained."""
    monkeypatch.chdir(root)
    script = program.removesuffix(".py")
    module = compress.script_module(script) if program in SCRIPTS else importlib.import_module(program)
    parse = compress.script_parser(script).parse_args if script.endswith("_prune") else module.parse_args
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    example, *notes = text.split("example:\n")[1].splitlines()
    words = shlex.split(example)
    parse(words[2 + (words[1] == "-m") :])
    output = next((after for word, after in itertools.pairwise(words) if word in ("--output", "--out")), None)
    for path in (word.rpartition("=")[2].partition("@")[0] for word in words if "/" in word and word != output):
        if path.startswith("runs/"):
            assert "`make demo` makes runs/demo" in notes[0] and path.startswith("runs/demo/")
        else:
            assert (root / path).exists() or path.startswith(OF_THE_USER.get(program, "-"))
    assert all(folder in text for folder in OF_THE_USER.get(program, ()))


HELP = """
import runpy, sys
sys.modules["torch"] = None
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
"""


def test_help_imports_no_torch(python):
    done = python("-c", HELP, *SCRIPTS, check=True)
    assert all(f"example:\n  python {script} " in done.stdout for script in SCRIPTS)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py --cfg none.cfg --data none.data", "error: none.cfg: no such file"),
        ("train.py", "error: --data: is needed"),
        ("test.py --data none.data --weights x.pt", "error: none.data: no such file"),
        ("detect.py --cfg none.cfg", "error: none.cfg: no such file"),
        ("-m utils.darknet.info none.cfg", "error: none.cfg: no such file"),
        ("-m utils.data.doctor none.data", "error: none.data: no such file"),
        ("-m utils.data.convert voc none --output x", "error: none: no such folder"),
    ],
)
def test_a_missing_file_is_one_line_and_status_2(root, python, command, message):
    before = sorted(root.iterdir())
    done = python(*command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert sorted(root.iterdir()) == before


@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_ends_a_script_tidily_unless_nohup_has_it_ignored(python, ignored):
    code = (
        "import os, signal\nfrom utils import cli\n"
        f"signal.signal(signal.SIGHUP, signal.SIG_{'IGN' if ignored else 'DFL'})\n"
        "def main():\n    try: os.kill(os.getpid(), signal.SIGHUP)\n    finally: print('tidied')\n"
        "cli.run(main)\n"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0 if ignored else 129, "tidied\n")


def test_a_command_in_the_folder_of_the_scripts_names_the_script_alone(root, monkeypatch):
    """Also where the script that tells it was called by its whole path, as stages of compress.py are."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", [str(root / "compress.py")])
    assert cli.command_of("test.py", data="d.data") == "python test.py --data d.data"
