"""A network of other channels than pictures have is refused wherever pictures are read, and works elsewhere."""

from __future__ import annotations

import pytest
import torch

import compress
import export
import slim_prune
from benchmarks import compare
from models import Darknet
from tests.nets import TINY
from utils.checkpoint import model_document, write_checkpoint, write_darknet
from utils.darknet import info
from utils.darknet.cfg import load, parse
from utils.errors import CfgError
from utils.export.verify import picture
from utils.runtime.exported import Metadata

CFG = TINY.replace("channels=3", "channels=4")
PRUNERS = {"slim": "--percent 0.2", "layer": "--shortcut 1"}
"""Kind of pruner → the amount; the others go the same way."""
SCRIPTS = {
    "train": "--epochs 1 --workers 0 --device cpu",
    "test": "--device cpu",
    "detect": "--device cpu",
    "quantize": "--device cpu",
    "compress": "",
    **{f"{kind}_prune": f"{amount} --device cpu" for kind, amount in PRUNERS.items()},
}
"""Script → its flags beside those of files and folders."""


@pytest.fixture
def files(tmp_path):
    """Folder with n.cfg, n.weights and best.pt of one network."""
    torch.manual_seed(0)
    model = Darknet(parse(CFG))
    (tmp_path / "n.cfg").write_text(CFG)
    write_darknet(tmp_path / "n.weights", model)
    write_checkpoint(tmp_path / "best.pt", model_document(model.state_dict(), model.network, ("a", "b"), ()))
    return tmp_path


def call(name, root, files, folder, kind):
    """Run a script on the network in the cfg and .weights, or in the .pt."""
    weights = files / ("n.weights" if kind == "weights" else "best.pt")
    flags = ["--cfg", files / "n.cfg"] if kind == "weights" else []
    flags += ["--weights", weights] if (name, kind) != ("train", "weights") else []
    flags += ["--source", folder / "images"] if name == "detect" else ["--data", folder / "d.data"]
    flags += ["--recipe", root / "data/recipes/demo.yaml"] if name == "compress" else []
    compress.script_module(name).main([*map(str, [*flags, "--project", files / "runs"]), *SCRIPTS[name].split()])


@pytest.mark.parametrize("kind", ["weights", "pt"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_where_pictures_are_read_it_is_an_error_and_nothing_is_written(name, kind, root, files, folder):
    with pytest.raises(CfgError, match=r"channels=4: images have 1 \(grey\) or 3 \(RGB\); change") as caught:
        call(name, root, files, folder, kind)
    assert "\n" not in str(caught.value) and not (files / "runs").exists()


def test_a_comparison_and_a_sample_read_pictures_too(files, folder):
    network = f"{files / 'n.cfg'}:{files / 'n.weights'}"
    with pytest.raises(CfgError, match="channels=4"):
        compare.main([network, network, "--data", str(folder / "d.data"), "--device", "cpu"])
    with pytest.raises(CfgError, match="channels=4"):
        picture(Metadata(parse(CFG), ("a", "b")), sample=folder / "images/0.png")


def test_what_reads_no_pictures_works(files, capsys):
    network = ["--cfg", str(files / "n.cfg"), "--weights", str(files / "n.weights")]
    info.main([str(files / "n.cfg"), "--json"])
    export.main([*network, "--format", "darknet", "--output", str(files / "out.weights"), "--json"])
    slim_prune.main([*network, "--percent", "0.2", "--no-test", "--device", "cpu", "--project", str(files / "runs")])
    assert (files / "out.weights").stat().st_size == (files / "n.weights").stat().st_size
    assert load(next((files / "runs").rglob("model.cfg"))).net.channels == 4
