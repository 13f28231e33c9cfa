"""Files of an older version (`eb2135b`): networks load and compute the same, a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import train
from utils.checkpoint import load_model, read_checkpoint
from utils.model_files import choose_model

OLDER = Path(__file__).resolve().parent / "files" / "older"


@pytest.mark.parametrize("name", ["pruned", "quantized"])
def test_a_network_computes_what_it_did(name):
    model = load_model(choose_model(None, str(OLDER / f"{name}.pt"))).model.eval()
    picture = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    heads = np.load(OLDER / "heads.npz")
    with torch.no_grad():
        for number, head in enumerate(model(picture).heads):
            assert np.abs(head.numpy() - heads[f"{name}{number}"]).max() < 1e-4


@pytest.mark.usefixtures("no_plots")
def test_a_sparse_training_goes_on(tmp_path):
    run = Path(shutil.copytree(OLDER / "run", tmp_path / "runs" / "sparse"))
    args = yaml.safe_load((run / "args.yaml").read_text())
    args |= {"cfg": str(run / "model.cfg"), "data": str(OLDER / "data/d.data"), "project": str(run.parent)}
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    assert read_checkpoint(run / "weights/last.pt")["progress"]["epoch"] == 1
    train.main(["--resume", str(run)])
    assert read_checkpoint(run / "weights/last.pt")["progress"]["epoch"] == 2
    assert len((run / "results.csv").read_text().splitlines()) == 3
