"""Drawn picture sets: what is in them, where they may lie, and how scenes are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from utils.data.toy import (
    MIN_VISIBLE,
    OUTLINES,
    ToyRecipe,
    _all_visible,
    _area,
    _cover,
    _tight_box,
    build,
    draw_scene,
    main,
)
from utils.errors import DataError, InputError

SMALL = ToyRecipe(train=3, val=2, size=96)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_recipes_draw_equal_sets_and_another_seed_another_one(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, ToyRecipe(3, 2, 96, seed))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pictures = [
        {data for name, data in contents(tmp_path / folder).items() if name.suffix == ".jpg"} for folder in "ac"
    ]
    assert len(pictures[0]) == 5  # the splits share no picture
    assert not pictures[0] & pictures[1]


def test_a_set_is_what_its_files_say(tmp_path):
    made = build(tmp_path / "set", SMALL)
    folder = tmp_path / "set"
    assert made.data == folder / "toy.data"
    assert made.data.read_text() == "classes=12\ntrain=train.txt\nvalid=val.txt\nnames=toy.names\n"
    assert (folder / "toy.names").read_text().split() == list(OUTLINES)
    boxes = 0
    for split, pictures in (("train", 3), ("val", 2)):
        lines = (folder / f"{split}.txt").read_text().splitlines()
        assert len(lines) == pictures
        for line in lines:
            assert cv2.imread(str(folder / line)).shape == (96, 96, 3)
            label = (folder / line.replace("images", "labels").replace(".jpg", ".txt")).read_text()
            boxes += len(label.splitlines())
    assert boxes == made.boxes > 0


def test_a_set_that_is_there_is_left_alone_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    drawn = build(tmp_path / "set", SMALL)
    (tmp_path / "set" / "labels" / ".ipynb_checkpoints").mkdir()  # Jupyter makes one where a file is opened
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = build(tmp_path / "set", SMALL)
    assert drawn.drawn and again == replace(drawn, drawn=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    "fill", [lambda output: (output / "mine").mkdir(parents=True), Path.touch, lambda output: output.symlink_to("no")]
)
def test_anything_else_is_refused_and_kept(tmp_path, fill):
    fill(tmp_path / "set")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="holds other files or is no folder; name a new folder with --output"):
        build(tmp_path / "set", SMALL)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_or_a_changed_set_is_refused(tmp_path):
    build(tmp_path / "set", SMALL)
    with pytest.raises(DataError, match=r"holds another image set .*seed=0"):
        build(tmp_path / "set", ToyRecipe(3, 2, 96, seed=1))
    (tmp_path / "set" / "labels" / "val_00000.txt").write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(DataError, match=r"labels/val_00000.txt: missing or changed"):
        build(tmp_path / "set", SMALL)


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.toy._write_picture", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [{"train": 0}, {"val": 100_001}, {"size": 32}])
def test_a_recipe_out_of_range_is_refused(recipe):
    with pytest.raises(InputError, match="--"):
        ToyRecipe(**recipe)


def test_the_command_line_says_what_it_made(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "set"), "--train", "1", "--val", "1", "--size", "64"]
    main(arguments)
    assert "1 training and 1 validation images of 64 px, 12 classes" in capsys.readouterr().out
    main([*arguments, "--json"])
    assert '"drawn": false' in capsys.readouterr().out


@pytest.mark.parametrize("name", OUTLINES)
def test_an_outline_is_centred_and_fits_the_unit_circle(name):
    outer, *holes = OUTLINES[name]()
    assert np.linalg.norm(outer, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert np.abs((outer.min(0) + outer.max(0)) / 2).max() < 0.26  # a triangle's box is not centred on its circle
    assert all(np.linalg.norm(hole, axis=1).max() < np.linalg.norm(outer, axis=1).max() for hole in holes)


def test_the_area_of_an_outline_does_not_depend_on_where_it_lies():
    outline = tuple(contour * 20.3 + 31.7 for contour in OUTLINES["ring"]())
    inside = np.count_nonzero(_cover(outline, 64) >= 128)
    assert _area(outline) == inside == _area(tuple(contour - 30 for contour in outline))
    assert inside == pytest.approx(np.pi * 20.8**2 - np.pi * (0.58 * 20.3 - 0.5) ** 2, rel=0.05)


def test_every_label_lies_in_the_picture_and_all_classes_occur():
    scenes = [draw_scene(np.random.default_rng([7, index]), 96) for index in range(60)]
    rows = np.concatenate([rows for _, rows in scenes])
    assert set(rows[:, 0]) == set(range(len(OUTLINES)))
    low, high = rows[:, 1:3] - rows[:, 3:] / 2, rows[:, 1:3] + rows[:, 3:] / 2
    assert low.min() >= -1e-12 and high.max() <= 1 + 1e-12
    assert rows[:, 3:].min() * 96 >= 2
    assert any(len(rows) == 0 for _, rows in scenes) and max(len(rows) for _, rows in scenes) >= 6


def test_a_box_is_tight_around_the_pixels_that_are_seen():
    mask = np.zeros((10, 20), bool)
    mask[2, 3] = mask[6, 11] = True
    assert _tight_box(mask) == (7.5, 4.5, 9, 5)


def test_at_least_six_tenths_of_an_object_are_seen():
    assert MIN_VISIBLE == 0.6
    owner = np.zeros((10, 10), np.uint8)
    owner[:5, :4] = 1
    owner[5:, :6] = 2
    assert _all_visible(owner, [33, 50])
    assert not _all_visible(owner, [34, 50])
    assert not _all_visible(owner, [20, 30, 1])
