"""Pictures of pruning: they are drawn for networks of any depth and cuts anywhere, and their numbers are right."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from utils.report import pruning_plots
from utils.report.figures import BLUE, GREY
from utils.report.pruning_plots import CHAIN_COLOURS, LayerBar, plot_channels, plot_threshold


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in their order."""
    figures, save = [], pruning_plots.save
    monkeypatch.setattr(pruning_plots, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def size(path) -> tuple[int, int]:
    """Width and height of a picture that shows something."""
    image = cv2.imread(str(path))
    assert image.std() > 1
    return image.shape[1], image.shape[0]


def layers(count: int) -> list[LayerBar]:
    """Widths from 16 to 1024; every third layer in one of the chains, every seventh no candidate, one unit removed."""
    return [
        LayerBar(block=2 * n, before=16 << n % 7, after=1 + n % 16, chain=n // 20 if n % 3 == 0 else None,
                 candidate=n % 7 != 6, removed=n in (3, 4))
        for n in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "width"), [(0, 840), (1, 840), (11, 840), (107, 2868)])
def test_the_picture_is_as_wide_as_the_network_is_deep(tmp_path, recwarn, count, width):
    plot_channels(layers(count), tmp_path / "channels.png")
    assert size(tmp_path / "channels.png") == (width, 600)
    assert not recwarn.list


def test_the_numbers_count_a_removed_unit_as_gone(tmp_path, drawn):
    """32 + 64 + 64 channels, of which 9 + 64 stay."""
    bars = [LayerBar(0, 32, 9, None, True, False), LayerBar(1, 64, 64, 0, True, False),
            LayerBar(4, 64, 5, 0, True, True)]  # fmt: skip
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
    assert pruning_plots._tints(bars) == [BLUE, CHAIN_COLOURS[0], CHAIN_COLOURS[1], CHAIN_COLOURS[0], GREY]


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
