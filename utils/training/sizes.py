"""The sizes of a run's pictures, from --img_size, --multi-scale and --rect; no torch."""

from __future__ import annotations

import argparse

from utils.cli import LARGEST_SIDE, input_size
from utils.errors import InputError

MULTI_SCALE = (0.67, 1.5)
"""Smallest and largest side of --multi-scale relative to --img_size, as in the suites this one follows."""


def input_sizes(
    args: argparse.Namespace, default: tuple[int, int], stride: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int] | None]:
    """Size of a training picture, of a test picture, and the range of a multi-scale run, from --img_size."""
    given = args.img_size or []
    if args.rect and (args.multi_scale or len(given) > 1):
        raise InputError("--rect: batches take their shape from their pictures; leave out --multi-scale and MIN MAX")
    if len(given) > 3:
        raise InputError(f"--img_size: takes N or MIN MAX [TEST]; got {len(given)} numbers")
    for side in given:
        input_size([side], stride, default)
    if len(given) < 2:
        size = (given[0], given[0]) if given else default
        if not args.multi_scale:
            return size, size, None
        low, high = (round(max(size) * share / stride) * stride for share in MULTI_SCALE)
        return size, size, (max(stride, low), min(LARGEST_SIDE, high))
    if args.multi_scale:
        raise InputError("--multi-scale: --img_size MIN MAX gives the range already; leave one of them out")
    low, high, test = given[0], given[1], given[-1]
    if low > high:
        raise InputError(f"--img_size {low} {high}: MIN is above MAX")
    return (high, high), (test, test), (low, high)
