"""A script that fails before its first result leaves no run directory; one with a result, or of before, stays."""

from __future__ import annotations

from pathlib import Path

import pytest

import compress
import train
from utils.compress.journey import Journey
from utils.compress.recipe import read_recipe
from utils.report.run_dir import RunDirectory


class Broken(Exception):  # noqa: N818
    """A failure that no script expects."""


def fails(*_: object, **__: object) -> None:
    """Stands in for a function."""
    raise Broken


def test_a_new_folder_goes_unless_it_has_a_result(tmp_path):
    def run(name: str, *files: str, until: tuple[str, ...] = (), exist_ok: bool = False) -> list[str]:
        with pytest.raises(Broken), RunDirectory.create(tmp_path, name, exist_ok=exist_ok).until(*until) as made:
            made.describe(args={}, hyp={}, cfg="", data={})
            for file in files:
                made.file(file).parent.mkdir(exist_ok=True)
                made.write_text(file, "")
            raise Broken
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob(f"{name}*"))

    assert run("a") == []
    assert run("b", "gamma/0.png", "labels.jpg", until=("results.csv", "weights/*.pt")) == []
    assert run("c", "weights/last.pt", until=("results.csv", "weights/*.pt")) == ["c"]
    assert run("d", "0.jpg") == ["d"]
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "mine").write_text("")
    assert run("e", exist_ok=True) == ["e"]
    assert (tmp_path / "e" / "mine").exists()


TRAIN = ["--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.mark.parametrize("place", ["Trainer", "_draw_start", "_watch", "Trainer.train_batch", "opencv_warning"])
def test_a_training_that_does_not_begin_leaves_no_folder(folder, tmp_path, monkeypatch, no_plots, place):
    """Out of memory while the model is built, a picture that cannot be read, a first step that fails, …"""
    monkeypatch.setattr(f"utils.training.workflow.{place}", fails)
    flags = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), *TRAIN, "--project", str(tmp_path / "r")]
    with pytest.raises(Broken):
        train.main(flags)
    assert list((tmp_path / "r").iterdir()) == []


def test_a_search_whose_first_trial_does_not_begin_leaves_no_folder(folder, tmp_path, monkeypatch, no_plots):
    pytest.importorskip("optuna")
    monkeypatch.setattr("utils.training.workflow.Trainer.train", fails)
    flags = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), *TRAIN, "--project", str(tmp_path / "r")]
    with pytest.raises(Broken):
        train.main([*flags, "--evolve", "2"])
    assert list((tmp_path / "r").iterdir()) == []


def test_a_training_that_fails_in_its_second_epoch_stays(folder, tmp_path, monkeypatch, no_plots):
    from utils.training.workflow import Trainer

    epoch = Trainer._train_epoch
    monkeypatch.setattr(Trainer, "_train_epoch", lambda self: fails() if self.progress.epoch else epoch(self))
    flags = ["--cfg", str(folder / "n.cfg"), "--data", str(folder / "d.data"), *TRAIN, "--project", str(tmp_path)]
    with pytest.raises(Broken):
        train.main([*flags, "--epochs", "2", "--nosave"])
    assert (tmp_path / "exp" / "results.csv").is_file()


SCRIPTS = {
    "slim_prune": (["--percent", "0.3", "--no-test"], "utils.pruning.report.write_network"),
    "layer_prune": (["--shortcut", "1", "--no-test"], "utils.pruning.report.write_network"),
    "quantize": (["--no-test", "--calib", "2", "--observer", "minmax"], "utils.quantization.workflow.write_checkpoint"),
    "export": (["--format", "pt"], "utils.export.workflow.write_checkpoint"),
    "detect": (["--save-txt"], "utils.report.detections.atomic_write_text"),
    "test": (["--save-json"], "utils.detection.evaluate.coco_results"),
}


def script_flags(name: str, folder: Path, files: list[str]) -> list[str]:
    """Return the flags of a script of the table, without those of its run directory."""
    flags = [*SCRIPTS[name][0], "--data", str(folder / "d.data"), *files]
    flags += ["--device", "cpu"] if name != "export" else []
    return flags + (["--source", str(folder / "images"), "--nosave"] if name == "detect" else [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_cannot_write_its_result_leaves_no_folder(folder, files, tmp_path, monkeypatch, no_plots, name):
    monkeypatch.setattr(SCRIPTS[name][1], fails)
    with pytest.raises(Broken):
        compress.script_module(name).main([*script_flags(name, folder, files), "--project", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists() or list((tmp_path / "r").iterdir()) == []


def test_a_journey_whose_first_stage_fails_leaves_no_folder(tmp_path):
    (tmp_path / "r.yaml").write_text("stages: {a: {script: train}}")
    journey = Journey(read_recipe(tmp_path / "r.yaml", compress.knows), tmp_path / "j" / "k", "d.data", "n.cfg", None)
    with pytest.raises(Broken):
        journey.finish(fails)
    assert list((tmp_path / "j").iterdir()) == []

    def begins(command: list[str]) -> str:
        made = Path(command[command.index("--project") + 1]) / "a" / "weights" / "last.pt"
        made.parent.mkdir(parents=True)
        made.write_text("")
        raise Broken

    with pytest.raises(Broken):
        journey.finish(begins)
    assert (tmp_path / "j" / "k" / "journey.json").is_file()
    assert (tmp_path / "j" / "k" / "a" / "weights" / "last.pt").is_file()
