"""The picture of accuracy and cost: the front is right, and names stand beside their marks, not on each other."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from matplotlib.text import Text

from utils.report import pareto_plots
from utils.report.pareto_plots import ParetoPoint, front, plot_pareto


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in their order."""
    figures, save = [], pareto_plots.save
    monkeypatch.setattr(pareto_plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


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


def names(figure) -> list[np.ndarray]:
    """For each panel [N, 4], where the names stand in pixels, without the lines that lead to them."""
    return [np.array([Text.get_window_extent(text).extents for text in ax.texts]) for ax in figure.axes]


def shared(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N, M], areas that boxes have in common."""
    low, high = (pick(boxes[:, None, part], others[None, :, part]) for pick, part in (
        (np.maximum, slice(0, 2)), (np.minimum, slice(2, 4))))  # fmt: skip
    return (high - low).clip(0).prod(2)


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


def test_the_line_of_the_front_is_a_stair_to_the_right_edge():
    corners = pareto_plots._stairs(np.array([1.0, 2, 5]), np.array([0.5, 0.4, 0.8]), 9.0)
    assert corners.tolist() == [[1, 0.5], [5, 0.5], [5, 0.8], [9, 0.8]]


def test_three_panels_share_the_accuracy_and_show_every_cost(tmp_path, drawn, recwarn):
    given = points(6)
    plot_pareto(given, tmp_path / "pareto.png")
    assert cv2.imread(str(tmp_path / "pareto.png")).shape == (720, 1920, 3)
    axes = drawn[0].axes
    assert [ax.get_xlabel() for ax in axes] == ["million parameters", "GMACs", "ms a picture"]
    assert len({ax.get_ylim() for ax in axes}) == 1
    for ax, costs in zip(axes, ([p.parameters / 1e6 for p in given], [p.macs / 1e9 for p in given],
                                [p.ms for p in given]), strict=True):  # fmt: skip
        marks = np.vstack([line.get_xydata() for line in ax.lines if line.get_label().startswith("family")])
        assert sorted(map(tuple, marks)) == sorted(zip(costs, [p.ap50 for p in given], strict=True))
        bars = np.vstack([np.array(lines.get_segments())[:, :, 1] for lines in ax.collections])
        assert sorted(map(tuple, bars)) == sorted((p.low, p.high) for p in given)
        assert [text.get_text() for text in ax.texts] == [p.name for p in given]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["front", "family 0", "family 1", "family 2"]
    assert not recwarn.list


@pytest.mark.parametrize("seed", range(3))
def test_the_names_of_ten_points_stand_apart_from_each_other_and_from_the_marks(tmp_path, drawn, seed):
    given = points(10, seed)
    plot_pareto(given, tmp_path / "pareto.png")
    for ax, boxes in zip(drawn[0].axes, names(drawn[0]), strict=True):
        frame = np.array([ax.bbox.extents])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        assert np.triu(shared(boxes, boxes), 1).sum() < 0.02 * area.sum()
        assert shared(boxes, frame)[:, 0] == pytest.approx(area)
        marks = np.vstack([ax.transData.transform(line.get_xydata()) for line in ax.lines
                           if line.get_label().startswith("family")])  # fmt: skip
        assert shared(boxes, np.hstack([marks - 3, marks + 3])).sum() < 0.02 * area.sum()


def test_a_name_is_beside_its_mark_where_nothing_else_is(tmp_path, drawn):
    plot_pareto([points(1)[0]], tmp_path / "pareto.png")
    ax, boxes = drawn[0].axes[2], names(drawn[0])[2]
    ((_, middle),) = ax.transData.transform([(points(1)[0].ms, points(1)[0].ap50)])
    assert abs((boxes[0, 1] + boxes[0, 3]) / 2 - middle) < 30
    assert ax.texts[0].arrow_patch is None


def test_families_look_different():
    count = len(pareto_plots.FAMILY_COLOURS) * len(pareto_plots.FAMILY_MARKERS)
    looks = {(n % len(pareto_plots.FAMILY_COLOURS), n % len(pareto_plots.FAMILY_MARKERS)) for n in range(count)}
    assert len(looks) == count == 56
    assert len(set(pareto_plots.FAMILY_COLOURS)) == len(pareto_plots.FAMILY_COLOURS)


@pytest.mark.parametrize(("most", "scale"), [(4, "linear"), (6, "log")])
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
