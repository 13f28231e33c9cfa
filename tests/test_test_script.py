"""test.py: what it prints, what it writes, and what it refuses before torch is imported."""

from __future__ import annotations

import contextlib
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from models import Darknet
from tests.media import small_set
from tests.nets import TINY, printed, tiny
from tests.test_evaluation import STAGES, FirstUse
from utils.checkpoint import model_document, write_checkpoint
from utils.darknet import weights
from utils.darknet.network import parameter_count
from utils.errors import InputError, SuiteError

LABELS = ("0 0.3 0.4 0.2 0.3\n1 0.7 0.6 0.3 0.5\n", "1 0.5 0.5 0.6 0.4\n", "")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with three pictures, their description set.data, a.cfg and a.weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_set(LABELS)
    Path("a.cfg").write_text(TINY)
    torch.manual_seed(0)
    weights.write("a.weights", tiny(), {key: value.numpy() for key, value in Darknet(tiny()).state_dict().items()})
    return tmp_path


FLAGS = ("--data", "set.data", "--cfg", "a.cfg", "--weights", "a.weights")


@pytest.fixture
def measured(folder, script, capsys):
    """Call test.py; returns its document."""
    return partial(printed, capsys, script.main, *FLAGS)


def tree():
    """Every file below the current folder, without the picture cache."""
    return sorted(str(path) for path in Path().rglob("*") if path.is_file() and path.parts[0] != "cache")


def test_first_uses_are_in_no_time(measured, monkeypatch):
    """Such as the import of torchvision, in the first batches."""
    FirstUse(monkeypatch, *(f"utils.detection.evaluate.{name}" for name in STAGES))
    assert max(measured("--batch-size", "2")["ms"].values()) <= 1


def test_the_table_has_a_row_for_all_classes_and_sizes(folder, script, capsys):
    script.main(FLAGS)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("a.weights: ")
    assert out[0].endswith(" GMACs at 64 × 64")
    assert out[1].split() == ["Class", "Images", "Objects", "P", "R", "F1", "AP50", "AP50-95"]
    assert [line.split()[0] for line in out[3:-2]] == ["all", "small", "medium"]
    assert out[3].split()[1:3] == ["3", "3"]
    assert out[-1].startswith("ms an image: ")
    assert "batch 16" in out[-1]


def test_verbose_adds_a_row_for_every_class(folder, script, capsys):
    script.main([*FLAGS, "--verbose"])
    out, err = capsys.readouterr()
    assert [line.split()[:3] for line in out.splitlines()[4:6]] == [["cat", "1", "1"], ["dog", "2", "2"]]
    assert "3 of 3 images usable" in err


def test_json_is_one_document_with_the_agreed_keys(measured):
    document = measured("--img-size", "64", "96")
    assert (document["schema"], document["images"], document["size"]) == (1, 3, [64, 96])
    for key in ("map50", "map50_95", "precision", "recall", "f1"):
        assert 0 <= document[key] <= 1
    assert [row["name"] for row in document["per_class"]] == ["cat", "dog"]
    assert {"ap50", "ap50_95"} <= document["per_class"][0].keys()
    assert document["parameters"] == parameter_count(tiny())
    assert document["macs"] > 0
    assert set(document["ms"]) == {"preprocess", "inference", "nms"}
    assert "PyTorch" in document["runtime"]


def test_kept_pictures_give_the_same_figures(folder, measured):
    flags = ("--task", "benchmark", "--img_size", "32", "64", "--conf-thres", "0.0001")
    plain, kept = (measured(*flags, *more)["benchmark"] for more in ((), ("--cache", "disk")))
    assert [{**row, "ms": None} for row in plain] == [{**row, "ms": None} for row in kept]
    assert len(list((folder / "cache" / "darknet-compression").glob("pixels-*"))) == 2


def test_benchmark_is_a_list_of_sizes_by_thresholds(measured, script, capsys):
    rows = measured("--task", "benchmark")["benchmark"]
    want = [([side, side], iou) for side in (48, 64, 80) for iou in (0.5, 0.6, 0.7)]
    assert [(row["size"], row["iou_thres"]) for row in rows] == want
    script.main([*FLAGS, "--task", "benchmark", "--img_size", "32", "64", "32"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in table[3:]] == [
        [side, "×", side, iou] for side in ("32", "64") for iou in ("0.50", "0.60", "0.70")
    ]


@pytest.mark.parametrize("flags", [("--task", "benchmark"), ("--augment", "--stretch", "--single-label")])
def test_nothing_is_written_unless_it_is_asked_for(folder, script, capsys, flags):
    before = tree()
    script.main([*FLAGS, *flags])
    assert tree() == before


def test_save_json_is_read_by_pycocotools_and_every_run_has_its_folder(measured):
    for name in ("exp", "exp2"):
        document = measured("--save-json")
        assert Path(document["detections"]) == Path("runs/test", name, "detections.json")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        ids = {"images": [{"id": n} for n in range(3)], "categories": [{"id": 0}, {"id": 1}]}
        coco.dataset = {**ids, "annotations": []}
        coco.createIndex()
        found = coco.loadRes(document["detections"])
    boxes = np.array([row["bbox"] for row in found.anns.values()])
    assert len(boxes)
    assert boxes.min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:] <= (90.001, 60.001)).all()
    files = sorted(path.name for path in Path("runs/test/exp").iterdir())
    assert files == ["args.yaml", "data.yaml", "detections.json", "env.json", "model.cfg"]
    assert measured("--data", "runs/test/exp/data.yaml")["map50"] == document["map50"]


def test_a_checkpoint_needs_no_cfg_and_scores_as_its_weights(measured, script, capsys):
    state = {key: torch.from_numpy(array.copy()) for key, array in weights.read("a.weights", tiny()).items()}
    full = Darknet(tiny()).state_dict() | state
    write_checkpoint(Path("best.pt"), model_document(full, tiny(), ("dog", "cow"), ()))
    want = measured()
    for flags in ((), ("--cfg", "a.cfg")):
        script.main(["--data", "set.data", "--weights", "best.pt", *flags, "--json"])
        out, err = capsys.readouterr()
        got = json.loads(out)
        assert all(got[key] == want[key] for key in ("map50", "map50_95", "f1", "macs"))
        assert "trained with other class names" in err


def test_workers_batches_and_threads_change_nothing_but_the_time(measured):
    plain, other = measured(), measured("--workers", "1", "--batch-size", "2", "--threads", "1")
    assert plain["map50"] == pytest.approx(other["map50"], abs=1e-6)


def test_one_class_takes_a_network_of_any_class_count(measured):
    Path("set.names").write_text("cat\ndog\nfox\n")
    Path("set.data").write_text("valid = val.txt\nnames = set.names\n")
    with pytest.raises(InputError, match=r"a\.weights: a network of 2 classes, but set\.data has 3"):
        measured()
    document = measured("--single-cls", "--save-json")
    assert [(row["name"], row["objects"]) for row in document["per_class"]] == [("object", 3)]
    assert {row["category_id"] for row in json.loads(Path(document["detections"]).read_text())} == {0}


def test_flaws_in_the_data_are_named_and_strict_data_stops(folder, script, capsys):
    Path("labels/0.txt").write_text("7 0.3 0.4 0.2 0.3\n")
    script.main([*FLAGS, "--json"])
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 2
    assert "labels/0.txt:1" in err
    with pytest.raises(SuiteError, match="--strict-data"):
        script.main([*FLAGS, "--strict-data"])


BAD = (
    (("--cfg", "a.cfg"), "--data"),
    (("--data", "none.data", "--cfg", "a.cfg", "--weights", "a.weights"), "none.data"),
    (("--data", "lost.data", *FLAGS[2:]), "lost.txt"),
    (("--data", "set.data", "--cfg", "none.cfg"), "none.cfg"),
    (("--data", "set.data", "--cfg", "a.cfg", "--weights", "none.pt"), "none.pt"),
    (("--data", "set.data", "--cfg", "a.cfg", "--weights", "short.weights"), "short.weights"),
    (("--data", "set.data", "--cfg", "a.cfg"), "--weights left out"),
    (("--data", "set.data", "--weights", "a.weights"), "--cfg"),
    ((*FLAGS, "--split", "train"), "no train"),
    ((*FLAGS, "--img_size", "60"), "--img_size 60: not a multiple of 8"),
    ((*FLAGS, "--task", "benchmark", "--img_size", "64", "60"), "--img_size 60"),
    ((*FLAGS, "--img_size", "64", "64", "64"), "N or H W"),
    ((*FLAGS, "--threads", "100000"), "--threads: 100000 is above 256"),
    ((*FLAGS, "--save-json", "--task", "benchmark"), "--save-json"),
    ((*FLAGS, "--letterbox", "--stretch"), "--stretch"),
    ((*FLAGS, "--evaluator", "numpy"), "--evaluator: is no flag here; AP equals pycocotools' to the last digit"),
    ((*FLAGS, "--max-nms", "0"), "--max-nms: 0 is below 1"),
)
"""Flags, and a piece of what is said of them."""


def test_bad_input_is_one_line_and_status_2_without_torch_or_a_file(folder, refusals):
    Path("lost.data").write_text("valid = lost.txt\nnames = set.names\n")
    Path("short.weights").write_bytes(Path("a.weights").read_bytes()[:-4])
    before = tree()
    lines = refusals(*(("test.py", *flags) for flags, _ in BAD))
    for line, (flags, message) in zip(lines, BAD, strict=True):
        assert message in line, flags
    assert tree() == before
