"""Pictures are drawn whatever the figures are, and say what is in them; tables are aligned."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest

from utils.detection.average_precision import Evaluator
from utils.report import plots
from utils.report.plots import (
    BLUE,
    COLOURS,
    GREY,
    MARKERS,
    LayerBar,
    ParetoPoint,
    front,
    plot_channels,
    plot_confusion,
    plot_f1_curve,
    plot_labels,
    plot_pareto,
    plot_pr_curve,
    plot_results,
    plot_threshold,
)
from utils.report.tables import Column, csv_table, markdown_table, text_table

NAMES = ["disc", "_hidden", "$x^$", "雪", "a\nb", "a name much longer than an axis has room for"]


def size(path) -> tuple[int, int]:
    """Width and height of a picture that shows something; no unfinished file is left beside it."""
    image = cv2.imread(str(path))
    assert image.std() > 1 and not list(path.parent.glob(".*"))
    return image.shape[1], image.shape[0]


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
        "from utils.report import gammas, plots\n"
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
    assert size(tmp_path / "results.png")


@pytest.mark.parametrize("count", [0, 1, 30_001])
def test_labels_are_drawn_whether_none_or_many(tmp_path, count):
    labels = np.random.default_rng(0).random((count, 5)) * [len(NAMES), 1, 1, 1, 1]
    plot_labels(labels, NAMES, tmp_path / "labels.jpg")
    assert size(tmp_path / "labels.jpg")


@pytest.mark.parametrize("objects", [0, 12])
def test_curves_are_drawn_with_and_without_objects(tmp_path, objects):
    metrics = evaluated(objects)
    plot_pr_curve(metrics, tmp_path / "PR_curve.png")
    plot_f1_curve(metrics, tmp_path / "F1_curve.png")
    assert size(tmp_path / "PR_curve.png") and size(tmp_path / "F1_curve.png")


@pytest.mark.parametrize("classes", [1, 80])
def test_a_confusion_matrix_is_drawn_even_with_empty_rows(tmp_path, classes):
    matrix = np.zeros((classes + 1, classes + 1), int)
    matrix[0, 0] = 3
    plot_confusion(matrix, [f"class {n}" for n in range(classes)], tmp_path / "confusion_matrix.png")
    assert size(tmp_path / "confusion_matrix.png")


def test_pictures_may_have_names_of_any_script(tmp_path, recwarn):
    plot_confusion(np.eye(len(NAMES) + 1, dtype=int), NAMES, tmp_path / "confusion_matrix.png")
    assert size(tmp_path / "confusion_matrix.png")
    assert not recwarn.list


def test_equal_data_draw_equal_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        plot_labels(np.full((3, 5), 0.5), NAMES, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def layers(count: int) -> list[LayerBar]:
    """Widths from 16 to 1024; every third layer in one of the chains, every seventh no candidate, one unit removed."""
    return [
        LayerBar(
            block=2 * n,
            before=16 << n % 7,
            after=1 + n % 16,
            chain=n // 20 if n % 3 == 0 else None,
            candidate=n % 7 != 6,
            removed=n in (3, 4),
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(("count", "width"), [(0, 840), (1, 840), (11, 840), (107, 2868)])
def test_the_picture_is_as_wide_as_the_network_is_deep(tmp_path, recwarn, count, width):
    plot_channels(layers(count), tmp_path / "channels.png")
    assert size(tmp_path / "channels.png") == (width, 600)
    assert not recwarn.list


def test_the_numbers_count_a_removed_unit_as_gone(tmp_path, drawn):
    """32 + 64 + 64 channels, of which 9 + 64 stay."""
    bars = [
        LayerBar(0, 32, 9, None, True, False),
        LayerBar(1, 64, 64, 0, True, False),
        LayerBar(4, 64, 5, 0, True, True),
    ]
    plot_channels(bars, tmp_path / "channels.png")
    (ax,) = drawn[0].axes
    assert ax.get_title() == "channels: 160 → 73, 45.6 % stay"
    assert [text.get_text() for text in ax.texts] == ["9/32", "64", "0/64"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "4"]
    (legend,) = drawn[0].legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["stays", "goes", "unit removed whole", "not tied", "2 tied, blocks 1–4"]


def test_chains_have_colours_of_their_own_and_what_may_not_go_is_grey():
    looks = [(None, True), (5, True), (9, True), (5, True), (9, False)]
    bars = [LayerBar(n, 8, 8, chain, candidate, False) for n, (chain, candidate) in enumerate(looks)]
    assert plots._tints(bars) == [BLUE, COLOURS[1], COLOURS[2], COLOURS[1], GREY]


@pytest.mark.parametrize(("widths", "scale"), [([16, 64], "linear"), ([16, 1024], "log")])
def test_the_axis_is_logarithmic_where_widths_differ_much(tmp_path, drawn, widths, scale):
    plot_channels([LayerBar(n, width, 1, None, True, False) for n, width in enumerate(widths)], tmp_path / "a.png")
    assert drawn[0].axes[0].get_yscale() == scale


def test_a_network_may_lose_everything(tmp_path, drawn):
    plot_channels([LayerBar(n, 16, 16, 0, True, True) for n in range(4)], tmp_path / "channels.jpg")
    assert drawn[0].axes[0].get_title() == "channels: 64 → 0, 0.0 % stay"
    assert size(tmp_path / "channels.jpg")


def test_the_cut_is_at_the_weakest_that_the_ranking_keeps(tmp_path, drawn):
    plot_threshold([0.5, 0.0, 2.0, 0.25], 2, tmp_path / "threshold.png")
    curve, histogram = drawn[0].axes
    assert curve.get_title() == "cut at rank 2 of 4 (50.0 %), where |γ| = 0.5"
    assert histogram.get_title() == "1 of the γ are 0"
    assert curve.get_yscale() == "log"
    (point,) = [line for line in curve.lines if line.get_marker() == "o"]
    assert point.get_xydata().tolist() == [[2, 0.5]]


@pytest.mark.parametrize(
    ("scores", "removed", "title"),
    [
        ([], 0, "no candidate channels"),
        ([0.5], 0, "cut at rank 0 of 1 (0.0 %), where |γ| = 0.5"),
        ([0.5], 1, "cut at rank 1 of 1 (100.0 %)"),
        ([0.0] * 30, 12, "cut at rank 12 of 30 (40.0 %), where |γ| = 0"),
        ([1e-30, 1.0], 1, "cut at rank 1 of 2 (50.0 %), where |γ| = 1"),
    ],
)
def test_any_scores_are_drawn(tmp_path, drawn, recwarn, scores, removed, title):
    plot_threshold(np.array(scores), removed, tmp_path / "threshold.png")
    assert drawn[0].axes[0].get_title() == title
    assert size(tmp_path / "threshold.png") == (1320, 600)
    assert not recwarn.list


def test_every_channel_is_in_the_histogram_once(tmp_path, drawn):
    scores = np.random.default_rng(0).lognormal(-3, 2, 1000)
    plot_threshold(scores, 700, tmp_path / "threshold.png")
    (above,) = [patch for patch in drawn[0].axes[1].patches if patch.get_label() == "above: 300"]
    values, _, baseline = above.get_data()
    assert values.sum() == 1000 and (values - baseline).sum() == 300


def test_a_cut_outside_the_ranking_is_refused(tmp_path):
    with pytest.raises(ValueError, match="removed 3: there are 2 candidate channels"):
        plot_threshold([0.1, 0.2], 3, tmp_path / "threshold.png")


def points(count: int, seed: int = 0) -> list[ParetoPoint]:
    """Networks of three families that cost 1 to 30 times as much, the dearer ones better on the whole."""
    rng = np.random.default_rng(seed)
    cost = np.exp(rng.uniform(0, np.log(30), count))
    ap50 = 0.6 + 0.08 * np.log(cost) + rng.normal(0, 0.03, count)
    return [
        ParetoPoint(
            f"yolov4-tiny slim {n}", f"family {n % 3}", a, a - 0.03, a + 0.02, int(3e5 * c), int(1e8 * c), 4 * c
        )
        for n, (c, a) in enumerate(zip(cost, ap50, strict=True))
    ]


def test_the_front_has_what_no_other_beats():
    """Cost 2 and 3 are beaten by cost 1; of the two of cost 4 the better one stays, and of two equal ones the first."""
    costs, values = [3, 1, 2, 4, 4, 6, 4], [0.4, 0.5, 0.5, 0.6, 0.7, 0.65, 0.7]
    assert front(costs, values) == [1, 4]
    assert front([], []) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_point_is_on_the_front_unless_another_is_as_good_in_both_and_better_in_one(seed):
    rng = np.random.default_rng(seed)
    costs, values = rng.integers(0, 9, (2, 30)).tolist()
    best = {
        (c, v)
        for c, v in zip(costs, values, strict=True)
        if not any(a <= c and b >= v and (a, b) != (c, v) for a, b in zip(costs, values, strict=True))
    }
    found = front(costs, values)
    assert {(costs[place], values[place]) for place in found} == best and len(found) == len(best)


def test_the_line_of_the_front_is_a_stair_to_the_right_edge(tmp_path, drawn):
    costs, values = [1.0, 2, 5], [0.5, 0.4, 0.8]
    shown = [replace(points(1)[0], ms=ms, ap50=ap50) for ms, ap50 in zip(costs, values, strict=True)]
    plot_pareto(shown, tmp_path / "pareto.png")
    ax = drawn[0].axes[2]
    (line,) = [line for line in ax.lines if line.get_label() == "front"]
    assert line.get_xydata().tolist() == [[1, 0.5], [5, 0.8], [ax.get_xlim()[1], 0.8]]
    assert line.get_drawstyle() == "steps-post"


def test_three_panels_share_the_accuracy_and_show_every_cost(tmp_path, drawn, recwarn):
    given = points(6)
    plot_pareto(given, tmp_path / "pareto.png")
    assert cv2.imread(str(tmp_path / "pareto.png")).shape == (720, 1800, 3)
    axes = drawn[0].axes
    assert [ax.get_xlabel() for ax in axes] == ["million parameters", "GMACs", "ms a picture"]
    assert len({ax.get_ylim() for ax in axes}) == 1
    for ax, costs in zip(
        axes, ([p.parameters / 1e6 for p in given], [p.macs / 1e9 for p in given], [p.ms for p in given]), strict=True
    ):
        marks = np.vstack([line.get_xydata() for line in ax.lines if line.get_label() != "front"])
        assert sorted(map(tuple, marks)) == sorted(zip(costs, [p.ap50 for p in given], strict=True))
        bars = np.vstack([np.array(lines.get_segments())[:, :, 1] for lines in ax.collections])
        assert sorted(map(tuple, bars)) == sorted((p.low, p.high) for p in given)
        assert [text.get_text() for text in ax.texts] == [str(number) for number in range(1, 7)]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *(f"{n + 1} {p.name}" for n, p in enumerate(given)),
        "front",
    ]
    assert not recwarn.list


def test_families_look_different():
    count = len(COLOURS) * len(MARKERS)
    assert len({(n % len(COLOURS), n % len(MARKERS)) for n in range(count)}) == count == 56
    assert len(set(COLOURS)) == len(COLOURS)


@pytest.mark.parametrize(("most", "scale"), [(7, "linear"), (8, "log")])
def test_the_axis_is_logarithmic_where_costs_differ_much(tmp_path, drawn, most, scale):
    one = points(1)[0]
    plot_pareto([one, replace(one, macs=most * one.macs)], tmp_path / "pareto.jpg")
    assert [ax.get_xscale() for ax in drawn[0].axes] == ["linear", scale, "linear"]
    assert (drawn[0].axes[1].get_xlim()[0] == 0) == (scale == "linear")


@pytest.mark.parametrize("given", [[], points(1), [points(1)[0]] * 3, points(25)], ids=["none", "one", "same", "many"])
def test_any_points_are_drawn(tmp_path, given, recwarn):
    odd = [replace(point, name=f"_{point.name} $x^", low=point.high, family="") for point in given]
    plot_pareto(given + odd, tmp_path / "pareto.png")
    assert cv2.imread(str(tmp_path / "pareto.png")).std() > 1
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"low": 0.9, "high": 0.8}, "ends before it begins"),
        ({"ms": 0.0}, "above 0"),
        ({"ms": float("nan")}, "above 0"),
        ({"low": float("nan")}, "ends before"),
    ],
)
def test_a_point_checks_itself(change, message):
    with pytest.raises(ValueError, match=message):
        replace(points(1)[0], **change)


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
