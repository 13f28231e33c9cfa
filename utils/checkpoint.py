"""The one loader and the one writer of `.pt` files.

A checkpoint is a dict of tensors and plain values: `format`, `model` (state dict), `ema` (state dict or None), `cfg`
(text), `names`, `lineage`, and for a run that goes on `optimizer`, `progress` and what else an exact resume needs.
It is read with `torch.load(weights_only=True)` after the archive was checked; there is no way round that.

State dicts of other suites (ultralytics/yolov3 of 2019 to 2021, and what grew from it) are read too. Their names differ
(`module_list.0.Conv2d.weight`, `module_list.0.conv_0.weight`). Their order is that of the blocks, and in a block the
convolution precedes its batch normalisation. So their tensors are matched by order and shape.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import Darknet, load_arrays
from utils.darknet import cfg as cfg_file
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.network import adapt_classes, head_convolutions, same_network, tensors
from utils.errors import WeightsError
from utils.files import LARGEST_MODEL, atomic_path, foreign_errors, regular_file, sha256, utf8_path
from utils.flags import WAY_OUT, ModelFiles, adaptation, check_archive, is_legacy, other_network, with_own_anchors
from utils.quantization.quantizers import Phase, quantize, set_phase
from utils.quantization.scheme import QuantSettings

FORMAT = 1
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
"""Of tensors in a file; floating point becomes float32."""
PLAIN = (bool, int, float, str, dict, list, tuple)
"""Types of values in a checkpoint, beside tensors and None."""
MOST_VALUES, MOST_COPIES = 1 << 20, 8
"""Most values in a checkpoint, and largest size of its tensors as a multiple of the file size. A pickle may refer to
one object many times; this bounds what such a file can expand to."""
COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
"""Ends of names in files of other suites that are no weights; the last two come from thop, which counts operations."""
ORDER = ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
"""Tensors of a convolution in the order in which PyTorch's modules register them."""


class CheckpointEntry(NamedTuple):
    """An entry of a checkpoint."""

    kind: type
    items: type = object
    """Type of the values in it."""
    needed: bool = False
    """False: it may be missing or None."""


SCHEMA = {
    "model": CheckpointEntry(dict, Tensor, needed=True),
    "cfg": CheckpointEntry(str, needed=True),
    "names": CheckpointEntry(list, str, needed=True),
    "ema": CheckpointEntry(dict, Tensor),
    "lineage": CheckpointEntry(list, dict),
    **dict.fromkeys(("quantization", "args", "hyp", "plan", "progress", "optimizer", "scaler"), CheckpointEntry(dict)),
    "ema_updates": CheckpointEntry(int),
}
"""Entries of a checkpoint; `check_state` says which tensors a state dict has. Newer versions may have more entries."""


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
    """What was adapted, for the log."""
    quantization: QuantSettings | None = None
    """How its quantizers round; None for a float network."""
    no_flip: bool = False
    """Whether it was trained without mirrored pictures."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Flags of the training that made it; empty where no training did, as after pruning."""
    hyp: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters of that training."""

    def lineage(self, **more: Any) -> tuple[Mapping[str, Any], ...]:
        """The ancestors and the file itself, which is read once more for its sha256; `more` is noted of it."""
        if self.path is None:
            return ()
        return (*self.ancestors, origin(self.path) | ({"no_flip": True} if self.no_flip else {}) | more)


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
    ancestors = tuple(checkpoint.get("lineage") or ())
    model, settings = _with_slots(network, state, checkpoint.get("quantization"), files.weights)
    names = tuple(checkpoint["names"]) or None
    if names is not None and len(names) != network.classes:
        raise WeightsError(f"{files.weights}: {len(names)} names for {network.classes} classes; take another copy")
    made = {key: checkpoint.get(key) or {} for key in ("args", "hyp")}
    return LoadedModel(model, names, files.weights, ancestors, notes, settings, without_flips(checkpoint), **made)


def without_flips(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the last training behind a checkpoint had no mirrored pictures.

    A checkpoint of train.py has its hyper-parameters. What the other scripts make of it, e.g. a pruned network, has the
    entry `no_flip` of `LoadedModel.lineage`.
    """
    if hyp := checkpoint.get("hyp"):
        return hyp.get("flip_lr") == hyp.get("flip_ud") == 0
    weights = [entry for entry in (checkpoint.get("lineage") or ()) if entry.get("teacher") is None]
    return bool(weights) and weights[-1].get("no_flip") is True


def _with_slots(
    network: Network, state: Mapping[str, Tensor], quantization: Mapping[str, Any] | None, path: Path
) -> tuple[Darknet, QuantSettings | None]:
    """The model; a quantized one with its quantizers, which round, and how they do."""

    def prepare(model: Darknet) -> None:
        if settings is not None:
            quantize(model, settings)
        check_state(state, model, path)

    with foreign_errors(path, "is quantized in a way that is not understood", WeightsError):
        settings = None if quantization is None else QuantSettings(**quantization)
        model = load_arrays(network, state, prepare)
    if settings is not None:
        set_phase(model, Phase.FROZEN)
    return model, settings


def stored_network(path: Path, network: Network | None = None) -> Network:
    """The network inside a checkpoint, see `read_checkpoint`."""
    return cfg_file.parse(read_checkpoint(path, network)["cfg"], f"{path}!cfg")


def _network_of(checkpoint: Mapping[str, Any], files: ModelFiles) -> tuple[Network, tuple[str, ...]]:
    """The checkpoint's network, with the head settings of `--cfg` where that was given."""
    stored = cfg_file.parse(checkpoint["cfg"], f"{files.weights}!cfg")
    if files.network is None:
        return stored, ()
    assert files.weights is not None  # the checkpoint
    if not same_network(stored, files.network):
        raise other_network(files.weights, stored, files.network)
    network, anchors = with_own_anchors(files.network, stored, files.weights)
    network = adapt_classes(network, stored.classes)
    adapted = adaptation(files.network, network, f"the classes in {files.weights}")
    notes = [*checkpoint.get("notes", ()), *adapted, *anchors]
    trained, given = (f"{n.net.height} × {n.net.width}" for n in (stored, files.network))
    if trained != given:
        notes.append(
            f"{files.weights}: trained for {trained}, which is taken; "
            f"{files.network.path} says {given} (--img_size chooses)"
        )
    net = replace(network.net, height=stored.net.height, width=stored.net.width)
    return replace(network, net=net), tuple(notes)


def check_state(state: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    """Refuse a state dict whose keys, shapes or types are not those of a model; counters of batches may be missing.

    Raises:
        WeightsError: names the first tensor that differs.
    """
    expected = model.state_dict()
    for key, tensor in expected.items():
        shape = tuple(tensor.shape)
        if key not in state:
            if key.endswith("num_batches_tracked"):
                continue
            raise WeightsError(f"{path}: {key} is missing; it should have shape {shape}")
        if tuple(state[key].shape) != shape:
            raise WeightsError(f"{path}: {key} has shape {tuple(state[key].shape)}; {shape} was expected")
        if state[key].dtype != tensor.dtype:
            raise WeightsError(f"{path}: {key} is of {state[key].dtype}; {tensor.dtype} was expected")
    if extra := next((key for key in state if key not in expected), None):
        raise WeightsError(f"{path}: {extra} is no tensor of its network; take another copy")


def read_checkpoint(path: Path, network: Network | None = None) -> dict[str, Any]:
    """The dict inside one of our `.pt` files.

    Args:
        path: of the file.
        network: of `--cfg`; the tensors of another suite's file are fitted to it.

    Raises:
        WeightsError: damaged, holding NaN or infinity, or of another suite and not fitting `network`.
    """
    regular_file(path, WeightsError, LARGEST_MODEL)
    with foreign_errors(path, "cannot be read", WeightsError):
        is_zip = not is_legacy(path)
    if is_zip:
        check_archive(path)

    def unreadable(message: str) -> WeightsError:
        return WeightsError(f"{message}; only tensors are read; {WAY_OUT}")

    allowed, quiet = torch.serialization.safe_globals(_numpy_types()), warnings.catch_warnings()
    with foreign_errors(path, "not a checkpoint of tensors", unreadable), allowed, quiet, utf8_path(path) as name:
        warnings.simplefilter("ignore")  # of kinds of tensors that are refused below
        checkpoint = torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        checkpoint = _of_another_suite(checkpoint, network, path)
    _check_entries(checkpoint, path)
    for part in (name for name, entry in SCHEMA.items() if entry.items is Tensor):
        if state := checkpoint.get(part):
            checkpoint[part] = {key: _finite(tensor, f"{path}: {part} {key}") for key, tensor in state.items()}
    return checkpoint


def _check_entries(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Refuse entries of other kinds than SCHEMA says, and values of types that no checkpoint has.

    Raises:
        WeightsError: names the first.
    """
    for name, entry in SCHEMA.items():
        value = checkpoint.get(name)
        if value is None and not entry.needed:
            continue
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if not isinstance(value, entry.kind) or not all(isinstance(item, entry.items) for item in items):
            raise WeightsError(f"{path}: checkpoint without a usable {name!r}; take another copy")
    size, largest = 0, MOST_COPIES * path.stat().st_size
    for count, (name, value) in enumerate(_values(checkpoint)):
        if isinstance(value, Tensor):
            if not _is_dense(value):
                kind = f"{value.dtype}, {value.layout}, {value.device}"
                raise WeightsError(f"{path}: {name} is no dense tensor of real numbers ({kind}); take another copy")
            size += value.nbytes
        elif not (value is None or isinstance(value, PLAIN)):
            raise WeightsError(f"{path}: {name} is a {type(value).__name__}; values are numbers, texts and tensors")
        if count > MOST_VALUES or size > largest:
            raise WeightsError(f"{path}: more than {MOST_VALUES} values or {largest} bytes of tensors; {WAY_OUT}")


def _values(checkpoint: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every value at any depth, with its entry and its key; containers come before what they hold."""
    stack = list(checkpoint.items())
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{name.partition(' ')[0]} {key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            stack += [(name, item) for item in value]
        yield name, value


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has a number of its own for every element, on the CPU and of a type that is read."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and tensor.dtype in TYPES and tensor.nbytes <= tensor.untyped_storage().nbytes()


def _finite(tensor: Tensor, what: str) -> Tensor:
    """A tensor in float32, or the integers that it holds.

    Raises:
        WeightsError: a number is not finite; `what` names the tensor.
    """
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor
    if not torch.isfinite(tensor).all():
        raise WeightsError(f"{what} is not finite; take an earlier checkpoint")
    return tensor


def _of_another_suite(contents: Any, network: Network | None, path: Path) -> dict[str, Any]:
    """A checkpoint made of the tensors of another suite, without names."""
    state = _foreign_state(contents)
    if state is None:
        raise WeightsError(f"{path}: not a checkpoint of this suite (no format {FORMAT}), and no state dict; {WAY_OUT}")
    if network is None:
        raise WeightsError(
            f"{path}: tensors of another suite, which do not say their network; give --cfg, or --t_cfg of a teacher"
        )
    model, network = _renamed(state, network, path)
    note = f"{path}: {len(model)} tensors of another suite, taken in the order of the blocks in {network.path}"
    text = cfg_file.format_network(network)
    return {"format": FORMAT, "model": model, "ema": None, "cfg": text, "names": [], "notes": (note,)}


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
    **more: Any,
) -> dict[str, Any]:
    """Return the dict that a checkpoint holds.

    Args:
        state: tensors of the model by their keys.
        network: of the model.
        names: of its classes.
        lineage: what it was made from, oldest first.
        more: other entries, such as `quantization` of a quantized network: `QuantSettings.document`.
    """
    entries = [dict(entry) for entry in lineage]
    parts = {"model": dict(state), "ema": None, "cfg": cfg_file.format_network(network), "names": list(names)}
    return {**parts, "lineage": entries, "quantization": None, **more}


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


def origin(path: Path) -> dict[str, Any]:
    """What a lineage entry says of a file: its path as given and the sha256 of its bytes."""
    return {"path": str(path), "sha256": sha256(path)}


def _numpy_types() -> list[Any]:
    """Return what torch.load needs to read numpy's numbers and arrays; older suites stored `best_fitness` so."""
    functions: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    old_names = [(function, f"numpy.core.multiarray.{function.__name__}") for function in functions]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")]
    return [*functions, *old_names, *kinds, np.ndarray, np.dtype]


def _foreign_state(contents: Any) -> dict[str, Tensor] | None:
    """Return the state dict of a loaded file, bare or under a usual key; None where there is none."""
    if not isinstance(contents, Mapping):
        return None
    for inner in (contents.get("model"), contents.get("state_dict"), contents):
        if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return {str(key): value for key, value in inner.items()}
    return None


def _renamed(state: Mapping[str, Tensor], network: Network, path: Path) -> tuple[dict[str, Tensor], Network]:
    """Give the tensors of another suite the names of ours.

    Args:
        state: its state dict.
        network: of `--cfg`.
        path: of the file, for messages.

    Returns:
        The state dict, and the network with the class count of its heads.

    Raises:
        WeightsError: number, order or shapes are not those of the network.
    """
    theirs = [(name, tensor) for name, tensor in state.items() if not name.endswith(COUNTERS)]
    network = _with_classes(network, theirs)
    specs = _specs(network)
    for spec, (name, tensor) in zip(specs, theirs, strict=False):
        if tuple(tensor.shape) != spec.shape or not _same_role(spec.name, name):
            raise WeightsError(
                f"{path}: {name} has shape {tuple(tensor.shape)} where {network.path} has {spec.key} with shape "
                f"{spec.shape}; give the cfg that it was trained with"
            )
    if len(theirs) != len(specs):
        raise WeightsError(
            f"{path}: {len(theirs)} tensors, but {network.path} has {len(specs)}; give the cfg that it was trained with"
        )
    return {spec.key: tensor for spec, (_, tensor) in zip(specs, theirs, strict=True)}, network


def _specs(network: Network) -> list[Any]:
    """Tensors of the network in the order of PyTorch's modules."""
    rank = {name: number for number, name in enumerate(ORDER)}
    return sorted(tensors(network), key=lambda spec: (spec.block, rank.get(spec.name, 0)))


def _with_classes(network: Network, theirs: list[tuple[str, Tensor]]) -> Network:
    """The network with the class count that the width of the first head says."""
    keys = [(spec.block, spec.name) for spec in _specs(network)]
    head = keys.index((head_convolutions(network)[0], "conv.weight"))
    if head < len(theirs) and theirs[head][1].ndim:
        classes, rest = divmod(len(theirs[head][1]), len(network.yolos[0].mask))
        if not rest and classes > 5:
            return adapt_classes(network, classes - 5)
    return network


def _same_role(ours: str, theirs: str) -> bool:
    """Whether the last words of two names agree; shortcuts and gates have words of their own."""
    return ours not in ORDER or ours.rpartition(".")[2] == theirs.rpartition(".")[2]
