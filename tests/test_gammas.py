"""Pictures of sparse training: they are drawn whatever the histograms hold, and say what is in them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.test_plots import size
from utils.report.gammas import plot_gamma_change, plot_gamma_epochs, plot_sparse_course, share_below

EDGES = np.concatenate([[0], np.geomspace(1e-5, 10, 61)])
NAN = float("nan")


def bimodal(share: float, count: int = 500) -> np.ndarray:
    """[60 + 1] counts of |γ|, of which a share is tiny, some of it 0."""
    rng = np.random.default_rng(0)
    tiny = np.where(rng.random(count) < 0.3, 0, 10 ** rng.normal(-4, 0.5, count))
    return np.histogram(np.where(rng.random(count) < share, tiny, rng.normal(1, 0.2, count)), EDGES)[0]


def test_the_share_below_a_limit_is_exact_at_edges_and_lies_between_elsewhere():
    """2 + 1 of 8 are below 0.01; halfway in the logarithm to 0.1 half of the next 4 are added."""
    edges, counts = [0, 0.001, 0.01, 0.1, 1], [2, 1, 4, 1]
    assert share_below(edges, counts, 0.01) == pytest.approx(3 / 8)
    assert share_below(edges, counts, 10**-1.5) == pytest.approx(5 / 8)
    assert share_below(edges, counts, 0.001) == 2 / 8
    assert np.isnan(share_below(edges, [0] * 4, 0.01))


def test_the_title_says_how_many_fell(tmp_path, drawn):
    before, after = np.zeros((2, 61), int)
    before[-1], after[[0, -1]] = 4, [3, 1]
    plot_gamma_change(EDGES, before, after, tmp_path / "change.png")
    assert drawn[0].axes[0].get_title() == "|γ| below 0.01: 0.0 % before → 75.0 % after"
    assert size(tmp_path / "change.png") == (1080, 576)


@pytest.mark.parametrize(
    ("edges", "before", "after"),
    [(EDGES, bimodal(0.1), bimodal(0.9)), (EDGES, np.zeros(61), np.zeros(61)), ([0, 1], [3], [0])],
    ids=["bimodal", "no γ", "one bin"],
)
def test_any_histograms_are_drawn(tmp_path, recwarn, edges, before, after):
    plot_gamma_change(edges, before, after, tmp_path / "change.png")
    plot_gamma_epochs([0, 1], edges, [before, after], tmp_path / "epochs.png")
    assert size(tmp_path / "change.png") and size(tmp_path / "epochs.png")
    assert not recwarn.list


def test_an_epoch_is_a_column_of_the_map_and_the_turn_a_line(tmp_path, drawn):
    counts = [bimodal(share) for share in np.linspace(0, 1, 6)]
    plot_gamma_epochs(range(1, 7), EDGES, counts, tmp_path / "epochs.png", turn=3.4)
    ax, _ = drawn[0].axes
    assert ax.collections[0].get_array().tolist() == np.transpose(counts).tolist()
    assert (ax.get_xlim(), ax.get_yscale()) == ((0.5, 6.5), "log")
    assert [label.get_text() for label in ax.get_yticklabels()][:2] == ["< 1e-05", "0.0001"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rate turns"]
    assert ax.lines[0].get_xdata()[0] == 3.4


@pytest.mark.parametrize("epochs", [0, 1, 6])
def test_the_course_is_drawn_with_gaps_and_without_accuracy(tmp_path, recwarn, epochs):
    results = {"epoch": range(epochs), "map50": [NAN, 0.5] * (epochs // 2) + [NAN] * (epochs % 2)}
    plot_sparse_course(results, tmp_path / "course.png", turn=2.5, shares={"0.01": [0.5] * epochs})
    plot_sparse_course({"epoch": range(epochs)}, tmp_path / "bare.png")
    assert size(tmp_path / "course.png")[1] > size(tmp_path / "bare.png")[1]
    assert not recwarn.list


def test_the_course_names_its_lines(tmp_path, drawn):
    results = {"epoch": [1, 2], "map50": [0.1, 0.2], "map50_95": [0.0, 0.1]}
    shares = {limit: [0.0, 0.5] for limit in ("0.1", "0.01", "0.001")}
    pressure = {"epoch": [0, 1, 2], "s": [0, 3, 0], "plan": [0, 0.2, 0.5], "weak": [0, 0.1, 0.5]}
    plot_sparse_course(results, tmp_path / "course.png", turn=1, shares=shares, pressure=pressure)
    top, bottom, s = ([text.get_text() for text in ax.get_legend().get_texts()] for ax in drawn[0].axes)
    assert top == ["AP50", "AP50-95", "rate turns"]
    assert bottom == ["|γ| < 0.1", "|γ| < 0.01", "|γ| < 0.001", "weak", "weak by the plan", "rate turns"]
    assert s == ["s", "rate turns"] and drawn[0].axes[2].get_ylim()[1] > 3
