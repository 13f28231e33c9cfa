"""Flags of train.py as settings, each written once, what follows from them, and flags of a resumed run; no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from utils.cli import (
    LARGEST_SIDE,
    OLD_FLAGS,
    flag,
    fraction,
    image_side,
    input_size,
    log,
    non_negative_int,
    number,
    points,
    positive_int,
    random_seed,
    settings_from,
    threshold,
)
from utils.darknet.blocks import Network
from utils.darknet.data_file import DataConfig
from utils.darknet.targets import check
from utils.device import AMP
from utils.distillation.strategies import AT, DEFAULT, KD, LARGEST_WEIGHT
from utils.errors import CheckpointError, InputError
from utils.files import read_yaml
from utils.flags import ModelFiles, device_name, worker_count
from utils.pruning.policy import SETS
from utils.quantization.scheme import SCHEMES, QuantSettings, SchemeFlags, notes
from utils.training.hyperparameters import Hyperparameters

TRIALS = 30
"""Trainings of a search, unless --evolve says how many."""
OLD_OFF = "-1"
"""Value of --prune, --KDstr and --AT_str in commands of the older suites that want none of it."""
MULTI_SCALE = (0.67, 1.5)
"""Smallest and largest side of --multi-scale relative to --img_size, as in the suites this one follows."""
AUTO: Literal["auto"] = "auto"
"""In place of a number: of --s, see `sparsity.Control`; of --batch-size, see `workflow.chosen_batch`."""
LARGEST_S = 10.0
OFF = (-1, 0)
"""Values of --quantized that switch it off."""
ALSO_GOOGLE = 3
"""The README of the suites this one follows has it in the example for Google's scheme."""


STUDY = "study.db"
"""What makes a folder that of a search."""
START = "start.yaml"
"""Hyper-parameters that a search starts from."""
MAY_CHANGE = ("amp", "compiled", "device", "workers", "tensorboard", "cache")
"""Flags that a resumed run takes from its command line."""
OF_NO_RUN = ("resume", "json", "debug", "exist_ok")
RENAMED = ("no_flip", "cache_images")
"""Flags of older versions whose values are elsewhere: in hyp.yaml, or may change."""
PATHS = ("data", "cfg", "weights", "t_cfg", "t_weights", "hyp")

UNUSED: Mapping[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(OLD_FLAGS, (None, False)),
    "memory_format": None,
    "kd_weighting": (None, "normalised"),
    "ema": (True,),
    "nominal_batch": (64,),
    "save_period": (0,),
    "evaluator": None,
}
"""Values of flags of older versions in args.yaml of runs that can go on; None: all of them mean what is done now."""


class RateSchedule(NamedTuple):
    """Channels that are penalised with s, and with a hundredth of s, in the course of a sparse training.

    Where `turn` is a whole number of epochs, the code of arXiv:2306.01526 turns one epoch later: there s is for
    epoch <= 0.4 · epochs, from 0. The paper's abstract does not decide it; here it is for exactly that share.
    """

    turn: float
    """Share of the epochs in which all are penalised with s."""
    weakest: float
    """Share of the channels, the weakest, that are so from then on; ranks are taken again at every step."""


SCHEDULES = {
    "dynamic": RateSchedule(0.4, 0.65),
    "constant": RateSchedule(1.0, 1.0),
    "global": RateSchedule(0.5, 0.0),
}
"""dynamic: that of Chu et al., arXiv:2306.01526; constant: Network Slimming's; global: s falls for all after half."""


def channel_set(text: str) -> int | None:
    """Which channels are trained sparse; None for -1, with which older suites leave it out. Argparse type."""
    chosen = strategy(map(str, SETS))(text)
    return None if chosen is None else int(chosen)


def strategy(names: Iterable[str]) -> Callable[[str], str | None]:
    """Return an argparse type for one of the names, and for -1, with which older suites leave it out."""
    names = tuple(names)

    def one_of(text: str) -> str | None:
        if text not in (*names, OLD_OFF):
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(names)})")
        return None if text == OLD_OFF else text

    return one_of


def rate_or_auto(text: str) -> float | Literal["auto"]:
    """A strength, 0 < s <= 10, or `auto`; argparse type."""
    return AUTO if text == AUTO else positive(text, LARGEST_S, f"s <= {LARGEST_S:g}; or {AUTO}")


def count_or_auto(text: str) -> int | Literal["auto"]:
    """A count, at least 1, or `auto`; argparse type."""
    return AUTO if text == AUTO else positive_int(text)


def positive(text: str, largest: float = LARGEST_WEIGHT, bound: str = "") -> float:
    """A number, 0 < value <= largest; argparse type."""
    if not 0 < (value := number(text)) <= largest:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 < {bound or f'value <= {largest:g}'}")
    return value


def listed(texts: Mapping[Any, str]) -> str:
    """Return choices of a flag and what they mean, for its help."""
    return "; ".join(f"{key}: {text}" for key, text in texts.items())


KINDS = listed({key: strategy.what for key, strategy in KD.items()})
MAPS = listed({key: strategy.what for key, strategy in AT.items()})


@dataclass(frozen=True)
class InputFlags:
    """Network, data set and weights to start from."""

    cfg: str | None = flag(None, "Darknet network description")
    data: str | None = flag(None, "data set: .data or data.yaml")
    weights: str | None = flag(None, "weights to start from, .pt or .weights (default: new ones)")
    pretrain: bool = flag(
        False, "accept a backbone (.conv.N), and heads of another class count, which start afresh", "-pt", "--pretrain"
    )
    single_cls: bool = flag(False, "all labels are one class")


@dataclass(frozen=True)
class ScheduleFlags:
    """Epochs, batches and optimizer."""

    epochs: int = flag(300, "passes over the images", type=positive_int)
    batch_size: int | Literal["auto"] = flag(
        16, f"images in a batch of a process, or {AUTO}: what fits a GPU's memory", type=count_or_auto, metavar="N"
    )
    hyp: str | None = flag(None, "hyper-parameters, YAML (default: the built-in ones; hyp.yaml of a run shows all)")
    evolve: int | None = flag(
        None, f"search --hyp in N trainings (default: {TRIALS})", type=positive_int, nargs="?", const=TRIALS
    )
    adam: bool = flag(False, "Adam (decoupled decay) in place of SGD")
    freeze: int = flag(0, "leave blocks 0…N-1 as they are", type=non_negative_int)
    patience: int = flag(0, "stop after N epochs without a better fitness (default: never)", type=non_negative_int)
    seed: int = flag(0, "all that is random follows from it (default: 0)", type=random_seed)


@dataclass(frozen=True)
class SparseFlags:
    """Sparse training: an L1 penalty s · Σ|γ| on the batch-norm scales of channels that pruning may remove."""

    sr: bool = flag(
        False, "L1-penalise γ of channels; best.pt is then the last epoch", "-sr", "--sparsity-regularization"
    )
    s: float | Literal["auto"] = flag(
        0.001, f"strength, or {AUTO}: as AP50 bears it", "--s", "--s-rate", type=rate_or_auto, metavar="S"
    )
    prune: Literal[0, 1, 2] = flag(
        0, f"which channels: {listed(SETS)} (default: 0)", type=channel_set, metavar="{0,1,2}"
    )
    s_schedule: str = flag(
        "dynamic",
        "dynamic: after 0.4 of the epochs only the weakest 0.65 of the channels feel all of s, the others a hundredth; "
        "constant; global: all a hundredth after half of the epochs",
        choices=tuple(SCHEDULES),
    )
    s_share: float = flag(0.5, f"share of channels that {AUTO} makes weak; each 0.01 takes 20 steps", type=threshold)
    s_drop: float = flag(3.0, f"points of AP50 below the best at which --s {AUTO} lets go", type=points, metavar="P")


@dataclass(frozen=True)
class DistillationFlags:
    """The teacher, and what is learnt from it."""

    t_cfg: str | None = flag(None, "network of the teacher; not needed where --t_weights is a .pt", "--t_cfg")
    t_weights: str | None = flag(None, "a trained network to learn from, .pt or .weights", "--t_weights")
    KDstr: str | None = flag(
        None,
        f"what is learnt: {KINDS} (default: {DEFAULT}, or none beside --AT_str)",
        "--KDstr",
        type=strategy(KD),
        metavar=f"{{{','.join(KD)}}}",
    )
    AT_str: str | None = flag(
        None,
        f"attention to learn, alone or beside --KDstr: {MAPS}",
        "--AT_str",
        type=strategy(AT),
        metavar=f"{{{','.join(AT)}}}",
    )
    kd_weight: float = flag(1.0, "factor on all that is learnt (default: 1)", type=positive, metavar="X")


@dataclass(frozen=True)
class QuantFlags(SchemeFlags):
    """--quantized and the flags that go with it."""

    quantized: int = flag(
        -1,
        "round weights and activations as integer arithmetic does: 1: Google (Jacob et al.), 2: DoReFa's weights, with "
        "Google's bounds of activations in place of DoReFa's clamp to 0…1; 0 or -1: off (default: off)",
        type=int,
        choices=(*OFF, *SCHEMES, ALSO_GOOGLE),
        metavar="{1,2}",
    )
    BN_Fold: bool = flag(
        False, "fold batch normalisation into the weights before they are rounded", "--BN_Fold", "--BN_Flod"
    )
    bit_warmup: float = flag(
        0.0, "share of the steps in which bits fall to --w_bit and --a_bit, 0 <= P < 1 (default: 0)", type=fraction
    )


@dataclass(frozen=True)
class PictureFlags:
    """Sizes and variations of the pictures."""

    img_size: Sequence[int] | None = flag(
        None,
        "side of the input: N, or MIN MAX [TEST] to vary it (default: the cfg's width and height)",
        "--img_size",
        type=image_side,
        nargs="+",
        metavar="N",
    )
    multi_scale: bool = flag(False, "vary the side between 0.67 and 1.5 times --img_size")
    rect: bool = flag(False, "batches of one shape each, as narrow as their images")
    flip: bool | None = flag(
        None,
        "mirrored images, or none where left and right differ (default: as in the training of a .pt of --weights; "
        "mirrored with -pt and without weights)",
        action=argparse.BooleanOptionalAction,
    )
    cache: Literal["ram", "disk"] | None = flag(
        None,
        "decode images once: ram (the same as no value) keeps them for this run, disk in a file for later ones, too",
        "--cache",
        "--cache-images",
        nargs="?",
        const="ram",
        choices=("ram", "disk"),
    )
    auto_anchors: bool = flag(False, "cluster the anchors from the data's boxes")


@dataclass(frozen=True)
class RunFlags:
    """Where a run is kept, and how it computes."""

    resume: str | None = flag(
        None, "go on with an interrupted run (default: the newest in --project)", nargs="?", const="", metavar="DIR"
    )
    project: str = flag("runs/train", "folder of the run directory", metavar="DIR")
    name: str = flag("exp", "name of the run directory, numbered if taken", metavar="NAME")
    exist_ok: bool = flag(False, "use the run directory even if it exists")
    nosave: bool = flag(False, "write checkpoints after the last epoch only")
    notest: bool = flag(False, "evaluate after the last epoch only")
    device: str = flag(
        "", "cpu, cuda, or the number of a GPU (default: a GPU if there is one)", type=device_name, metavar="D"
    )
    sync_bn: bool = flag(False, "batch normalisation over the images of all processes, with torchrun on GPUs")
    amp: str = flag(
        "auto",
        "type that the network computes in: auto is bf16 where a GPU has it, else fp16. On a CPU auto and fp16 are "
        "float32, and bf16 takes half the time where it has AMX. off is float32 (TF32 in steps of a GPU). --quantized "
        "and what heads read are always float32 without TF32",
        choices=AMP,
    )
    compiled: bool = flag(False, "torch.compile of the network: minutes at first, then faster steps", "--compile")
    workers: int | None = flag(
        None, "processes that read (default: cores / processes of torchrun, at most 8)", type=worker_count, metavar="N"
    )
    tensorboard: bool = flag(False, "write events for TensorBoard into the run directory")
    json: bool = flag(False, "print one JSON document")


GROUPS = {
    "model and data": InputFlags,
    "schedule": ScheduleFlags,
    "sparse training": SparseFlags,
    "distillation": DistillationFlags,
    "quantization-aware training": QuantFlags,
    "images": PictureFlags,
    "run": RunFlags,
}
"""Groups of --help."""
SPELLINGS = {setting.name: setting.metadata["flags"] for kind in GROUPS.values() for setting in fields(kind)}


@dataclass(frozen=True)
class TrainSettings(RunFlags, PictureFlags, QuantFlags, DistillationFlags, SparseFlags, ScheduleFlags, InputFlags):
    """All flags of a run, and what follows from them and the network."""

    size: tuple[int, int] = (416, 416)
    """Height and width of the network input."""
    test_size: tuple[int, int] = (416, 416)
    """Height and width when evaluating."""
    sizes: tuple[int, int] | None = None
    """Smallest and largest side of a multi-scale run; None: always `size`."""
    accumulate: int = 1
    """Batches in an optimizer step."""
    quant: QuantSettings | None = None
    """Train with rounded weights and activations."""

    @property
    def precision(self) -> str:
        """`amp`, but "off" with quantization: 16 bits do not hold the values of the grids of evaluations and files."""
        return "off" if self.quant else self.amp

    @property
    def proximal(self) -> bool:
        """Soft thresholding after the step (ISTA; Ye et al., arXiv:1802.00124), in place of a sub-gradient before it.

        It gives exact zeros. Adam would scale a sub-gradient away, and with --s auto it swings around zero.
        """
        return self.adam or self.s == AUTO


@dataclass(frozen=True)
class TrainPlan:
    """A training, checked as far as it can be without torch and without the pictures."""

    settings: TrainSettings
    files: ModelFiles
    """The network, adapted to the data, and the weights to start from."""
    data: DataConfig
    hyp: Hyperparameters
    args: Mapping[str, Any]
    """The flags, for args.yaml."""
    teacher: ModelFiles | None = None
    resume: Path | None = None
    """Run directory to go on with."""

    @property
    def network(self) -> Network:
        """What is trained."""
        assert self.files.network is not None  # a plan without one is refused
        return self.files.network

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the run."""
        return ("object",) if self.settings.single_cls else self.data.names


def flag_name(name: str) -> str:
    """Return a flag as it is typed, by the name of its field."""
    return (*SPELLINGS.get(name, ()), f"--{name.replace('_', '-')}")[0]


def check_flags(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuse flags that mean nothing without others, or contradict them.

    Args:
        args: all flags.
        given: those of the command line.

    Raises:
        InputError: names the flag.
    """
    groups = (
        (args.sr, SparseFlags, "says how to train sparse; add -sr, or leave it out"),
        (
            args.t_cfg or args.t_weights,
            DistillationFlags,
            "there is nobody to learn from; add --t_weights (and --t_cfg for a .weights)",
        ),
        (args.quantized not in OFF, QuantFlags, "says how to quantize; add --quantized 1 or 2, or leave it out"),
    )
    for wanted, kind, reason in groups:
        names = [setting.name for setting in fields(kind) if given.get(setting.name) is not None]
        names = [name for name in names if name != "quantized"]
        if names and not wanted:
            raise InputError(f"{flag_name(names[0])}: {reason}")
    if args.nosave and args.patience:
        raise InputError("--patience: needs the best weights kept; leave out --nosave")
    if args.notest and args.patience:
        raise InputError("--patience: needs a fitness of every epoch; leave out --notest")
    if args.pretrain and args.weights is None:
        raise InputError("-pt: goes with --weights, whose heads may start with new weights")
    if args.t_cfg and not args.t_weights:
        raise InputError(f"--t_cfg {args.t_cfg}: a teacher needs what it has learnt; add --t_weights")
    if args.sr:
        _check_sparse(args, given)


def _check_sparse(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    if args.prune is None:
        raise InputError(f"--prune {OLD_OFF}: with -sr, say which channels: {listed(SETS)}")
    if args.patience:
        raise InputError("--patience: a sparse training goes to its end, the last epoch is the sparsest; leave it out")
    if args.evolve:
        raise InputError("--evolve: looks for the best training, which is none with -sr; leave one of them out")
    if args.s == AUTO and "s_schedule" in given:
        raise InputError(f"--s-schedule: --s {AUTO} chooses the channels itself; leave it out, or give --s a number")
    for name in ("s_share", "s_drop"):
        if args.s != AUTO and name in given:
            raise InputError(f"{flag_name(name)}: goes with --s {AUTO}")
    if args.s == AUTO and args.notest:
        raise InputError(f"--s {AUTO}: is guided by AP50 after every epoch; leave out --notest, or give --s a number")


def quantization(args: argparse.Namespace, network: Network) -> QuantSettings | None:
    """Return the quantization of a network that the flags ask for; None without --quantized.

    Raises:
        InputError: flags that contradict one another, or an activation that the target cannot compute.
    """
    if args.quantized in OFF:
        return None
    if args.quantized == ALSO_GOOGLE:
        log("--quantized 3: is taken for 1, Google's scheme, as the README of earlier suites has it")
    flags = settings_from(args, QuantFlags)
    settings = flags.settings(SCHEMES.get(args.quantized, SCHEMES[1]), fold=flags.BN_Fold)
    log(*notes(settings), *check(network, settings.target))
    return settings


def input_sizes(args: argparse.Namespace, default: tuple[int, int], stride: int) -> dict[str, Any]:
    """Return `size`, `test_size` and `sizes` of TrainSettings, as --img_size, --multi-scale and --rect ask for them.

    Args:
        args: the flags.
        default: height and width of the cfg.
        stride: the network's, of which sides are multiples.

    Raises:
        InputError: sides that are no such multiples, or flags that contradict one another.
    """
    sides = args.img_size or []
    if args.rect and (args.multi_scale or len(sides) > 1):
        raise InputError("--rect: batches take their shape from their images; leave out --multi-scale and MIN MAX")
    if len(sides) > 3:
        raise InputError(f"--img_size: takes N or MIN MAX [TEST]; got {len(sides)} numbers")
    for side in sides:
        input_size([side], stride, default)
    if len(sides) < 2:
        size = (sides[0], sides[0]) if sides else default
        if not args.multi_scale:
            return {"size": size, "test_size": size}
        low, high = (round(max(size) * share / stride) * stride for share in MULTI_SCALE)
        return {"size": size, "test_size": size, "sizes": (max(stride, low), min(LARGEST_SIDE, high))}
    if args.multi_scale:
        raise InputError("--multi-scale: --img_size MIN MAX gives the range already; leave one of them out")
    low, high, test = sides[0], sides[1], sides[-1]
    if low > high:
        raise InputError(f"--img_size {low} {high}: MIN is above MAX")
    return {"size": (high, high), "test_size": (test, test), "sizes": (low, high)}


def newest_run(project: Path) -> Path:
    """Return the folder in `project` that a run or a search wrote to last.

    Raises:
        CheckpointError: there is none.
    """
    written = [path for name in ("weights/last.pt", STUDY) for path in project.glob(f"*/{name}")]
    if not written:
        raise CheckpointError(f"--resume: no run in {project} has a weights/last.pt or a {STUDY}")
    newest = max(written, key=lambda path: path.stat().st_mtime_ns)
    return project / newest.relative_to(project).parts[0]


def is_search(folder: Path) -> bool:
    """Whether a folder is that of a search over hyper-parameters."""
    return (folder / STUDY).is_file()


def stored_flags(folder: Path, known: Mapping[str, Any], refusal: Callable[[str, Any], str]) -> dict[str, Any]:
    """Return the flags that the run in `folder` was started with, without those that have their default or are gone.

    Args:
        folder: of the run.
        known: flags of this version.
        refusal: reason why one does not take a value, or nothing.

    Raises:
        CheckpointError: a file of the run is missing, or its args.yaml is none, or has an unknown flag or value.
    """
    parts = (START,) if is_search(folder) else ("hyp.yaml", "weights/last.pt")
    for name in ("args.yaml", "model.cfg", *parts):
        if not (folder / name).is_file():
            raise CheckpointError(f"--resume {folder}: {name} is missing; give the folder of a run, as runs/train/exp")
    stored = read_yaml(folder / "args.yaml", CheckpointError)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{folder}/args.yaml: not a mapping of flags; it is no run that can go on")
    flags = {}
    for name, value in stored.items():
        if name in RENAMED or (name in UNUSED and ((unused := UNUSED[name]) is None or value in unused)):
            continue
        if name not in known:
            raise CheckpointError(f"{folder}/args.yaml: unknown flag {name!r}; it is of another version")
        if value is None:  # what older versions have for a default
            continue
        if reason := refusal(name, value):
            raise CheckpointError(f"{folder}/args.yaml: {flag_name(name)}: {reason}; it is of another version")
        flags[name] = value
    return flags


def changed_flags(folder: Path, run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags on the command line that change something in the run: `MAY_CHANGE`, and a search's trials.

    Args:
        folder: of the run.
        run: all its flags.
        given: flags on the command line, without defaults.

    Raises:
        InputError: another flag has another value than the run's.
    """
    free = (*MAY_CHANGE, *(("evolve",) if is_search(folder) else ()))
    place = {"project": str(folder.parent), "name": folder.name}
    for key, value in given.items():
        known = [flags[key] for flags in (run, place) if key in flags]
        if key in free or key in OF_NO_RUN or any(_same(key, value, other) for other in known):
            continue
        raise InputError(
            f"--resume {folder}: {flag_name(key)} is {value!r} here and {run[key]!r} in the run; leave it out to go on "
            "with the run, or start a new one"
        )
    return {key: given[key] for key in free if key in given}


def _same(key: str, value: Any, other: Any) -> bool:
    if key in (*PATHS, "project") and value is not None and other is not None:
        return Path(value).absolute() == Path(other).absolute()
    return value == other
