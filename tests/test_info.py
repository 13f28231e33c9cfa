"""`python -m utils.darknet.info`: its table, its JSON document and its errors."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.nets import TINY, printed
from utils.darknet import info
from utils.errors import InputError


@pytest.fixture
def cfg(tmp_path) -> Path:
    path = tmp_path / "tiny.cfg"
    path.write_text(TINY)
    return path


def test_the_table_is_aligned_and_says_what_each_block_reads(cfg, capsys):
    info.main([str(cfg)])
    assert capsys.readouterr().out.splitlines() == [
        "layer  type           filters  size/stride  input              output    parameters  BFLOPs  reads",
        "    0  convolutional        8  3/2          3x64x64            8x32x32          232   0.000",
        "    1  convolutional        8  3/2          8x32x32            8x16x16          592   0.000",
        "    2  convolutional        4  1/1          8x16x16            4x16x16           40   0.000",
        "    3  convolutional        8  3/1          4x16x16            8x16x16          304   0.000",
        "    4  shortcut                             8x16x16 + 8x16x16  8x16x16                0.000  1",
        "    5  route                                8x16x16            4x16x16                       4 (2 of 2)",
        "    6  convolutional       12  3/2          4x16x16            12x8x8           456   0.000",
        "    7  maxpool                 2/1          12x8x8             12x8x8                 0.000",
        "    8  convolutional       21  1/1          12x8x8             21x8x8           273   0.000",
        "    9  yolo                                 21x8x8             21x8x8",
        "   10  route                                12x8x8             12x8x8                        7",
        "   11  convolutional        6  1/1          12x8x8             6x8x8             84   0.000",
        "   12  upsample                /2           6x8x8              6x16x16",
        "   13  route                                6x16x16 + 8x16x16  14x16x16                      12, 4",
        "   14  convolutional       21  1/1          14x16x16           21x16x16         315   0.000",
        "   15  yolo                                 21x16x16           21x16x16",
        "",
        "16 layers, 2 296 parameters, 9 572 bytes of weights",
        "574 208 multiply-adds, 0.001 BFLOPs (0.001 without max pooling and shortcuts) at 64 x 64",
        "head 9: stride 8, 2 classes, anchors 20,16 24,30 40,44",
        "head 15: stride 4, 2 classes, anchors 4,4 8,8 12,10",
    ]


@pytest.mark.parametrize(("flags", "height", "width"), [([], 64, 64), (["32"], 32, 32), (["96", "32"], 96, 32)])
def test_json_is_one_document_with_the_agreed_keys(flags, height, width, cfg, capsys):
    """Multiply-adds of a picture's pixel: those of a cell of each convolution, by its stride."""
    document = printed(capsys, info.main, str(cfg), *(["--img-size", *flags] if flags else []))
    cells = height * width // 64
    macs = cells * (216 * 16 + (576 + 32 + 288) * 4 + 432 + 252 + 72 + 294 * 4)
    assert document == {
        "schema": 1,
        "layers": 16,
        "parameters": 2296,
        "weights_bytes": 9572,
        "macs": macs,
        "bflops": (2 * macs + 8 * 4 * cells + 4 * 12 * cells) / 1e9,
        "heads": [
            {"stride": 8, "anchors": [[20, 16], [24, 30], [40, 44]], "classes": 2},
            {"stride": 4, "anchors": [[4, 4], [8, 8], [12, 10]], "classes": 2},
        ],
    }


def test_a_bad_size_is_named(cfg):
    for sides, message in ((["33"], "--img_size 33: not a multiple of 8"), (["32"] * 3, "N or H W")):
        with pytest.raises(InputError, match=message):
            info.main([str(cfg), "--img_size", *sides])


def test_answers_come_before_torch_could_be_imported(cfg, root, python, tmp_path):
    """In less than half a second of processor time; test_cfg.py has what is refused."""
    (tmp_path / "empty").mkdir()
    environment, seconds = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}, []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        python("-m", "utils.darknet.info", cfg, cwd=tmp_path / "empty", env=environment, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5 and not list((tmp_path / "empty").iterdir())
    code = "import sys, utils.darknet.info; print(sorted({'torch', 'numpy', 'cv2'} & set(sys.modules)))"
    assert python("-c", code).stdout == "[]\n"
