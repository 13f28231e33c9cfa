"""The one loader and the one writer of `.pt` files.

A checkpoint is a dict of tensors and plain values: `format`, `model` (state dict), `ema` (state dict or None), `cfg`
(text), `names`, `lineage`, and for a run that goes on `optimizer`, `epoch` and the other things an exact resume needs.
It is read with `torch.load(weights_only=True)` after the archive was checked; there is no way round that.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import Darknet, load_arrays
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.network import adapt_classes, same_network, tensors
from utils.errors import InputError, WeightsError
from utils.files import atomic_path, sha256
from utils.foreign import fitted, numpy_types, state_dict
from utils.model_files import (
    WAY_OUT,
    ModelFiles,
    adaptation,
    check_archive,
    is_legacy,
    other_network,
    with_anchors_of,
)
from utils.quantization.quantizers import Phase, quantize, set_phase
from utils.quantization.scheme import QuantSettings

FORMAT = 1


@dataclass(frozen=True)
class LoadedModel:
    """A model and what its file says of it."""

    model: Darknet
    names: tuple[str, ...] | None
    """Class names; None for a .weights file."""
    path: Path | None = None
    """The file of the weights; None for new ones."""
    ancestors: tuple[Mapping[str, Any], ...] = ()
    """What that file was made from, oldest first."""
    notes: tuple[str, ...] = ()
    """What was adapted, to be said."""
    kept: Mapping[str, Any] | None = None
    """Of a pruned network: where its channels come from, as `pruning.report.kept` writes it."""
    quantization: QuantSettings | None = None
    """How its quantizers round; None for a float network."""
    no_flip: bool = False
    """Whether it was trained without mirrored pictures."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Flags of the training that made it; empty where no training did, as after pruning."""
    hyp: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of that training."""

    def lineage(self) -> tuple[Mapping[str, Any], ...]:
        """The ancestors and the file itself, which is read once more for its sha256."""
        if self.path is None:
            return ()
        return (*self.ancestors, origin(self.path) | ({"no_flip": True} if self.no_flip else {}))


def load_model(files: ModelFiles) -> LoadedModel:
    """The model of a cfg and weights; the averaged (EMA) weights where a checkpoint has both.

    Raises:
        WeightsError: damaged, foreign, or for another network than `files.network`.
    """
    if files.weights is None or not files.is_checkpoint:
        assert files.network is not None  # only a checkpoint goes without
        if files.weights is None:
            return LoadedModel(Darknet(files.network), None)
        arrays = weights_file.read(files.weights, files.network)
        tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return LoadedModel(load_arrays(files.network, tensors), None, files.weights)
    checkpoint = read_checkpoint(files.weights, files.network)
    network, notes = _network_of(checkpoint, files)
    state = checkpoint["model"] if checkpoint.get("ema") is None else checkpoint["ema"]
    check_state(state, network, files.weights)
    ancestors = tuple(checkpoint.get("lineage", ()))
    model, settings = _with_slots(network, state, checkpoint.get("quantization"), files.weights)
    names, kept = tuple(checkpoint["names"]) or None, checkpoint.get("kept")
    made = {key: checkpoint.get(key) or {} for key in ("args", "hyp")}
    return LoadedModel(model, names, files.weights, ancestors, notes, kept, settings, without_flips(checkpoint), **made)


def without_flips(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the last training behind a checkpoint had no mirrored pictures.

    A checkpoint of train.py has its hyper-parameters. What the other scripts make of it, e.g. a pruned network, has the
    entry `no_flip` of `LoadedModel.lineage`.
    """
    if hyp := checkpoint.get("hyp"):
        return hyp.get("flip_lr") == hyp.get("flip_ud") == 0
    weights = [entry for entry in checkpoint.get("lineage", ()) if entry.get("teacher") is None]
    return bool(weights) and weights[-1].get("no_flip") is True


def _with_slots(
    network: Network, state: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, path: Path
) -> tuple[Darknet, QuantSettings | None]:
    """The model; a quantized one with its quantizers, which round, and how they do."""
    if quantization is None:
        return load_arrays(network, state), None
    try:
        settings = QuantSettings(**quantization)
        model = load_arrays(network, state, lambda model: quantize(model, settings))
    except (TypeError, ValueError, KeyError, RuntimeError, InputError) as failure:
        reason = str(failure).splitlines()[0]
        raise WeightsError(f"{path}: is quantized in a way that is not understood ({reason})") from None
    set_phase(model, Phase.FROZEN)
    return model, settings


def stored_network(path: Path) -> Network:
    """The network inside a checkpoint."""
    return cfg_file.parse(read_checkpoint(path)["cfg"], f"{path}!cfg")


def _network_of(checkpoint: Mapping[str, Any], files: ModelFiles) -> tuple[Network, tuple[str, ...]]:
    """The checkpoint's network, with the head settings of `--cfg` where that was given."""
    stored = cfg_file.parse(checkpoint["cfg"], f"{files.weights}!cfg")
    if files.network is None:
        return stored, ()
    if not same_network(stored, files.network):
        assert files.weights is not None  # the checkpoint
        raise other_network(files.weights, stored, files.network)
    network = adapt_classes(with_anchors_of(files.network, stored), stored.classes)
    notes = [*checkpoint.get("notes", ())]
    notes += adaptation(files.network, network, f"the classes in {files.weights}")
    if network.yolos != adapt_classes(files.network, stored.classes).yolos:
        notes.append(f"{files.weights}: its own anchors are taken in place of those in {files.network.path}")
    trained, given = (f"{n.net.height} × {n.net.width}" for n in (stored, files.network))
    if trained != given:
        notes.append(
            f"{files.weights}: trained for {trained}, which is taken; "
            f"{files.network.path} says {given} (--img_size chooses)"
        )
    net = replace(network.net, height=stored.net.height, width=stored.net.width)
    return replace(network, net=net), tuple(notes)


def check_state(state: Mapping[str, Tensor], network: Network, path: Path) -> None:
    """Refuse a state dict whose keys or shapes are not those of the network."""
    for spec in tensors(network):
        key, expected = spec.key, tuple(spec.shape)
        if key not in state:
            raise WeightsError(f"{path}: {key} is missing; it should have shape {expected}")
        if tuple(state[key].shape) != expected:
            raise WeightsError(f"{path}: {key} has shape {tuple(state[key].shape)}; {expected} was expected")


def read_checkpoint(path: Path, network: Network | None = None) -> dict[str, Any]:
    """The dict inside one of our `.pt` files.

    Args:
        path: of the file.
        network: of `--cfg`; the tensors of another suite's file are fitted to it.

    Raises:
        WeightsError: damaged, holding NaN or infinity, or of another suite and not fitting `network`.
    """
    is_zip = not is_legacy(path)
    if is_zip:
        check_archive(path)
    try:
        with torch.serialization.safe_globals(numpy_types()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception as failure:  # whatever a hostile file provokes inside the reader
        raise WeightsError(f"{path}: {_unreadable(str(failure))}; only tensors are read; {WAY_OUT}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        checkpoint = _of_another_suite(checkpoint, network, path)
    wanted = {"model": dict, "cfg": str, "names": list}
    wrong = [key for key, kind in wanted.items() if not isinstance(checkpoint.get(key), kind)]
    if wrong:
        raise WeightsError(f"{path}: checkpoint without a usable {wrong[0]!r}; take another copy")
    for part in ("model", "ema"):
        for key, tensor in (checkpoint.get(part) or {}).items():
            if not isinstance(tensor, Tensor) or (tensor.is_floating_point() and not torch.isfinite(tensor).all()):
                raise WeightsError(f"{path}: {part} {key} is not finite; take an earlier checkpoint")
    return checkpoint


def _of_another_suite(contents: Any, network: Network | None, path: Path) -> dict[str, Any]:
    """A checkpoint made of the tensors of another suite, without names."""
    state = state_dict(contents)
    if state is None:
        raise WeightsError(f"{path}: not a checkpoint of this suite (no format {FORMAT}), and no state dict; {WAY_OUT}")
    if network is None:
        raise WeightsError(f"{path}: tensors of another suite, which do not say their network; give --cfg")
    model, network = fitted(state, network, path)
    note = f"{path}: {len(model)} tensors of another suite, taken in the order of the blocks in {network.path}"
    text = cfg_file.format_network(network)
    return {"format": FORMAT, "model": model, "ema": None, "cfg": text, "names": [], "notes": (note,)}


def _unreadable(reason: str) -> str:
    """Why torch refused a file, in one short line."""
    if needs := re.search(r"GLOBAL ([\w.]+)", reason):
        return f"whole-module checkpoint (it needs {needs[1]})"
    return f"not a checkpoint of tensors ({reason.splitlines()[0][:120] if reason else 'unreadable'})"


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any], keep_previous: Path | None = None) -> None:
    """Write atomically; the file that stood there survives as `keep_previous`.

    Args:
        path: the `.pt` file.
        checkpoint: tensors and plain values; `format` is added.
        keep_previous: where a hard link to the old file goes, or a copy where there are no links.

    Raises:
        ResourceError: the disk is full or broken; the file that stood there is intact.
    """
    with atomic_path(path) as temporary:
        _save({"format": FORMAT, **checkpoint}, temporary)
        if keep_previous is not None and path.exists():
            link_file(path, keep_previous)


def model_document(
    state: Mapping[str, Tensor],
    network: Network,
    names: Sequence[str],
    lineage: Iterable[Mapping[str, Any]],
    *,
    kept: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the dict that a checkpoint holds.

    Args:
        state: tensors of the model by their keys.
        network: of the model.
        names: of its classes.
        lineage: what it was made from, oldest first.
        kept: of a pruned network: where its channels come from, as `pruning.report.kept` writes it.
        quantization: of a quantized network: `QuantSettings.document`.
        more: other entries.
    """
    entries = [dict(entry) for entry in lineage]
    parts = {"model": dict(state), "ema": None, "cfg": cfg_file.format_network(network), "names": list(names)}
    return {**parts, "lineage": entries, "kept": kept, "quantization": quantization, **more}


def write_darknet(path: Path, model: Darknet, seen: int = 0) -> None:
    """Write a model as a Darknet .weights file; `seen` is the number of pictures it was trained with."""
    arrays = {key: value.detach().cpu().float().numpy() for key, value in model.state_dict().items()}
    weights_file.write(path, model.network, arrays, weights_file.Header(seen=seen))


def link_file(path: Path, target: Path) -> None:
    """Make `target`, which may exist, the same file as `path`."""
    with atomic_path(target) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def _save(document: Mapping[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(document, file)
    except RuntimeError as failure:  # torch's archive writer hides why a write failed
        if isinstance(failure.__context__, OSError):
            raise failure.__context__ from None
        raise


def origin(path: Path) -> dict[str, str]:
    """What a lineage entry says of a file: its path as given and the sha256 of its bytes."""
    return {"path": str(path), "sha256": sha256(path)}
