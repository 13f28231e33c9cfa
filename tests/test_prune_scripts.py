"""The pruning scripts: what they print and write, and that others can read it."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path

import pytest
import torch

from models import Darknet, load_arrays
from tests.nets import TINY, tiny
from utils.checkpoint import load_model
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.errors import InfeasibleError, InputError
from utils.model_files import choose_model
from utils.training.state import write_darknet

SCRIPTS = ("normal", "regular", "shortcut", "slim")


@pytest.fixture
def files(tmp_path) -> list[str]:
    """A network with γ that differ, as --cfg and --weights."""
    model = Darknet(tiny())
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("bn.weight"):
            value.copy_(torch.rand(value.shape, generator=generator))
    (tmp_path / "n.cfg").write_text(TINY)
    write_darknet(tmp_path / "n.weights", model)
    return ["--cfg", str(tmp_path / "n.cfg"), "--weights", str(tmp_path / "n.weights")]


def call(name: str, capsys, *flags: str) -> dict:
    capsys.readouterr()
    importlib.import_module(f"{name}_prune").main([*flags, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_pruned_network_is_written_proved_and_can_be_used(files, folder, tmp_path, capsys, name):
    flags = ["--percent", "0.2", "--data", str(folder / "d.data"), "--project", str(tmp_path / "runs")]
    document = call(name, capsys, *files, *flags)
    assert {"strategy", "before", "after", "max_percent", "certificate", "run_dir", "cfg", "weights"} <= document.keys()
    assert document["strategy"] == name
    assert document["after"]["parameters"] <= document["before"]["parameters"]
    assert document["after"]["map50"] is not None
    assert max(document["certificate"][key] for key in ("compact_vs_silenced", "compact_vs_keep_size")) < 1e-4
    network = cfg_file.load(document["cfg"])
    assert Path(document["weights"]).stat().st_size == document["after"]["weights_bytes"]
    arrays = weights_file.read(document["weights"], network)
    model = load_arrays(network, {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}).eval()
    stored = load_model(choose_model(None, str(Path(document["run_dir"]) / "model.pt"))).model.eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(image).heads, stored(image).heads, strict=True))
    with (Path(document["run_dir"]) / "channels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["before"]) - int(row["after"]) for row in rows) > 0 or name == "regular"
    again = call(name, capsys, "--cfg", document["cfg"], "--weights", document["weights"], "--percent", "0.1",
                 "--no-test", "--project", str(tmp_path / "runs"))  # fmt: skip
    assert again["run_dir"].endswith("exp2")


def test_a_dry_run_writes_nothing(files, tmp_path, capsys):
    document = call("slim", capsys, *files, "--percent", "0.5", "--dry-run", "--project", str(tmp_path / "runs"))
    assert document["after"]["macs"] < document["before"]["macs"]
    assert not (tmp_path / "runs").exists()


def test_too_much_is_refused_with_what_works(files, tmp_path, capsys):
    flags = [*files, "--no-test", "--project", str(tmp_path / "runs")]
    with pytest.raises(InfeasibleError, match=r"the largest percent that works is 0\.\d{4}$") as caught:
        call("normal", capsys, *flags, "--percent", "0.99")
    assert not (tmp_path / "runs").exists()
    largest = str(caught.value).split()[-1]
    assert call("normal", capsys, *flags, "--percent", largest)["max_percent"] == float(largest)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--percent", "1"], "--percent: 1 is outside 0 <= value < 1"),
        (["--percent", "0.5"], "--data: is needed"),
        (
            ["--percent", "0.5", "--no-test", "--multiple-of", "0"],
            "--multiple-of: 0: allowed are 1 to 1024",
        ),
        (["--no-test"], "--percent"),
    ],
)
def test_bad_flags_are_one_line(files, capsys, flags, match):
    with pytest.raises(InputError, match=match):
        call("slim", capsys, *files, *flags)
