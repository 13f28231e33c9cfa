"""Pictures are drawn whatever the figures are, and say what is in them; tables are aligned."""

from __future__ import annotations

import csv
import io
from functools import partial

import cv2
import numpy as np
import pytest

from utils.detection.average_precision import Evaluator
from utils.report import plots
from utils.report.plots import EDGES, LayerBar, front
from utils.report.tables import Column, csv_table, markdown_table, text_table

NAN = float("nan")
NAMES = ["disc", "_hidden", "$x^$", "雪", "a\nb", "a name much longer than an axis has room for"]


def size(path) -> tuple[int, int]:
    """Width and height of a picture that shows something; no unfinished file is left beside it."""
    image = cv2.imread(str(path))
    assert image.std() > 1 and not list(path.parent.glob(".*"))
    return image.shape[1], image.shape[0]


def texts(parts) -> list[str]:
    """Words of a legend, labels or numbers of a figure."""
    return [text.get_text() for text in (parts.get_texts() if hasattr(parts, "get_texts") else parts)]


def test_importing_the_plots_imports_no_matplotlib_and_drawing_no_pyplot(python, tmp_path):
    program = (
        "import sys, numpy, pathlib\n"
        "from utils.report import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.plot_labels(numpy.zeros((0, 5)), ['a'], pathlib.Path({str(tmp_path / 'a.png')!r}))\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert python("-c", program).returncode == 0


def evaluated(objects: int):
    evaluator = Evaluator(NAMES)
    boxes = np.array([[8.0 * n, 0, 8 * n + 6, 6] for n in range(objects)]).reshape(-1, 4)
    classes = np.arange(objects) % len(NAMES)
    truth = np.concatenate([classes[:, None], boxes], axis=1)
    evaluator.add(boxes[1:], np.linspace(0.9, 0.1, objects)[1:], classes[1:], truth)
    return evaluator.result()


def epochs_of(count: int) -> dict:
    """Columns of any name, with gaps."""
    gaps = [NAN] * count
    results = {"epoch": list(range(count)), "box_loss": gaps, "cls_loss": [1.0] * count, "lr": [0.1] * count}
    return results | {"map50": [0.5] * count, "f1": gaps, "seconds": gaps, **{f"loss_{n}": gaps for n in range(5)}}


def course(epochs: int) -> tuple[dict, dict, dict]:
    """Tables of a sparse training whose accuracy has gaps."""
    accuracy = {"epoch": range(epochs), "map50": [NAN, 0.5] * (epochs // 2) + [NAN] * (epochs % 2)}
    pressure = {name: [0.5] * epochs for name in ("epoch", "s", "plan", "weak")}
    return accuracy, {"epoch": range(epochs), "0.01": [0.5] * epochs}, pressure


def labels(count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, 5)) * [len(NAMES), 1, 1, 1, 1]


def confusion(classes: int) -> tuple[np.ndarray, list[str]]:
    matrix = np.zeros((classes + 1, classes + 1), int)
    matrix[0, 0] = 3
    return matrix, [f"class {n}" for n in range(classes)]


def bimodal(share: float, count: int = 500) -> np.ndarray:
    """[60 + 1] counts of |γ|, of which a share is tiny, some of it 0."""
    rng = np.random.default_rng(0)
    tiny = np.where(rng.random(count) < 0.3, 0, 10 ** rng.normal(-4, 0.5, count))
    return np.histogram(np.where(rng.random(count) < share, tiny, rng.normal(1, 0.2, count)), EDGES)[0]


def layers(count: int) -> list[LayerBar]:
    """Widths from 16 to 1024; every third layer in one of the chains, every seventh no candidate, one unit removed."""
    return [
        LayerBar(2 * n, 16 << n % 7, 1 + n % 16, n // 20 if n % 3 == 0 else None, n % 7 != 6, n in (3, 4))
        for n in range(count)
    ]


def points(count: int, seed: int = 0) -> list[dict]:
    """Networks of three families that cost 1 to 30 times as much, the dearer ones better on the whole."""
    rng = np.random.default_rng(seed)
    cost = np.exp(rng.uniform(0, np.log(30), count))
    ap50 = 0.6 + 0.08 * np.log(cost) + rng.normal(0, 0.03, count)
    networks = []
    for n, (c, a) in enumerate(zip(cost, ap50, strict=True)):
        accuracy = {"map50": a, "low": a - 0.03, "high": a + 0.02}
        costs = {"parameters": int(3e5 * c), "macs": int(1e8 * c), "ms": 4 * c}
        names = {"name": f"yolov4-tiny slim {n}", "number": n + 1, "family": f"family {n % 3}"}
        networks.append({**names, **accuracy, **costs})
    return networks


def odd(networks: list[dict]) -> list[dict]:
    """And the same with names that matplotlib hides or takes for mathematics, and intervals of one side."""
    return networks + [{**p, "name": f"_{p['name']} $x^", "low": p["high"], "family": ""} for p in networks]


NO_GAMMAS, GAMMAS = np.zeros((2, 61)), (bimodal(0.1), bimodal(0.9))


@pytest.mark.parametrize(
    ("draw", "content", "expected"),
    [
        (plots.plot_results, (epochs_of(0),), None),
        *((partial(plots.plot_results, best_epoch=0), (epochs_of(epochs),), None) for epochs in (1, 3)),
        *((plots.plot_labels, (labels(count), NAMES), None) for count in (0, 1, 30_001)),
        *((draw, (evaluated(n),), None) for draw in (plots.plot_pr_curve, plots.plot_f1_curve) for n in (0, 12)),
        *((plots.plot_confusion, confusion(classes), None) for classes in (1, 80)),
        (plots.plot_confusion, (np.eye(len(NAMES) + 1, dtype=int), NAMES), None),
        *((plots.plot_gamma_change, counts, (1080, 576)) for counts in (GAMMAS, NO_GAMMAS)),
        *((plots.plot_gamma_epochs, ([0, 1], counts), None) for counts in (GAMMAS, NO_GAMMAS)),
        *((partial(plots.plot_sparse_course, turn=2.5), course(epochs), None) for epochs in (0, 1, 6)),
        (plots.plot_sparse_course, ({"epoch": range(2)}, course(2)[1], {}), None),
        *((plots.plot_channels, (layers(n),), (width, 600)) for n, width in ((0, 840), (11, 840), (107, 2868))),
        *((plots.plot_pareto, (odd(points(count)),), (1800, 720)) for count in (0, 1, 25)),
        (plots.plot_pareto, ([points(1)[0]] * 3,), (1800, 720)),
    ],
)
def test_any_figures_are_drawn(tmp_path, recwarn, draw, content, expected):
    """No epochs, gaps, no objects, empty rows, names of any script. A picture is as wide as the network is deep."""
    draw(*content, tmp_path / "a.png")
    assert size(tmp_path / "a.png") == expected or expected is None
    assert not recwarn.list


def test_the_confusion_has_counts(tmp_path, drawn):
    plots.plot_confusion([[37, 0, 1], [0, 400, 0], [0, 2, 0]], NAMES[:2], tmp_path / "a.png")
    assert texts(drawn[0].axes[0].texts) == ["37", "1", "400", "2"]


def test_the_title_says_how_many_fell(tmp_path, drawn):
    """Of 4 the bins below 0.01 hold 2 and 1: the first, and the last that ends there."""
    before, after = np.zeros((2, 61), int)
    before[[31, -1]], after[[0, 30, 31]] = [1, 3], [2, 1, 1]
    plots.plot_gamma_change(before, after, tmp_path / "change.png")
    assert drawn[0].axes[0].get_title() == "|γ| below 0.01: 0.0 % before → 75.0 % after"


def test_an_epoch_is_a_column_of_the_map_and_the_turn_a_line(tmp_path, drawn):
    counts = [bimodal(share) for share in np.linspace(0, 1, 6)]
    plots.plot_gamma_epochs(range(1, 7), counts, tmp_path / "epochs.png", turn=3.4)
    ax, _ = drawn[0].axes
    assert ax.collections[0].get_array().tolist() == np.transpose(counts).tolist()
    assert (ax.get_xlim(), ax.get_yscale()) == ((0.5, 6.5), "log")
    assert texts(ax.get_yticklabels())[:2] == ["< 1e-05", "0.0001"]
    assert texts(ax.get_legend()) == ["rate turns"] and ax.lines[0].get_xdata()[0] == 3.4


def test_the_numbers_count_a_removed_unit_as_gone(tmp_path, drawn):
    """32 + 64 + 64 channels, of which 9 + 64 stay; then of 64 none."""
    looks = [(0, 32, 9, None, True, False), (1, 64, 64, 0, True, False), (4, 64, 0, 0, True, True)]
    plots.plot_channels([LayerBar(*look) for look in looks], tmp_path / "channels.png")
    (ax,) = drawn[0].axes
    assert ax.get_title() == "channels: 160 → 73, 45.6 % stay"
    assert texts(ax.texts) == ["9/32", "64", "0/64"]
    assert texts(ax.get_xticklabels()) == ["0", "1", "4"]
    (legend,) = drawn[0].legends
    assert texts(legend) == ["stays", "goes", "unit removed whole", "not tied", "2 tied, blocks 1–4"]
    plots.plot_channels([LayerBar(n, 16, 0, 0, True, True) for n in range(4)], tmp_path / "channels.jpg")
    assert drawn[1].axes[0].get_title() == "channels: 64 → 0, 0.0 % stay" and size(tmp_path / "channels.jpg")


def test_the_cut_is_at_the_weakest_that_the_ranking_keeps(tmp_path, drawn):
    plots.plot_threshold([0.5, 0.0, 2.0, 0.25], 2, tmp_path / "threshold.png")
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
    plots.plot_threshold(np.array(scores), removed, tmp_path / "threshold.png")
    assert drawn[0].axes[0].get_title() == title
    assert size(tmp_path / "threshold.png") == (1320, 600)
    assert not recwarn.list


def test_every_channel_is_in_the_histogram_once(tmp_path, drawn):
    scores = np.random.default_rng(0).lognormal(-3, 2, 1000)
    plots.plot_threshold(scores, 700, tmp_path / "threshold.png")
    (above,) = [patch for patch in drawn[0].axes[1].patches if patch.get_label() == "above: 300"]
    values, _, baseline = above.get_data()
    assert values.sum() == 1000 and (values - baseline).sum() == 300


@pytest.mark.parametrize("seed", range(3))
def test_a_point_is_on_the_front_unless_another_is_as_good_in_both_and_better_in_one(seed):
    rng = np.random.default_rng(seed)
    costs, values = rng.integers(0, 9, (2, 30)).tolist()
    best = {
        (c, v)
        for c, v in zip(costs, values, strict=True)
        if not any(a <= c and b >= v and (a, b) != (c, v) for a, b in zip(costs, values, strict=True))
    }
    numbers = front(costs, values)
    assert {(costs[number], values[number]) for number in numbers} == best and len(numbers) == len(best)
    assert front([], []) == []


def test_the_line_of_the_front_is_a_stair_to_the_right_edge(tmp_path, drawn):
    costs, values = [1.0, 2, 5], [0.5, 0.4, 0.8]
    shown = [{**points(1)[0], "ms": ms, "map50": ap50} for ms, ap50 in zip(costs, values, strict=True)]
    plots.plot_pareto(shown, tmp_path / "pareto.png")
    ax = drawn[0].axes[2]
    (line,) = [line for line in ax.lines if line.get_label() == "front"]
    assert line.get_xydata().tolist() == [[1, 0.5], [5, 0.8], [ax.get_xlim()[1], 0.8]]
    assert line.get_drawstyle() == "steps-post"


def test_three_panels_share_the_accuracy_and_show_every_cost(tmp_path, drawn):
    networks = points(6)
    plots.plot_pareto(networks, tmp_path / "pareto.png")
    axes = drawn[0].axes
    assert [ax.get_xlabel() for ax in axes] == ["million parameters", "GMACs", "ms an image"]
    assert len({ax.get_ylim() for ax in axes}) == 1
    for ax, (key, _, unit) in zip(axes, plots.PANELS, strict=True):
        marks = np.vstack([line.get_xydata() for line in ax.lines if line.get_label() != "front"])
        assert sorted(map(tuple, marks)) == sorted((point[key] / unit, point["map50"]) for point in networks)
        bars = np.vstack([np.array(lines.get_segments())[:, :, 1] for lines in ax.collections])
        assert sorted(map(tuple, bars)) == sorted((point["low"], point["high"]) for point in networks)
        assert texts(ax.texts) == [str(number) for number in range(1, 7)]
    (legend,) = drawn[0].legends
    assert texts(legend) == [*(f"{n} {point['name']}" for n, point in enumerate(networks, 1)), "front"]


def test_no_average_precision_is_negative_and_what_has_no_time_is_in_no_panel_of_times(tmp_path, drawn):
    low = [{**point, "map50": 0.001, "low": 0.0, "high": 0.003, "ms": None} for point in points(2)]
    plots.plot_pareto([*low, {**low[0], "ms": 1.0}], tmp_path / "pareto.png", "onnxruntime 1")
    axes = drawn[0].axes
    assert axes[0].get_ylim()[0] == 0 and axes[2].get_xlabel() == "ms an image, onnxruntime 1"
    assert [len(ax.texts) for ax in axes] == [3, 3, 1]


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
