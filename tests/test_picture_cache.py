"""A cache of decoded pictures changes no sample: it is shared, reused, and never used when it is stale or damaged."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch

from tests.media import labelled, sample
from utils.checkpoint import read_checkpoint
from utils.data import store
from utils.data.augment import Augmentation
from utils.data.datasets import DetectionDataset
from utils.data.images import fit, read_image, write_image
from utils.data.index import CACHE_FOLDER, Index, index
from utils.data.store import PictureStore
from utils.errors import DataError, InputError
from utils.flags import cache_choice
from utils.training.workflow import share_pictures

SHAPES = ((40, 96), (96, 40), (50, 50), (30, 64), (200, 150))
"""Of the pictures; smaller than the input of 64 x 64 on no, one or both sides."""
TURNED = Augmentation(degrees=10, mixup=0.5)


def picture(number: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*shape, 3), np.uint8)


def add(root: Path, name: str, image: np.ndarray) -> None:
    labelled(root, name, image, "0 0.5 0.5 0.4 0.6\n")


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set of five pictures, PNG and JPEG."""
    for number, shape in enumerate(SHAPES):
        add(tmp_path, f"{number}.{'jpg' if number == 4 else 'png'}", picture(number, shape))
    return tmp_path


@pytest.fixture(params=["ram", "disk"])
def cache(request) -> str:
    return request.param


@pytest.fixture
def disk_file(root) -> Path:
    """The file of a cache on the disk."""
    data_set(root, cache="disk")
    (path,) = (root / "cache").iterdir()
    return path


def found(root: Path) -> Index:
    return index(root / "images", "a", cache_dir=None)


def data_set(root: Path, size: tuple[int, int] = (64, 64), **options) -> DetectionDataset:
    options.setdefault("cache_dir", root / "cache" if options.get("cache") == "disk" else None)
    return DetectionDataset(found(root), size=size, **options)


def assert_same(one: DetectionDataset, other: DetectionDataset) -> None:
    assert len(one) == len(other)
    for position in range(len(one)):
        a, b = sample(one, position), sample(other, position)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.targets, b.targets)
        assert a.fit == b.fit


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": (32, 96)},
        {"rect": True, "stride": 8},
        {"augment": TURNED, "channels": 1},
        {"augment": TURNED, "rect": True, "size": (64, 96)},
        {"augment": Augmentation(), "mode": "stretch", "size": (96, 64)},
    ],
    ids=str,
)
def test_samples_are_the_same_with_and_without_a_cache(root, cache, options):
    kept = data_set(root, cache=cache, **options)
    assert kept.store.address
    assert_same(kept, data_set(root, **options))


@pytest.mark.parametrize("mode", ["letterbox", "stretch"])
def test_a_plain_sample_is_the_whole_picture_fitted_once(root, mode):
    """As detect.py fits it, which has no data set."""
    dataset = data_set(root, mode=mode)
    for position, path in enumerate(dataset.index.images):
        image, placed = fit(read_image(path), (64, 64), mode)
        np.testing.assert_array_equal(sample(dataset, position).image, image.transpose(2, 0, 1))
        assert sample(dataset, position).fit == placed


def test_nothing_is_kept_larger_than_it_is_fitted(root):
    shapes = [data_set(root).store.read(position).shape[:2] for position in range(5)]
    assert shapes == [(27, 64), (64, 27), (50, 50), (30, 64), (64, 48)]


@pytest.mark.parametrize(("size", "shrink"), [(512, 1), (257, 1), (256, 2), (129, 2), (128, 4), (65, 4), (64, 8)])
def test_a_jpeg_is_decoded_at_a_fraction_only_for_training(root, monkeypatch, size, shrink):
    add(root, "big.jpg", cv2.GaussianBlur(picture(9, (512, 512)), (0, 0), 20) * 3)
    monkeypatch.setattr(store, "read_image", Mock(wraps=read_image))
    position = [path.name for path in found(root).images].index("big.jpg")
    images = [PictureStore(found(root), 3, (size, size), exact=exact).read(position) for exact in (True, False)]
    assert [call.kwargs["shrink"] for call in store.read_image.call_args_list] == [1, shrink]
    assert images[0].shape == images[1].shape == (size, size, 3)
    assert np.abs(images[0].astype(int) - images[1])[4:-4, 4:-4].max() <= 4


def test_a_kept_picture_cannot_be_written_to(root):
    with pytest.raises(ValueError, match="read-only"):
        data_set(root, cache="ram").store.read(0)[0] = 0


# Reuse


def test_a_later_run_decodes_nothing(root, monkeypatch):
    expected = sample(data_set(root, augment=TURNED), 1).image
    data_set(root, augment=TURNED, cache="disk")
    monkeypatch.setattr(store, "read_image", None)
    np.testing.assert_array_equal(sample(data_set(root, augment=TURNED, cache="disk"), 1).image, expected)


def replace_bytes(root: Path) -> None:
    """The same size of picture and of file, other pixels."""
    image = picture(0, SHAPES[0])
    image[0, 0] ^= 1
    before = (root / "images" / "0.png").stat()
    write_image(root / "images" / "0.png", image[::-1])
    os.utime(root / "images" / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def swap(root: Path) -> None:
    one, other, spare = (root / "images" / name for name in ("0.png", "3.png", "spare"))
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


EDITS = {
    "bytes": replace_bytes,
    "added": lambda root: add(root, "5.png", picture(5, (40, 40))),
    "removed": lambda root: (root / "images" / "1.png").unlink(),
    "renamed": lambda root: (root / "images" / "0.png").rename(root / "images" / "9.png"),
    "swapped": swap,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("augment", [None, Augmentation()], ids=["plain", "augmented"])
def test_a_cache_is_not_used_after_an_edit(root, edit, augment):
    data_set(root, augment=augment, cache="disk")
    edit(root)
    kept = data_set(root, augment=augment, cache="disk")
    assert kept.store.address
    assert_same(kept, data_set(root, augment=augment))


@pytest.mark.parametrize(
    "change",
    [{"size": (32, 32)}, {"size": (64, 32)}, {"channels": 1}, {"mode": "stretch"}, {"augment": Augmentation()}],
    ids=str,
)
def test_a_cache_is_not_used_for_another_input(root, change):
    data_set(root, cache="disk")
    assert_same(data_set(root, cache="disk", **change), data_set(root, **change))


def test_a_cache_of_another_version_is_not_used(root, monkeypatch):
    data_set(root, cache="disk")
    before = set((root / "cache").iterdir())
    monkeypatch.setattr(store, "MAGIC", b"DKPIXEL0")
    assert_same(data_set(root, cache="disk"), data_set(root))
    assert len(set((root / "cache").iterdir()) - before) == 1


def test_an_edited_picture_replaces_the_file_it_made_stale(root, disk_file):
    before = disk_file.read_bytes()
    replace_bytes(root)
    data_set(root, cache="disk")
    assert list((root / "cache").iterdir()) == [disk_file] and disk_file.read_bytes() != before


# Damage


def flipped(data: bytes, share: float) -> bytes:
    at = int(share * (len(data) - 64))  # the last bytes may be padding
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGES = (
    lambda data: data[:-1],
    lambda data: data + b"\0",
    lambda data: b"",
    lambda data: bytes(len(data)),
    *(partial(flipped, share=share) for share in (0, 0.001, 0.002, 0.1, 0.5, 0.9, 1)),
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew(root, disk_file, damage):
    whole = disk_file.read_bytes()
    disk_file.write_bytes(damage(whole))
    assert disk_file.read_bytes() != whole
    assert_same(data_set(root, cache="disk"), data_set(root))
    assert disk_file.read_bytes() == whole


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_file_is_not_read(root, disk_file, kind, capsys):
    disk_file.unlink()
    disk_file.mkdir() if kind == "folder" else os.mkfifo(disk_file)
    assert_same(data_set(root, cache="disk"), data_set(root))
    assert (kind == "folder") == ("images are decoded each time they are needed" in capsys.readouterr().err)


# Where a cache cannot be


def assert_said(capsys, what: str) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line and line.endswith("; images are decoded each time they are needed")


@pytest.mark.parametrize(("cache", "room"), [("ram", "_free_memory"), ("disk", "_free_disk")])
def test_what_does_not_fit_is_said_and_not_kept(root, monkeypatch, capsys, cache, room):
    monkeypatch.setattr(store, room, lambda *_: 10_000)
    kept = data_set(root, cache=cache)
    assert_said(capsys, "0.000 GB are free, the images take 0.000 GB")
    assert not kept.store.address and not list((root / "cache").glob("*"))
    assert_same(kept, data_set(root))


def test_a_disk_that_fills_up_leaves_nothing(root, monkeypatch, capsys, cache):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(store.PixelLayout, "header", full)
    kept = data_set(root, cache=cache)
    assert_said(capsys, "No space left on device")
    monkeypatch.undo()
    assert not list((root / "cache").glob("*")) and not list((root / "cache").glob(".*"))
    assert_same(kept, data_set(root))


def test_a_picture_that_has_gone_is_named(root, cache):
    pictures = found(root)
    pictures.images[2].unlink()
    with pytest.raises(DataError, match=r"2\.png: no such file or directory"):
        DetectionDataset(pictures, size=(64, 64), cache=cache, cache_dir=root / "cache")
    assert not list((root / "cache").glob("pixels*")) and not list((root / "cache").glob(".*"))


def test_what_a_killed_process_has_left_is_removed_and_what_one_writes_is_not(root, disk_file):
    disk_file.unlink()
    old, new = (disk_file.with_name(f".{disk_file.name}.{number}.tmp") for number in (1, 2))
    for temporary in (old, new):
        temporary.write_bytes(b"unfinished")
    os.utime(old, (0, 0))
    data_set(root, cache="disk")
    assert not old.exists() and new.exists() and disk_file.exists()


# Sharing


def inode(address: str) -> int:
    return os.stat(address).st_ino


def read_there(kept: PictureStore, sending: Connection) -> None:
    """Send the number of this process, the file it reads from, and the sum of the pixels."""
    sums = sum(int(kept.read(position).sum()) for position in range(len(kept.index)))
    sending.send((os.getpid(), inode(kept.address), sums))


def test_a_forked_process_uses_the_same_memory(root, cache):
    kept = data_set(root, cache=cache).store
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=read_there, args=(kept, sending))
    process.start()
    pid, file, sums = receiving.recv()
    process.join(120)
    assert pid == process.pid != os.getpid() and file == inode(kept.address)
    assert sums == sum(int(kept.read(position).sum()) for position in range(5))


def test_no_picture_is_copied_to_a_process_that_is_not_forked(root, cache):
    kept = data_set(root, cache=cache).store
    copied = copy.copy(kept)  # as pickle does it
    assert not copied.address
    np.testing.assert_array_equal(copied.read(1), kept.read(1))


def test_a_cache_that_is_not_there_is_not_joined(root):
    lost = data_set(root).store
    for address in ("", "/proc/self/fd/99999", str(root / "images" / "0.png")):
        lost.join(address)
        assert not lost.address


def test_a_store_joins_only_a_cache_of_its_own_pictures(root):
    kept = data_set(root, cache="ram").store
    fitting, other = data_set(root).store, data_set(root, size=(32, 32)).store
    for one in (fitting, other):
        one.join(kept.address)
    assert fitting.address and inode(fitting.address) == inode(kept.address) and not other.address


def test_a_cache_in_memory_has_no_name_and_ends_with_its_users(root):
    kept = data_set(root, cache="ram").store
    assert os.stat(kept.address).st_nlink == 0
    address = kept.address
    del kept
    assert not os.path.exists(address)


# Flags


@pytest.mark.parametrize(
    ("cache", "match"),
    [(None, "goes with --cache disk"), ("ram", "goes with --cache disk"), ("disk", "file: is a file; name a folder")],
)
def test_a_cache_folder_goes_with_a_cache_on_the_disk_and_is_a_folder(cache, match, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"--cache-dir.*{match}"):
        cache_choice(SimpleNamespace(cache=cache, cache_dir=str(tmp_path / "file")))


@pytest.mark.usefixtures("no_plots")
def test_a_training_is_the_same_with_any_cache_and_may_be_resumed_with_another(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain, *others = (
        run("--epochs", "1", "--seed", "1", "--name", name, *given)
        for name, given in (("plain", ()), ("ram", ("--cache-images",)), ("disk", ("--cache", "disk")))
    )
    others.append(run("--resume", others[1]["run_dir"], "--cache"))
    expected = read_checkpoint(Path(plain["last"]))["model"]
    for other in others:
        found = read_checkpoint(Path(other["last"]))["model"]
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    names = [path.suffix for path in (tmp_path / "cache" / CACHE_FOLDER).iterdir()]
    assert names.count(".bin") == 2 and ".npz" in names, "training and validation images, beside what is known of them"


@pytest.mark.parametrize("machine", ["this", "another", "none"])
def test_processes_of_a_team_share_the_pictures_of_the_first(root, machine):
    """Seen by one that is not the first, and which the first one tells where its pictures are kept."""
    first = data_set(root, cache="ram").store
    own = data_set(root).store
    address = {"this": first.address, "another": "/proc/self/fd/99999", "none": ""}[machine]
    share_pictures(own, SimpleNamespace(leads=False, share=lambda _: address))
    assert bool(own.address) == (machine != "none")
    assert (machine == "this") == (bool(own.address) and inode(own.address) == inode(first.address))
    np.testing.assert_array_equal(own.read(1), first.read(1))
