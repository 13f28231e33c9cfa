"""What raw head values mean."""

from __future__ import annotations

import pytest
import torch

from tests.nets import tiny
from utils.darknet.blocks import Yolo
from utils.detection.decode import decode


def head_with(values: tuple[float, ...], column: int, row: int) -> torch.Tensor:
    head = torch.zeros(1, 6, 26, 26)
    head[0, :, row, column] = torch.tensor(values)
    return head


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"scale_x_y": 1.1}, (0.2, -0.4, 0.1, -0.3), (88.87708, 118.26310, 83.99299, 40.74500)),
        (
            {"scale_x_y": 2.0, "new_coords": True},
            tuple(torch.sigmoid(torch.tensor((0.2, -0.4, 0.1, -0.3))).tolist()),
            (89.59469, 116.84200, 83.78336, 39.84181),
        ),
        (  # the 2 of width and height is no scale_x_y
            {"scale_x_y": 1.05, "new_coords": True},
            tuple(torch.sigmoid(torch.tensor((0.2, -0.4, 0.1, -0.3))).tolist()),
            (88.83721, 118.34204, 83.78336, 39.84181),
        ),
    ],
    ids=["scale_x_y", "new_coords", "new_coords and scale_x_y"],
)
def test_box_has_its_worked_value(options, values, expected):
    """26 × 26 cells of a 416 input, cell (5, 7), anchor (76, 55)."""
    yolo = Yolo(mask=(0,), anchors=((76.0, 55.0),), classes=1, **options)
    head = head_with((*values, 0.0, 0.0), 5, 7)
    rows = decode([head], [yolo], (416, 416)).view(26, 26, 6)
    torch.testing.assert_close(rows[7, 5, :4], torch.tensor(expected), rtol=0, atol=1e-3)


def test_rows_run_through_heads_anchors_rows_columns():
    network = tiny()
    heads = [torch.zeros(1, 21, 8, 8), torch.zeros(1, 21, 16, 16)]
    heads[1].view(1, 3, 7, 16, 16)[0, 2, 4, 5, 9] = 8.0
    rows = decode(heads, network.yolos, (64, 64))
    assert rows.shape == (1, 3 * 64 + 3 * 256, 7)
    assert rows[0, :, 4].argmax().item() == 192 + 2 * 256 + 5 * 16 + 9


def test_a_network_input_that_is_not_square_has_two_strides_at_most_one_pixel_apart():
    yolo = Yolo(mask=(0,), anchors=((8.0, 8.0),), classes=1)
    rows = decode([torch.zeros(1, 6, 4, 6)], [yolo], (32, 48)).view(4, 6, 6)
    assert rows[3, 5, :2].tolist() == [44.0, 28.0]


def test_no_box_is_infinite():
    yolo = Yolo(mask=(0,), anchors=((8.0, 8.0),), classes=1)
    assert torch.isfinite(decode([torch.full((1, 6, 4, 4), 1e6)], [yolo], (32, 32))).all()
