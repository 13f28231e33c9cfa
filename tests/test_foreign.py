"""State dicts of other suites load by order and shape, as the network that they were saved from."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch

import slim_prune
from models import Darknet
from tests.nets import TINY, printed, refused, tiny
from utils.checkpoint import load_model, model_document, write_checkpoint
from utils.darknet.network import adapt_classes
from utils.errors import InputError, WeightsError
from utils.files import regular_file
from utils.flags import choose_model

NAMES = (("conv.", "Conv2d."), ("bn.", "BatchNorm2d.")), (("conv.", "conv_7."), ("bn.", "batch_norm_7."))
"""Words of ultralytics/yolov3 and its descendants, and of earlier suites."""


@pytest.fixture
def model():
    """A network whose values are all different."""
    torch.manual_seed(0)
    model = Darknet(tiny())
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor).half())
    return model


@pytest.fixture
def cfg(tmp_path):
    """A cfg file of the network."""
    path = tmp_path / "n.cfg"
    path.write_text(TINY)
    return str(path)


def renamed(model: Darknet, words=NAMES[0]) -> dict[str, torch.Tensor]:
    """The state dict with the names of another suite, and thop's counters."""
    state = {}
    for key, value in model.state_dict().items():
        name = key.replace("layers.", "module_list.")
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        state[name] = value
        if key.endswith("conv.weight"):
            state[name.replace("weight", "total_ops")] = torch.zeros(1, dtype=torch.float64)
    return state


def nested(state):
    """A checkpoint with numpy's numbers, as `best_fitness` was stored."""
    return {"epoch": 3, "best_fitness": np.array([0.5]), "last": np.float64(1), "optimizer": None, "model": state}


def test_the_training_that_follows_a_pruning_has_the_cfg_of_its_teacher(model, cfg, tmp_path, capsys):
    torch.save(renamed(model), tmp_path / "old.pt")
    files = ("--cfg", cfg, "--weights", str(tmp_path / "old.pt"), "--project", str(tmp_path))
    words = printed(capsys, slim_prune.main, *files, "--percent", "0.2", "--no-test")["next"].split()
    assert words[words.index("--t_cfg") :][:4] == ["--t_cfg", cfg, "--t_weights", str(tmp_path / "old.pt")]
    with refused(WeightsError, "do not say their network; give --cfg, or --t_cfg of a teacher"):
        load_model(choose_model(None, str(tmp_path / "old.pt")))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("words", NAMES, ids=["Conv2d", "conv_7"])
@pytest.mark.parametrize("wrap", [dict, nested])
def test_another_suites_tensors_are_the_network(model, cfg, tmp_path, words, wrap, legacy):
    path = tmp_path / "old.pt"
    state = renamed(copy.deepcopy(model).half(), words)
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(choose_model(cfg, str(path)))
    assert loaded.names is None
    assert any("tensors of another suite" in note for note in loaded.notes)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(loaded.model.state_dict()[key], value), key


def test_the_heads_say_the_classes(cfg, tmp_path):
    path = tmp_path / "old.pt"
    torch.save(renamed(Darknet(adapt_classes(tiny(), 7))), path)
    assert load_model(choose_model(cfg, str(path))).model.network.classes == 7


def test_what_does_not_fit_is_refused(model, cfg, tmp_path):
    path, state = tmp_path / "old.pt", renamed(model)
    items = list(state.items())
    names = [name for name, _ in items]
    mean = names.index("module_list.0.BatchNorm2d.running_mean")
    swapped = [*items[:mean], items[mean + 1], items[mean], *items[mean + 2 :]]
    bad = {
        "one is missing": (dict(items[:-2]), "tensors, but"),
        "order": (dict(swapped), r"has shape .* where .* has layers\.0"),
        "NaN": ({**state, names[0]: torch.full_like(items[0][1], torch.nan)}, "not finite"),
        "no tensors": ({"model": 3}, r"no state dict; .*torch\.save\(model\.state_dict\(\)"),
        "a module": ({"model": torch.nn.Conv2d(1, 1, 1)}, r"whole-module .*torch\.save\(model\.state_dict\(\)"),
    }
    for contents, match in bad.values():
        torch.save(contents, path)
        with refused(WeightsError, match):
            load_model(choose_model(cfg, str(path)))
    torch.save(state, path)
    with refused(WeightsError, "give --cfg"):
        load_model(choose_model(None, str(path)))


def test_the_stored_cases_load(shared):
    for name in ("bare", "tanluren", "tanluren_np", "own_state"):
        files = choose_model(str(shared / "cases/cfg/mini.cfg"), str(shared / f"cases/pt/{name}.pt"))
        assert load_model(files).model.network.classes == 12


def test_the_size_that_a_checkpoint_was_trained_for_is_taken(cfg, tmp_path):
    path = tmp_path / "other.cfg"
    path.write_text(TINY.replace("width=64", "width=96").replace("classes=2", "classes=2"))
    model = Darknet(tiny())
    write_checkpoint(tmp_path / "m.pt", model_document(model.state_dict(), model.network, ("a", "b"), ()))
    loaded = load_model(choose_model(str(path), str(tmp_path / "m.pt")))
    assert loaded.model.network.image == (3, 64, 64)
    said = f"m.pt: trained for 64 × 64, which is taken; {path} says 64 × 96 (--img_size chooses)"
    assert any(note.endswith(said) for note in loaded.notes)


def test_a_missing_file_is_looked_for_where_such_files_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for stage in ("a", "b"):
        (tmp_path / f"runs/train/{stage}/weights").mkdir(parents=True)
        (tmp_path / f"runs/train/{stage}/weights/last.pt").write_bytes(b"")
    os.utime(tmp_path / "runs/train/b/weights/last.pt", (1, 1))
    (tmp_path / "my.names").write_text("a")
    hints = {
        "weights/last.pt": "runs/train/a/weights/last.pt",
        "yolov3.cfg": "cfg/yolov3.cfg",
        "quick": "data/recipes/quick.yaml",
        "mi.names": "my.names",
    }
    for name, hint in hints.items():
        with refused(InputError, rf"{name}: no such file or directory; did you mean .*{hint}\?"):
            regular_file(name)
    for strange in ("zzz", "a**b.pt", "[x.pt", "**", "my.jpg"):
        with refused(InputError, "no such file or directory$"):
            regular_file(strange)
