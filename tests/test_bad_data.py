"""Whatever a data set is, a training ends in weights or in one line that says what is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.nets import TINY, conv, one_head, tiny
from utils.errors import CfgError, DataError, InputError
from utils.training.settings import TrainSettings
from utils.training.workflow import check_batches

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def data(folder, tmp_path):
    """A copy of the nine pictures, to be spoilt; d.data names them."""
    return Path(shutil.copytree(folder, tmp_path / "data"))


def summary(lines: list[str]) -> str:
    """What the last training says of its pictures."""
    return [line for line in lines if line.startswith("train: ")][-1]


def listed(data: Path, split: str, *names: str) -> None:
    (data / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def trained(run, data: Path, *flags: str) -> dict:
    document = run("--epochs", "1", "--data", str(data / "d.data"), *flags)
    assert Path(document["best"]).is_file()
    return document


def refused(run, data: Path, match: str, *flags: str, error: type[InputError] = DataError) -> None:
    """The run ends in one line, and leaves no run directory."""
    with pytest.raises(error, match=match) as caught:
        run("--epochs", "1", "--data", str(data / "d.data"), *flags)
    assert "\n" not in str(caught.value)
    assert not list((data.parent / "runs").glob("*"))


# What cannot be trained on


@pytest.mark.parametrize(
    ("split", "match"),
    [("train", r"train\.txt: none of 0 images can be used; it names no image"), ("val", r"val\.txt: none of 0")],
)
def test_an_empty_list_is_refused(split, match, run, data):
    listed(data, split)
    refused(run, data, match)


def test_a_cfg_of_fewer_classes_is_adapted_and_labels_keep_to_the_names(run, data, lines):
    cfg = data / "one.cfg"
    cfg.write_text(TINY.replace("filters=21", "filters=18").replace("classes=2", "classes=1"))
    trained(run, data, "--cfg", str(cfg))
    (data / "labels" / "3.txt").write_text("2 0.5 0.5 0.2 0.2\n")
    trained(run, data, "--cfg", str(cfg), "--name", "beyond")
    assert "class beyond names: 1" in summary(lines)


def test_no_training_list_is_refused(run, data):
    (data / "d.data").write_text("names=d.names\nvalid=val.txt\n")
    refused(run, data, "names no training images; add a line train = ")


# What can


def test_a_set_of_one_picture_trains(run, data):
    for split in ("train", "val"):
        listed(data, split, "images/1.png")
    trained(run, data)


def test_backgrounds_in_the_validation_list_only_leave_nothing_to_find(run, data):
    for number in range(3):
        (data / "labels" / f"{number}.txt").write_text("")
    document = trained(run, data, "--epochs", "2")
    assert (document["map50"], document["best_epoch"]) == (0, 2), "none of the epochs is better than another"


def test_a_batch_larger_than_the_set_is_the_set(run, data):
    trained(run, data, "--batch-size", "64")


NAMES = (
    "with blanks.png",
    'it\'s "quoted".png',
    "слон-象.png",
    "-dash.png",
    "$(touch x).png",
    "per%cent*[1].png",
    "#.png",
)


def test_every_file_name_trains(run, data, lines):
    for number, name in enumerate(NAMES):
        (data / "images" / f"{number}.png").rename(data / "images" / name)
        (data / "labels" / f"{number}.txt").rename(data / "labels" / (name.removesuffix(".png") + ".txt"))
    listed(data, "train", *(f"images/{name}" for name in NAMES))
    listed(data, "val", f"images/{NAMES[0]}")
    trained(run, data)
    assert "\n" not in summary(lines), "a flaw"


# Batches of one picture


def test_one_picture_a_batch_trains_where_every_map_has_several_cells(run, data):
    trained(run, data, "--batch-size", "1")


@pytest.mark.parametrize("flags", [(), ("--rect",), ("--img_size", "8", "64")], ids=["size", "rect", "sizes"])
def test_one_picture_a_batch_and_one_cell_a_map_is_refused(flags, run, data):
    """At 8 x 8 the coarsest head of stride 8 has one cell; the size of a run that varies is its smallest."""
    size = () if "--img_size" in flags else ("--img_size", "8")
    message = r"n\.cfg: block 6 has 1 x 1 cells at 8 x 8, and a batch has one image"
    refused(run, data, message, "--batch-size", "1", *size, *flags, error=InputError)


def test_a_last_batch_of_one_picture_is_no_batch_of_its_own(run, data):
    trained(run, data, "--batch-size", "4", "--img_size", "8")


def test_the_pictures_of_one_process_count():
    shapes = np.array([[64, 64]])
    small = TrainSettings(size=(8, 8), test_size=(8, 8))
    with pytest.raises(InputError, match="block 6"):
        check_batches(tiny(), small, shapes)
    check_batches(tiny(), small, np.repeat(shapes, 2, 0))
    with pytest.raises(InputError, match="block 6"):
        check_batches(tiny(), small, np.repeat(shapes, 3, 0), processes=2)


@pytest.mark.parametrize("flags", [{"sizes": (16, 64)}, {"rect": True}])
def test_inputs_that_are_smaller_than_a_window_are_refused_before_the_training(flags):
    """A window of 5 cells at stride 4: 64 x 64 gives 16 x 16 cells, 64 x 16 only 16 x 4."""
    network = one_head(conv(4, 5, stride=4, pad=1), conv(4, 5), width=64)
    settings = TrainSettings(size=(64, 64), test_size=(64, 64), **flags)
    with pytest.raises(CfgError, match=r"block 1 .*the window reaches over 5 cells, but the input has 4"):
        check_batches(network, settings, np.array([[64, 64], [16, 64]]))
