"""The weights a training starts from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models import Darknet
from utils.checkpoint import check_state, link_file, load_model, origin, read_checkpoint
from utils.cli import log
from utils.darknet import weights as weights_file
from utils.darknet.network import head_convolutions
from utils.errors import CheckpointError, WeightsError
from utils.model_files import ModelFiles, other_classes

STATE_KEYS = ("optimizer", "scaler", "ema_updates", "progress", "lineage", "plan")
"""What a checkpoint of a training has beside a model."""


class Start(NamedTuple):
    """A model ready to be trained."""

    model: Darknet
    lineage: tuple[dict[str, Any], ...]
    """What the weights were made from, oldest first; empty for new ones."""
    note: str
    """What was loaded, to be said."""
    kept: Mapping[str, Any] | None = None
    """Of a pruned network: where its channels come from."""


def initial_model(files: ModelFiles, pretrained: bool) -> Start:
    """The network with new weights, or with those of a file.

    Args:
        files: the network, adapted to the data, and perhaps weights.
        pretrained: `-pt`: accept a backbone file, and heads of another class count, which start anew.

    Raises:
        WeightsError: the file does not fit.
    """
    model = Darknet(files.network)
    if files.weights is None:
        return Start(model, (), "new weights")
    if files.is_checkpoint:
        return _from_checkpoint(model, files, pretrained)
    contents = weights_file.check(files.weights, files.network, partial=pretrained)
    arrays = weights_file.read(files.weights, files.network, partial=pretrained)
    _copy(model, {key: torch.from_numpy(array) for key, array in arrays.items()})
    return Start(model, (origin(files.weights),), f"{files.weights}: {contents}")


def resumable(folder: Path, model: Darknet) -> dict[str, Any]:
    """The checkpoint that a run goes on from: `last.pt`, or `prev.pt` where that cannot be used.

    A `last.pt` that cannot be used is kept as `damaged.pt`, so that the next save does not make it the `prev.pt`.

    Args:
        folder: the run's folder of weights.
        model: of the run's network.

    Raises:
        CheckpointError: both are damaged, of another network, or without the state of a training.
    """
    last, previous = folder / "last.pt", folder / "prev.pt"
    try:
        return _training_state(last, model)
    except (WeightsError, CheckpointError) as failure:
        if not previous.exists():
            raise CheckpointError(str(failure)) from None
        reason = str(failure)
    try:
        checkpoint = _training_state(previous, model)
    except (WeightsError, CheckpointError) as failure:
        raise CheckpointError(f"{reason}; and {failure}") from None
    log(f"{reason}; going on from {previous}")
    os.replace(last, folder / "damaged.pt")
    link_file(previous, last)
    return checkpoint


def _training_state(path: Path, model: Darknet) -> dict[str, Any]:
    checkpoint = read_checkpoint(path)
    check_state(checkpoint["model"], model.network, path)
    missing = [key for key in STATE_KEYS if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{path}: has no {missing[0]!r}, so no training can go on from it")
    return checkpoint


def _from_checkpoint(model: Darknet, files: ModelFiles, pretrained: bool) -> Start:
    loaded = load_model(files)
    state, network = loaded.model.state_dict(), loaded.model.network
    note = f"{files.weights}: all {len(network.blocks)} layers loaded"
    if network.classes != files.network.classes:
        if not pretrained:
            raise other_classes(files.weights, network.classes, files.network.classes)
        heads = head_convolutions(network)
        state = {key: value for key, value in state.items() if _block(key) not in heads}
        note += f" but the heads of {network.classes} classes (layers {', '.join(map(str, heads))}), which start anew"
    if loaded.quantization is not None:
        note += (f"; it was quantized with --target {loaded.quantization.target}: its weights before rounding are "
                 "taken, and nothing else of that")  # fmt: skip
    _copy(model, state)
    return Start(model, tuple(dict(entry) for entry in loaded.lineage()), note, loaded.kept)


def _block(key: str) -> int:
    """Block number in a key of the state dict, `layers.<block>.<name>`."""
    return int(key.split(".")[1])


def _copy(model: Darknet, state: dict[str, torch.Tensor]) -> None:
    """Copy tensors into a model; what the state does not have stays, and quantizers of another model are left out."""
    own = model.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            if "quantize_" not in key:
                own[key].copy_(value)
