from __future__ import annotations

import csv
import io
import subprocess
import sys

import cv2
import numpy as np
import pytest

from utils.detection.average_precision import Evaluator
from utils.report.plots import plot_confusion, plot_f1_curve, plot_labels, plot_pr_curve, plot_results
from utils.report.tables import Column, csv_table, markdown_table, text_table

NAMES = ["disc", "_hidden", "$x^$", "雪", "a\nb", "a name much longer than an axis has room for"]


def is_picture(path) -> bool:
    image = cv2.imread(str(path))
    return image is not None and image.std() > 1 and not list(path.parent.glob(".*"))


def evaluated(objects: int):
    evaluator = Evaluator(NAMES)
    boxes = np.array([[8.0 * n, 0, 8 * n + 6, 6] for n in range(objects)]).reshape(-1, 4)
    classes = np.arange(objects) % len(NAMES)
    truth = np.concatenate([classes[:, None], boxes], axis=1)
    evaluator.add(boxes[1:], np.linspace(0.9, 0.1, objects)[1:], classes[1:], truth)
    return evaluator.result()


def test_importing_the_plots_imports_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    program = (
        "import sys, numpy, pathlib\n"
        "from utils.report import figures, gamma_plots, plots, pruning_plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.plot_labels(numpy.zeros((0, 5)), ['a'], pathlib.Path({str(tmp_path / 'a.png')!r}))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_results_are_drawn_with_gaps_and_columns_of_any_name(tmp_path, epochs):
    gaps = [float("nan")] * epochs
    results = {"epoch": list(range(epochs)), "box_loss": gaps, "cls_loss": [1.0] * epochs, "lr": [0.1] * epochs}
    results |= {"map50": [0.5] * epochs, "f1": gaps, "seconds": gaps, **{f"loss_{n}": gaps for n in range(5)}}
    plot_results(results, tmp_path / "results.png", best_epoch=0 if epochs else None)
    assert is_picture(tmp_path / "results.png")


@pytest.mark.parametrize("count", [0, 1, 30_001])
def test_labels_are_drawn_whether_none_or_many(tmp_path, count):
    labels = np.random.default_rng(0).random((count, 5)) * [len(NAMES), 1, 1, 1, 1]
    plot_labels(labels, NAMES, tmp_path / "labels.jpg")
    assert is_picture(tmp_path / "labels.jpg")


@pytest.mark.parametrize("objects", [0, 12])
def test_curves_are_drawn_with_and_without_objects(tmp_path, objects):
    metrics = evaluated(objects)
    plot_pr_curve(metrics, tmp_path / "PR_curve.png")
    plot_f1_curve(metrics, tmp_path / "F1_curve.png")
    assert is_picture(tmp_path / "PR_curve.png") and is_picture(tmp_path / "F1_curve.png")


@pytest.mark.parametrize("classes", [1, 80])
def test_a_confusion_matrix_is_drawn_even_with_empty_rows(tmp_path, classes):
    matrix = np.zeros((classes + 1, classes + 1), int)
    matrix[0, 0] = 3
    plot_confusion(matrix, [f"class {n}" for n in range(classes)], tmp_path / "confusion_matrix.png")
    assert is_picture(tmp_path / "confusion_matrix.png")


def test_pictures_may_have_names_of_any_script(tmp_path, recwarn):
    plot_confusion(np.eye(len(NAMES) + 1, dtype=int), NAMES, tmp_path / "confusion_matrix.png")
    assert is_picture(tmp_path / "confusion_matrix.png")
    assert not recwarn.list


def test_equal_data_draw_equal_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        plot_labels(np.full((3, 5), 0.5), NAMES, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_table_is_aligned_by_kind_and_width():
    columns = ["class", "boxes", Column("AP", ".2f")]
    rows = [("汉字", 1200, 0.5), ("a\nb", np.int64(3), np.float32(0.25)), ("c", None, None)]
    assert text_table(columns, rows).split("\n") == [
        "class  boxes    AP",
        "─────  ─────  ────",
        "汉字   1 200  0.50",
        r"a\nb       3  0.25",
        "c          –     –",
    ]


def test_markdown_says_the_same_and_escapes_its_bars():
    assert markdown_table(["a|b", "n"], [("x", 1), ("y|z", None)]).split("\n") == [
        r"| a\|b |   n |",
        r"| ---- | --: |",
        r"| x    |   1 |",
        r"| y\|z |   – |",
    ]


def test_a_table_may_have_no_rows_but_no_ragged_ones():
    assert text_table(["a", "b"], []) == "a  b\n─  ─"
    with pytest.raises(ValueError, match="1 cells; the table has 2 columns"):
        text_table(["a", "b"], [("x",)])


def test_csv_has_titles_quotes_what_needs_it_and_shows_nothing_as_an_empty_cell():
    table = csv_table(["name", "n"], [("a,b", 1), ('c"d', None), ("e\nf", 0.5)])
    assert table == 'name,n\n"a,b",1\n"c""d",\n"e\nf",0.5\n'
    assert list(csv.reader(io.StringIO(table)))[2] == ['c"d', ""]
    assert csv_table(["name"], []) == "name\n"
