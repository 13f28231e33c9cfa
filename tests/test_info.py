"""`python -m utils.darknet.info`: its table, its JSON document and its errors."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from utils.darknet import info
from utils.errors import InputError

ROOT = Path(info.__file__).resolve().parents[2]

NANO = """\
[net]
width=64
height=32
channels=1

[convolutional]
batch_normalize=1
filters=8
size=3
stride=2
pad=1
activation=leaky

[convolutional]
filters=8
size=3
groups=4
pad=1
activation=leaky

[shortcut]
from=-2
activation=linear

[route]
layers=-1
groups=2
group_id=1

[maxpool]
size=2
stride=2

[upsample]
stride=2

[route]
layers=-1, 0

[convolutional]
filters=14
activation=linear

[yolo]
mask=1,2
anchors=4,5, 8,8, 16.5,16
num=3
classes=2
"""


@pytest.fixture
def nano(tmp_path) -> Path:
    path = tmp_path / "nano.cfg"
    path.write_text(NANO)
    return path


def lines(capsys) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_table_is_aligned_and_says_what_each_block_reads(nano, capsys):
    info.main([str(nano)])
    assert lines(capsys) == [
        "layer  type           filters  size/stride   input              output    parameters  BFLOPs  reads",
        "    0  convolutional        8  3/2           1x32x64            8x16x32           88   0.000",
        "    1  convolutional        8  3/1 groups 4  8x16x32            8x16x32          152   0.000",
        "    2  shortcut                              8x16x32 + 8x16x32  8x16x32                0.000  0",
        "    3  route                                 8x16x32            4x16x32                       2 (2 of 2)",
        "    4  maxpool                 2/2           4x16x32            4x8x16                 0.000",
        "    5  upsample                /2            4x8x16             4x16x32",
        "    6  route                                 4x16x32 + 8x16x32  12x16x32                      5, 0",
        "    7  convolutional       14  1/1           12x16x32           14x16x32         182   0.000",
        "    8  yolo                                  14x16x32           14x16x32",
        "",
        "9 layers, 422 parameters, 1 772 bytes of weights",
        "196 608 multiply-adds, 0.000 BFLOPs (0.000 without max pooling and shortcuts) at 32 x 64",
        "head 8: stride 2, 2 classes, anchors 8,8 16.5,16",
    ]


@pytest.mark.parametrize(("flags", "height", "width"), [([], 32, 64), (["64"], 64, 64), (["96", "32"], 96, 32)])
def test_json_is_one_document_with_the_agreed_keys(flags, height, width, nano, capsys):
    info.main([str(nano), "--json", *(["--img-size", *flags] if flags else [])])
    document = json.loads(capsys.readouterr().out)
    macs = (72 + 144 + 12 * 14) * height * width // 4
    assert document == {
        "schema": 1,
        "layers": 9,
        "parameters": 422,
        "weights_bytes": 1772,
        "macs": macs,
        "bflops": (2 * macs + 8 * height * width // 4 + 4 * 4 * height * width // 16) / 1e9,
        "heads": [{"stride": 2, "anchors": [[8, 8], [16.5, 16]], "classes": 2}],
    }


def test_a_real_net_gives_darknets_totals(shared, capsys):
    info.main([str(shared / "darknet_cfg" / "yolov4.cfg"), "--img_size", "416"])
    out = lines(capsys)
    assert "162 layers, 64 363 101 parameters, 257 717 640 bytes of weights" in out
    assert any("60.137 BFLOPs (60.105 without" in line for line in out)
    assert [line.split(",")[0] for line in out[-3:]] == [
        "head 139: stride 8",
        "head 150: stride 16",
        "head 161: stride 32",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--img_size", "33"], "--img_size 33: not a multiple of 2"),
        (["--img_size", "32", "32", "32"], "N or H W"),
        (["--img_size", "0"], "--img_size: 0 is outside"),
        (["--jason"], "did you mean --json"),
    ],
)
def test_a_bad_flag_is_named(flags, message, nano):
    with pytest.raises(InputError, match=message):
        info.main([str(nano), *flags])


def run(path: Path | str, folder: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command as a user runs it, in an empty folder, and its seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "utils.darknet.info", str(path)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


BAD = {
    "empty": b"",
    "binary": bytes(range(256)) * 16,
    "utf16": NANO.encode("utf-16"),
    "no equals": NANO.replace("filters=14", "filters").encode(),
    "unknown section": NANO.replace("[maxpool]", "[maxpol]").encode(),
    "not a number": NANO.replace("filters=14", "filters=__import__('os').system('touch CANARY')").encode(),
    "filters before yolo": NANO.replace("filters=14", "filters=15").encode(),
    "route to the future": NANO.replace("layers=-1, 0", "layers=-1, 9").encode(),
    "no head": NANO[: NANO.index("[yolo]")].encode(),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_cfg_gives_one_line_and_no_file(name, tmp_path):
    path, folder = tmp_path / "bad.cfg", tmp_path / "empty"
    folder.mkdir()
    path.write_bytes(BAD[name])
    done, _ = run(path, folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(str(path))}:\d+: .+\n", done.stderr)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["fifo", "folder", "missing", "loop"])
def test_what_is_no_file_gives_one_line_at_once(name, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    path = tmp_path / name
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "loop": lambda place: os.symlink(place, place)}
    make.get(name, str)(path)
    done, _ = run(path, folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: {re.escape(str(path))}(:1)?: .+\n", done.stderr)


def test_answers_come_before_torch_could_be_imported(nano, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert min(run(nano, folder)[1] for _ in range(3)) < 0.5
    code = "import sys, utils.darknet.info; print(sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
