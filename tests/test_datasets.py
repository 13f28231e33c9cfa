"""Samples and batches: every picture once, targets where the pixels are, the same with any workers; anchors."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import socket
from dataclasses import replace
from multiprocessing import active_children, get_context, resource_sharer

import numpy as np
import pytest
import torch

from tests.media import labelled, sample
from tests.nets import tiny
from utils.data import datasets
from utils.data.anchors import auto_anchors, box_sizes, cluster, fit_quality, shape_ious, used_anchors, with_anchors
from utils.data.augment import Augmentation
from utils.data.datasets import DetectionDataset, Request, make_loader, partners, rectangle
from utils.data.images import PackedBoxes, PackedPaths, write_image
from utils.data.index import Index, index
from utils.errors import DataError
from utils.flags import default_workers

EVERYTHING = Augmentation(degrees=10, shear=5, flip_ud=0.5, mixup=0.5, fence=0.5)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Nine grey pictures of several shapes, each with a white rectangle that is its box; class = number % 3.

    The even ones have an ignored box of class 2 - number % 3 in the same place.
    """
    root = tmp_path_factory.mktemp("data")
    (root / "ignored").mkdir()
    for number in range(9):
        height, width = 40 + 8 * (number % 4), 48 + 8 * (number % 3)
        image = np.full((height, width, 3), 20 * number, np.uint8)
        image[8:24, 16:40] = 255
        box = f"{28 / width} {16 / height} {24 / width} {16 / height}"
        labelled(root, f"{number}.png", image, f"{number % 3} {box}")
        if number % 2 == 0:
            (root / "ignored" / f"{number}.txt").write_text(f"{2 - number % 3} {box}")
    return index(root / "images", "abc", cache_dir=None)


def data_set(found, **options) -> DetectionDataset:
    return DetectionDataset(found, size=(64, 64), **options)


def epoch(dataset, batch_size=4, epoch=0, **options) -> list:
    dataset.epoch = epoch
    return list(make_loader(dataset, batch_size, **options))


def same(batch, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(batch[:4], other[:4], strict=True)) and batch.fits == other.fits


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
def test_targets_lie_where_the_pixels_are(found, mode):
    for position in range(len(found)):
        one = sample(data_set(found, mode=mode), position)
        ((_, cx, cy, width, height),) = one.targets * (1, 64, 64, 64, 64)
        rows, columns = np.nonzero(one.image[0] > 250)
        expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        got = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        np.testing.assert_allclose(got, expected, atol=1.5)


def test_sample_and_index_share_no_memory(found):
    before = [rows.copy() for rows in (*found.labels, *found.ignored)]
    for augment in (None, Augmentation()):
        one = sample(data_set(found, augment=augment), 0)
        one.targets[:] = one.ignored[:] = 9
        one.image[:] = 9
    assert all(np.array_equal(a, b) for a, b in zip(before, (*found.labels, *found.ignored), strict=True))


@pytest.mark.parametrize("augment", [None, Augmentation(), EVERYTHING], ids=["plain", "mosaic", "everything"])
def test_ignored_boxes_lie_where_labels_at_their_place_do(found, augment):
    """A picture's two boxes are one place: every ignored box that no cut has made small has a label that equals it."""
    seen = 0
    for position in range(len(found)):
        one = sample(data_set(found, augment=augment), position)
        assert one.ignored.dtype == np.float32 and (one.ignored[:, 1:] > 0).all()
        assert augment is not None or len(one.ignored) == (position % 2 == 0)
        for label, *box in one.ignored:
            same_place = [row for row in one.targets if np.allclose(row[1:], box, atol=1e-6)]
            assert any(row[0] == 2 - label for row in same_place) or min(box[2:]) < 0.1
            seen += len(same_place)
    assert seen >= 5


def test_ignored_boxes_change_nothing_about_samples(found):
    """A data set without them gives the same pictures and labels, bit for bit, and has another fingerprint."""
    without = replace(found, ignored=PackedBoxes([rows[:0] for rows in found.ignored]))
    for augment in (None, EVERYTHING):
        for position in range(len(found)):
            one, other = (sample(data_set(index, augment=augment), position) for index in (found, without))
            assert np.array_equal(one.image, other.image) and np.array_equal(one.targets, other.targets)
            assert one.targets.dtype == other.targets.dtype == np.float32 and not len(other.ignored)
    assert found.fingerprint() != without.fingerprint()


@pytest.mark.parametrize("cache", [None, "ram", "disk"])
@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("augment", [None, EVERYTHING], ids=["plain", "augmented"])
def test_batches_are_the_same_with_any_number_of_workers_and_any_cache(found, augment, rect, cache, tmp_path):
    dataset = data_set(found, augment=augment, rect=rect, cache=cache, cache_dir=tmp_path)
    alone = epoch(data_set(found, augment=augment, rect=rect), epoch=3, shuffle=True)
    for workers in (0, 1, 2):
        others = epoch(dataset, epoch=3, shuffle=True, workers=workers)
        assert len(alone) == len(others) and all(map(same, alone, others))


@pytest.mark.parametrize(
    ("count", "start", "batch", "first", "last"),
    [
        (202, 0, 16, 0, 64),
        (202, 48, 16, 0, 64),  # the pool of the batch before it
        (202, 64, 16, 64, 128),
        (202, 192, 10, 138, 202),  # as many at the end
        (202, 48, 48, 0, 96),  # the whole batch
        (300, 128, 128, 128, 256),
        (9, 8, 1, 0, 9),  # few pictures
    ],
)
def test_consecutive_batches_share_a_pool_of_partners(count, start, batch, first, last):
    assert list(partners(range(count), start, batch)) == list(range(first, last))


def test_a_picture_is_decoded_once_in_a_pool_and_mosaics_stay_in_it(found, monkeypatch):
    monkeypatch.setattr(datasets, "POOL", 4)
    dataset, reads, decoded = data_set(found, augment=Augmentation(mosaic=1, mixup=0.5)), [], []
    read, decode = dataset.store.read, dataset.store._decoded
    monkeypatch.setattr(dataset.store, "read", lambda position: reads.append(position) or read(position))
    monkeypatch.setattr(dataset.store, "_decoded", lambda position: decoded.append(position) or decode(position))
    for requests in make_loader(dataset, 2, shuffle=True).batch_sampler:
        reads.clear()
        dataset.__getitems__(requests)
        assert {request.position for request in requests} <= set(reads) <= set(requests[0].partners)
        assert len(requests[0].partners) == 2 + len(requests) and len(reads) >= 8  # the last batch has three
    assert len(decoded) <= 9 + 3  # the last pool begins within the one before


def test_workers_that_stay_alive_see_the_epoch(found):
    dataset = data_set(found, augment=Augmentation())
    loader, passes = make_loader(dataset, 4, workers=1, shuffle=True), []
    for number in (0, 1, 0):
        dataset.epoch = number
        passes.append(list(loader))
    assert all(map(same, passes[0], passes[2]))
    assert [batch.positions.tolist() for batch in passes[0]] != [batch.positions.tolist() for batch in passes[1]]


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 2), (6, 2, 3), (64, 1, 8), (4, 8, 1)])
def test_there_are_as_many_workers_as_cores_for_a_process(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers


def test_a_closed_loader_has_no_workers_left(found):
    loader = make_loader(data_set(found), 4, workers=2)
    before = set(active_children())
    next(iter(loader))
    own = set(active_children()) - before
    assert len(own) == 2
    loader.close()
    loader.close()
    assert not any(worker.is_alive() for worker in own)
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_makes_another_sample(found, change):
    dataset = data_set(found, augment=Augmentation(), seed=change.get("seed", 0))
    dataset.epoch = change.get("epoch", 0)
    other = sample(data_set(found, augment=Augmentation()), 0)
    assert not np.array_equal(sample(dataset, 0).image, other.image)


def test_from_a_given_epoch_on_samples_are_single_pictures(found):
    dataset = data_set(found, augment=Augmentation(mosaic=1, mixup=1), plain_from=2)
    single = data_set(found, augment=Augmentation(mosaic=0, mixup=0))
    for number, plain in ((1, False), (2, True), (3, True)):
        dataset.epoch = number
        single.epoch = number
        assert np.array_equal(sample(dataset, 4).image, sample(single, 4).image) is plain


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 9, 20])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rect", [False, True])
def test_every_picture_comes_once_and_no_batch_of_one_is_trained(found, batch_size, shuffle, rect):
    loader = make_loader(data_set(found, rect=rect), batch_size, shuffle=shuffle)
    batches = [batch.positions.tolist() for batch in loader]
    assert sorted(position for batch in batches for position in batch) == list(range(9))
    assert len(batches) == len(loader)
    if shuffle and batch_size > 1:
        assert min(map(len, batches)) > 1
    elif not shuffle and not rect:
        assert batches == [list(range(9))[start : start + batch_size] for start in range(0, 9, batch_size)]


def test_batches_are_pinned_for_a_gpu_and_for_nothing_else(found, monkeypatch):
    """Also on a machine that has one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = (None, torch.device("cpu"), torch.device("cuda", 1))
    assert [make_loader(data_set(found), 4, device=device).pin_memory for device in devices] == [False, False, True]


def test_a_batch_numbers_its_targets_by_picture(found):
    (batch,) = epoch(data_set(found), 9)
    assert batch.targets.dtype == torch.float32 and batch.targets.shape == (9, 6)
    assert batch.targets[:, 0].tolist() == list(range(9))
    assert batch.targets[:, 1].tolist() == [number % 3 for number in range(9)]
    assert batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
    assert batch.ignored.dtype == torch.float32
    assert batch.ignored[:, :2].tolist() == [[number, 2 - number % 3] for number in range(0, 9, 2)]


@pytest.mark.parametrize("augment", [None, EVERYTHING], ids=["plain", "augmented"])
def test_samples_made_as_a_batch_are_those_made_one_by_one(found, augment):
    dataset = data_set(found, augment=augment)
    requests = [Request(2, position, (64, 64)) for position in (3, 1, 3)]
    batch = dataset.__getitems__(requests)
    for number, one in enumerate(sample(dataset, request) for request in requests):
        assert np.array_equal(batch.images[number], one.image)
        for boxes, expected in ((batch.targets, one.targets), (batch.ignored, one.ignored)):
            assert np.array_equal(boxes[boxes[:, 0] == number][:, 1:], expected)
        assert batch.fits[number] == one.fit and batch.positions[number] == one.position


def test_a_batch_without_a_box_has_an_empty_target(found):
    nothing = PackedBoxes([np.zeros((0, 5), np.float32)] * 9)
    empty = replace(found, labels=nothing, ignored=nothing)
    (batch,) = epoch(data_set(empty), 9)
    assert batch.targets.shape == batch.ignored.shape == (0, 6)


# Rectangles


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[480, 640]], (320, 416)),  # 312 x 416
        ([[480, 640], [640, 480]], (416, 416)),
        ([[100, 1000]], (64, 416)),  # 41.6 x 416
        ([[416, 416]], (416, 416)),
        ([[1, 5000]], (32, 416)),
    ],
)
def test_a_rectangle_is_the_smallest_that_holds_its_pictures(shapes, expected):
    assert rectangle(np.array(shapes), 416, 32) == expected


def test_rectangular_batches_lose_no_resolution_and_waste_less(found):
    """The scale of each picture is at least that of a square batch, and each batch holds like aspect ratios."""
    squares = {int(p): f for batch in epoch(data_set(found)) for p, f in zip(batch.positions, batch.fits, strict=True)}
    batches = epoch(data_set(found, rect=True, stride=8))
    for batch in batches:
        assert all(side % 8 == 0 and side <= 64 for side in batch.images.shape[2:])
        for position, fit in zip(batch.positions.tolist(), batch.fits, strict=True):
            assert fit.size == tuple(batch.images.shape[2:])
            assert fit.inner == pytest.approx(squares[position].inner, rel=0.03)
    ratios = [found.shapes[int(p), 0] / found.shapes[int(p), 1] for batch in batches for p in batch.positions]
    assert ratios == sorted(ratios)
    assert min(batch.images.shape[2] * batch.images.shape[3] for batch in batches) < 64 * 64


def test_shuffled_rectangles_keep_their_pictures_together(found):
    dataset, groups = data_set(found, rect=True, stride=8), []
    for number in (0, 1):
        dataset.epoch = number
        batches = make_loader(dataset, 2, shuffle=True).batch_sampler
        groups.append([[request.position for request in batch] for batch in batches])
    assert groups[0] != groups[1] and sorted(groups[0]) == sorted(groups[1])


def test_rectangles_exclude_mosaic_and_stretching(found):
    assert data_set(found, rect=True, augment=Augmentation()).augment == Augmentation(mosaic=0)
    with pytest.raises(ValueError, match="rect and stretch exclude each other"):
        data_set(found, rect=True, mode="stretch")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_has_gone_is_named_in_one_line(tmp_path, workers):
    write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    dataset = data_set(index(tmp_path / "a.png", "a", cache_dir=None))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"^[^\n]*a\.png: no such file or directory$"):
        epoch(dataset, workers=workers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_survives_a_signal_to_the_group_that_comes_before_it_has_left(found, number, monkeypatch):
    """`timeout` and containers signal all processes: the script saves its state, for which it needs its workers."""

    def script():
        os.setsid()
        signals = []
        signal.signal(number, lambda *_: signals.append(number))
        monkeypatch.setattr(
            datasets.cv2, "setNumThreads", lambda _: os.killpg(0, number)
        )  # in the worker, at its start
        assert len(epoch(data_set(found), workers=1)) == 3 and signals == [number]

    process = get_context("fork").Process(target=script)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="batches go through sockets")
def test_a_worker_is_silent_when_the_main_process_dies_while_it_takes_a_batch(capfd):
    """kill -9: the thread that hands over the memory of a batch would print a traceback after the end of the script."""

    def worker():
        datasets._start_worker(0)
        address, _ = resource_sharer._resource_sharer.register(None, lambda: None)
        with socket.socket(socket.AF_UNIX) as main:
            main.connect(address)
            select.select([main], [], [], 60)  # what is not read resets the connection
        resource_sharer.stop(60)

    process = get_context("fork").Process(target=worker)
    process.start()
    process.join(60)
    assert process.exitcode == 0 and capfd.readouterr().err == ""


# Anchors


def index_of(*labels: np.ndarray) -> Index:
    shapes = np.array([(100, 200)] * len(labels))
    names, nothing = (f"{n}.png" for n in range(len(labels))), [np.zeros((0, 5), np.float32)] * len(labels)
    return Index(PackedPaths(names), PackedBoxes(labels), PackedBoxes(nothing), shapes, len(labels), ())


def test_box_sizes_are_pixels_of_the_fitted_picture():
    """A picture of 200 × 100 is halved to fit 100 × 100: 0.2 of its width are 20 pixels."""
    rows = np.array([[0, 0.5, 0.5, 0.2, 0.4]], np.float32)
    np.testing.assert_allclose(box_sizes(index_of(rows), (100, 100)), [[20, 20]], rtol=1e-6)


def test_clusters_find_the_groups_they_were_made_of():
    rng = np.random.default_rng(0)
    centres = np.array([[10, 12], [40, 20], [80, 90]])
    sizes = np.concatenate([centre * rng.uniform(0.95, 1.05, (200, 2)) for centre in centres])
    np.testing.assert_allclose(cluster(sizes, 3), centres, rtol=0.03)


def test_quality_counts_boxes_within_four_times_the_sides():
    recall, iou = fit_quality(np.array([[10.0, 10], [10, 41]]), np.array([[10.0, 10]]))
    assert recall == 0.5
    assert iou == pytest.approx((1 + 100 / 410) / 2)
    assert shape_ious(np.array([[3.0, 2]]), np.array([[2.0, 4]])).item() == pytest.approx(0.4)


def test_only_the_anchors_that_heads_use_are_replaced():
    network = tiny()
    blocks = list(network.blocks)
    blocks[9] = dataclasses.replace(blocks[9], mask=(3, 4), classes=2)
    network = dataclasses.replace(network, blocks=tuple(blocks))
    assert used_anchors(network) == (0, 1, 2, 3, 4)
    changed = with_anchors(network, [(n, n + 0.123) for n in range(1, 6)])
    assert changed.yolos[0].anchors == ((1, 1.1), (2, 2.1), (3, 3.1), (4, 4.1), (5, 5.1), (40, 44))
    assert changed.yolos[0].anchors == changed.yolos[1].anchors


def test_auto_anchors_fit_better_and_say_so():
    rng = np.random.default_rng(1)
    rows = np.concatenate([np.zeros((60, 1)), rng.uniform(0.3, 0.9, (60, 4))], 1).astype(np.float32)
    network, text = auto_anchors(tiny(), index_of(rows), (64, 64), seed=0)
    sizes = box_sizes(index_of(rows), (64, 64))
    before, after = (fit_quality(sizes, np.array(n.yolos[0].anchors))[1] for n in (tiny(), network))
    assert after > before
    assert "best possible recall" in text


def test_too_few_boxes_are_an_error_that_says_how_many():
    with pytest.raises(DataError, match="1 different box sizes are too few for 6 anchors"):
        cluster(np.array([[3.0, 4.0]] * 9), 6)
