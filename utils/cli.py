"""Command lines: one parser for all scripts, argument types, and errors as one line with an exit status.

Exit status: 0 ok, 1 a bug (traceback), 2 input or usage, 3 a run's own checkpoints, 4 numerics, 5 resources,
6 an infeasible plan, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import Field, field, fields
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TextIO, TypeVar

from utils import __version__
from utils.device import keep_freed_memory
from utils.errors import OUT_OF_RESOURCES, InputError, Interrupted, ResourceError, SuiteError, is_out_of_memory

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import DataclassInstance

_INTEGER = re.compile(r"[+-]?[0-9]{1,9}\Z")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?\Z")
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end a script as an exception would, so that it tidies up."""
SIGNALS = (*STOPS, signal.SIGINT)
"""That ask a script to end. A training hears them at its next step boundary; a worker leaves them to the main process.
A closed terminal is among them unless nohup has that ignored."""
STOPPED = {KeyboardInterrupt: ("interrupted", 130), BrokenPipeError: ("", 1)}
"""Line and exit status of a script that was stopped: by Ctrl-C, or by the end of what reads its output."""
CAUSES = (
    (ImportError, "failed to map segment", "out of memory; a library takes more"),
    (RuntimeError, "start new thread", "out of memory; one more thread needs some"),
    (RuntimeError, "DataLoader worker", "a process that reads images was ended (memory short?); fewer --workers"),
    (RuntimeError, "by peer", "another process of this training ended; its own message says why"),
    (OSError, "temporary directory", "no room for temporary files; set TMPDIR to a folder that can be written"),
)
"""Classes and words of failures with exit status 5, of the loader, torch, gloo and tempfile, and what they mean."""
LARGEST_SEED = 2**63 - 1
"""That a flag may ask for, as PyTorch's generators take."""
LARGEST_SIDE = 8192
"""Largest network input, in pixels, that a flag may ask for."""
REQUIREMENTS = {
    "openvino": "requirements-openvino.txt",
    "ai_edge_litert": "requirements-tflite.txt",
    **dict.fromkeys(("torch_pruning", "nncf", "tensorboard"), "requirements-dev.txt"),
    "optuna": "requirements-search.txt",
}
"""Files that list optional packages; requirements-export.txt has the others."""
EPOCHS_AFTER = "COMPRESS_EPOCHS_AFTER"
"""Environment variable of a stage of compress.py."""
MADE = "\n  `make demo` makes runs/demo; `python -m utils.data.toy --output runs/demo/data` only its images"
"""Appended to examples whose files a fresh clone does not have."""
SILENCE = 30.0
"""Seconds after which a log file gets a line about the work in progress."""
DELAY = 2.0
"""Seconds after which work gets a bar on a terminal."""
Settings = TypeVar("Settings", bound="DataclassInstance")
N = TypeVar("N", int, float)
OLD_FLAGS: Mapping[str, str] = {
    # of SpursLipu, tanluren, coldlarry, chumingqian, Lam1360 and ultralytics/yolov3
    "nms_thres": "it is --iou-thres",
    "transfer": "--freeze N leaves blocks 0…N-1 as they are",
    **dict.fromkeys(("mixedprecision", "mpt"), "it is --amp"),
    **dict.fromkeys(("ddp", "rank", "local_rank"), "torchrun --nproc_per_node=N train.py … trains with N processes"),
    **dict.fromkeys(
        ("accumulate", "nbs", "nominal_batch"),
        "batches are accumulated up to 64 images; a larger --batch-size is a larger step",
    ),
    "gray_scale": "a cfg with [net] channels=1 reads grey images",
    "arc": "the loss is that of YOLOv3; --hyp weights its terms",
    "prebias": "biases of the heads start where few objects are expected",
    "img_weights": "name images of rare classes several times in the list of train images",
    **dict.fromkeys(("maxabsscaler", "mas"), "images are scaled to 0…1, always"),
    "percent": "the pruners of channels have it; layer_prune.py removes --shortcuts N residual units",
    "truncated_layer": "the groups of a network are found in its cfg",
    "delta": "--target-macs finds the amount",
    "number": "--target-macs finds the amount without trials",
    "channel_base": "it is --multiple-of",
    "subset_len": "it is --calib",
    "shortcut_way": "--target says how sums are rounded",
    "qlevel": "--target says whether layers or channels have a scale",
    "qlayers": "--quant-first and --quant-heads say what stays float",
    **dict.fromkeys(
        ("quantized", "fpga", "bn_fold", "bn_flod", "a_bit", "w_bit"), "the file of --weights says how it is quantized"
    ),
    **dict.fromkeys(
        ("quantizer_output", "layer_idx", "reorder", "tn", "tm"),
        "export.py --format fpga writes the integers of all layers",
    ),
    # of this suite
    "bucket": "nothing is uploaded. Copy the run directory when the training is over",
    "memory_format": "tensors are channels-last, always",
    "s_coach": "--s auto measures AP50 after every epoch itself",
    "s_enough": "--s auto stops pressing on channels once --s-share of them are weak",
    "s_turn": "--s-schedule dynamic turns after 0.4 of the epochs, global after half of them",
    "s_keep": "--s-schedule dynamic keeps 0.65 of the channels under pressure",
    "s_solver": "soft thresholding goes with --s auto and with --adam, a sub-gradient with all else",
    "all_convs": "channels outside the classic ones need no sparse training; prune with --importance taylor",
    "kd_temperature": "it is 3, always",
    "kd_weighting": "the weights are those that measured best, see docs/distillation.md",
    "kd_mask": "--KDstr 5 looks at features near objects only",
    "dorefa_grid": "--quantized 2 rounds to levels with a 0, which can be exported",
    **dict.fromkeys(("ema", "no_ema"), "averaged weights are evaluated and kept, always"),
    "save_period": "last.pt and prev.pt are the last two epochs; copy what is to be kept",
    "evaluator": "AP equals pycocotools' to the last digit; pycocotools reads what test.py --save-json writes",
    "strict_data": "python -m utils.data.doctor lists what is wrong with a data set, and ends with status 2",
    "cache_dir": "the folder is that of $XDG_CACHE_HOME, or ~/.cache",
    "equalize": "it often did harm where each channel has a scale of its own; --bias-correction and --max-drop help",
    "sensitivity": "compare amounts with --dry-run; quantize.py --keep-float and --max-drop measure convolutions",
    "sensitivity_pictures": "--max-drop measures AP50 on all valid images of --data",
}
"""Flags of the older suites and of older versions that a script may not have, and what to do instead.

Names are in lower case, without dashes and with underscores."""


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose long flags take `-` for `_` and any case, and whose errors are one line.

    Args:
        description: docstring of the script; its first paragraph opens the help.
        example: a command that runs as printed; closes the help.
        program: how the help calls the script; the file's name by default.
    """

    def __init__(self, description: str | None, example: str = "", program: str | None = None) -> None:
        made = MADE if re.search("runs/demo/(data|journey)/", example) else ""
        super().__init__(
            prog=program,
            description=description,
            epilog=f"example:\n  {example}{made}" if example else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._negative_number_matcher = _NUMBER  # argparse's own takes -1e-3 for a flag
        self.add_argument("--version", action="version", version=__version__, help="print the version and exit")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """Parse after every known flag got its documented spelling; an unknown flag is an error."""
        given = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args([self._spelled(token) for token in given], namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        for action in self._actions:  # --weights "$W" with a W that is not set names the working folder
            if "" not in (action.default, action.const) and getattr(parsed, action.dest, None) == "":
                self.error(str(argparse.ArgumentError(action, "is empty; give a value, or leave the flag out")))
        return parsed, unknown

    def add_settings(self, title: str, *classes: type, without: Collection[str] = (), **defaults: Any) -> None:
        """Add a group with a flag for each field of the dataclasses that `flag` made; `settings_from` reads them.

        Args:
            title: of the group.
            classes: dataclasses.
            without: fields that are no flags of this script.
            defaults: of this script, where they are not those of the fields.
        """
        group = self.add_argument_group(title)
        for setting in (setting for kind in classes for setting in fields(kind) if "flags" in setting.metadata):
            if setting.name in without:
                continue
            options, default = dict(setting.metadata["options"]), defaults.get(setting.name, setting.default)
            if default is not None and not isinstance(default, bool) and "(default" not in options["help"]:
                options["help"] += " (default: %(default)s)"
            if isinstance(default, bool) and "action" not in options:
                options["action"] = "store_true"
            elif not {"action", "choices", "metavar"} & options.keys():
                options["metavar"] = METAVARS.get(options.get("type"))
            group.add_argument(*flag_names(setting), dest=setting.name, default=default, **options)

    def given(self, args: Sequence[str] | None = None) -> dict[str, Any]:
        """Values of the flags that a command line has, by their names, also where they are those of the defaults."""
        unset = object()
        names = dict.fromkeys((action.dest for action in self._actions), unset)
        parsed = vars(self.parse_args(args, argparse.Namespace(**names)))
        return {name: value for name, value in parsed.items() if value is not unset}

    def refusal(self, name: str, value: Any) -> str:
        """Reason why a flag does not take a value that was stored for it, as args.yaml has it; empty if it does."""
        action = next(action for action in self._actions if action.dest == name)
        try:
            for one in value if isinstance(value, list) else [value]:
                self._check_value(action, self._get_value(action, str(one)))
        except argparse.ArgumentError as error:
            return error.message
        return ""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """None: argparse would take `-hyp` for `-h` with a value."""
        return []

    def first_spelling(self, flag: str) -> str:
        """The first spelling of a flag, with its dashes; empty if it is none of this script."""
        flag = self._spelled(flag)
        action = self._option_string_actions.get(flag)
        if isinstance(action, argparse.BooleanOptionalAction):  # --flip and --no-flip say the opposite
            return flag
        return action.option_strings[0] if action else ""

    def error(self, message: str) -> NoReturn:
        """Raise InputError in place of argparse's usage block and exit."""
        match = re.match(r"argument (?:-[^-/]+/)?([^:/]+)[^:]*: (.*)", message, re.DOTALL)  # the first long spelling
        raise InputError(f"{match[1]}: {match[2]}" if match else message)

    def _spelled(self, token: str) -> str:
        if not token.startswith("-") or token in self._option_string_actions or _NUMBER.match(token):
            return token
        flag, equals, value = token.partition("=")
        known = {_plain(option): option for option in self._option_string_actions}
        return known.get(_plain(flag), flag) + equals + value

    def _unknown(self, token: str) -> str:
        if not token.startswith("-"):
            return f"unexpected argument {token!r}; see --help"
        flag = token.partition("=")[0]
        if reason := OLD_FLAGS.get(flag.lstrip("-").replace("-", "_").lower()):
            return f"{flag}: is no flag here; {reason}"
        near = difflib.get_close_matches(flag.replace("_", "-"), list(self._option_string_actions), n=1)
        return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def spelling(name: str) -> str:
    """A long flag as it is compared: `-` and `_` are the same, and so are `BN_Fold` and `bn-fold`."""
    return name.replace("_", "-").lower()


def _plain(flag: str) -> str:
    """A flag with its dashes as it is compared."""
    return spelling(flag) if flag.startswith("--") else flag.replace("_", "-")


def flag(default: Any, text: str, *names: str, **options: Any) -> Any:
    """Return a field of a settings dataclass that is a flag of the command line, too.

    Args:
        default: of the field and the flag; False makes a switch.
        text: help; its default is added.
        names: spellings of the flag; `--field-name` when left out.
        options: of `ArgumentParser.add_argument`.
    """
    return field(default=default, metadata={"flags": names, "options": {"help": text, **options}})


def flag_names(setting: Field) -> tuple[str, ...]:
    """Spellings of the flag of a field that `flag` made."""
    return setting.metadata["flags"] or (f"--{setting.name.replace('_', '-')}",)


def settings_from(args: argparse.Namespace, kind: type[Settings], **others: Any) -> Settings:
    """Return the dataclass filled from the flags that have the names of its fields; `others` override flags."""
    values = {setting.name: getattr(args, setting.name) for setting in fields(kind) if hasattr(args, setting.name)}
    return kind(**{**values, **others})


def require(why: str, *packages: str) -> None:
    """Refuse a missing package by the file to install it from; nothing is imported.

    Args:
        why: the flag or file that needs them.
        packages: names to import.

    Raises:
        InputError: one is not installed.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            file = REQUIREMENTS.get(package, "requirements-export.txt")
            raise InputError(f"{why}: needs the package {package}; pip install -r {file}")


def integer(text: str) -> int:
    """A decimal integer of at most nine digits; argparse type."""
    if not _INTEGER.match(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return int(text)


def random_seed(text: str) -> int:
    """A seed of what is random, 0 <= value <= LARGEST_SEED; argparse type."""
    if not re.fullmatch("[+-]?[0-9]{1,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    if not 0 <= (value := int(text)) <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text} is outside 0..{LARGEST_SEED}")
    return value


def number(text: str) -> float:
    """A finite decimal number; argparse type."""
    if not _NUMBER.match(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return float(text)


def bounded(kind: Callable[[str], N], allows: Callable[[N], bool], refusal: str) -> Callable[[str], N]:
    """Return an argparse type for numbers of a kind that are allowed; `refusal` says of others what is wrong."""

    def parse(text: str) -> N:
        if not allows(value := kind(text)):
            raise argparse.ArgumentTypeError(f"{text}{refusal}")
        return value

    return parse


positive_int = bounded(integer, lambda value: value >= 1, " is below 1, the smallest allowed")
non_negative_int = bounded(integer, lambda value: value >= 0, " is below 0, the smallest allowed")
image_side = bounded(integer, lambda value: 1 <= value <= LARGEST_SIDE, f" is outside 1..{LARGEST_SIDE} pixels")
fraction = bounded(number, lambda value: 0 <= value < 1, " is outside 0 <= value < 1")
share = bounded(number, lambda value: 0 < value < 1, " is outside 0 < value < 1")
threshold = bounded(number, lambda value: 0 <= value <= 1, " is outside 0 <= value <= 1")
points = bounded(number, lambda value: 0 < value <= 100, " is outside 0 < value <= 100")
"""Of AP."""
METAVARS: dict[Callable[[str], float] | None, str] = {
    None: "FILE",
    **dict.fromkeys((threshold, fraction, points), "P"),
    share: "S",
    **dict.fromkeys((positive_int, non_negative_int, random_seed, integer), "N"),
}
"""How --help calls the value of a flag, by its type; a flag without a type is a file."""


def input_size(sides: Sequence[int] | None, stride: int, default: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the network input from `--img_size N` or `--img_size H W`.

    Args:
        sides: what the flag gave; None when it was left out.
        stride: largest stride of the network, which must divide both sides.
        default: (height, width) of the cfg.

    Raises:
        InputError: more than two sides, or a side that is no multiple of `stride`.
    """
    if not sides:
        return default
    if len(sides) > 2:
        raise InputError(f"--img_size takes N or H W; got {len(sides)} numbers")
    for side in sides:
        if side % stride:
            near = max(stride, round(side / stride) * stride)
            raise InputError(f"--img_size {side}: not a multiple of {stride}, the network's stride; try {near}")
    return sides[0], sides[-1]


def processes() -> int:
    """Number of processes that torchrun started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def log(*texts: str) -> None:
    """Print progress or notes to stderr, where that works; of processes that train together only the first does."""
    for text in texts if leads() else ():
        ProgressBar.last_line = monotonic()
        with suppress(OSError):  # the line is written whole, beside a thread
            print(f"{one_line(text, keep_newlines=True)}\n", end="", file=sys.stderr, flush=True)


class ProgressBar:
    """Work in progress, to iterate over or to enter: a bar on a terminal, in a log file lines of `progress_in_log`.

    Args:
        title: of the work; empty: nothing is said while it is under way.
        items: to iterate over.
        total: number of steps (default: of the items).
        unit: name of the steps.
        done: steps that were done before.
    """

    under_way: ClassVar[list[ProgressBar]] = []
    """From the whole script to its innermost part, which is the one that lines are about."""
    last_line: ClassVar[float] = 0.0
    """Time of the last line of `log`."""

    def __init__(
        self, title: str, items: Iterable[Any] = (), total: int | None = None, unit: str = "", done: int = 0
    ) -> None:
        self.title, self.items, self.unit, self.done, self.first = title, items, unit, done, done
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.note, self.begun = "", monotonic()

    def __enter__(self) -> None:
        self.under_way.append(self)

    def __exit__(self, *_: object) -> None:
        if not self.title:  # another process wrote lines until now
            ProgressBar.last_line = monotonic()
        self.under_way.remove(self)

    def __iter__(self) -> Iterator[Any]:
        from tqdm import tqdm  # not at the head: importing it takes longer than some scripts

        hidden = None if leads() else True  # None: where stderr is no terminal
        with self, tqdm(None, self.title, self.total, False, initial=self.done, delay=DELAY, disable=hidden) as bar:
            for item in self.items:
                yield item
                self.done += 1
                bar.set_postfix_str(self.note, refresh=False)
                bar.update()

    def line(self) -> str:
        """Return steps done, time spent and time left."""
        spent, steps, note = monotonic() - self.begun, self.done - self.first, f"; {self.note}" if self.note else ""
        count = f"{self.done}{f' of {self.total}' if self.total else ''} {self.unit}, " if self.done else ""
        left = f", {duration(spent / steps * (self.total - self.done))} left" if self.total and steps else ""
        return f"{self.title}: {count}{duration(spent)}{left}{note}"


def duration(seconds: float) -> str:
    """Return a time as people say it, e.g. 45 s, 5 min, 2 h 10 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def progress_in_log(title: str) -> Iterator[None]:
    """Let a log file have a line of the innermost work under way where SILENCE seconds brought none.

    Args:
        title: of all that is done inside.
    """
    ended = Event()

    def report() -> None:
        while not ended.wait(max(SILENCE / 100, ProgressBar.last_line + SILENCE - monotonic())):
            work = ProgressBar.under_way[-1]
            if work.title and monotonic() >= ProgressBar.last_line + SILENCE:
                log(work.line())

    ProgressBar.last_line = monotonic()
    with ProgressBar(title):
        if sys.stderr is not None and not sys.stderr.isatty():
            with suppress(RuntimeError):  # a thread that memory does not suffice for is no reason to end
                Thread(target=report).start()
        try:
            yield
        finally:
            ended.set()


def one_line(text: str, *, keep_newlines: bool = False) -> str:
    """Text with its control characters escaped, so that a file name cannot forge a line or colour a terminal."""

    def shown(character: str) -> str:
        if character.isprintable() or (keep_newlines and character == "\n"):
            return character
        return character.encode("unicode_escape", "backslashreplace").decode("ascii")

    return "".join(map(shown, text))


def dashed(name: str) -> str:
    """A flag as a command line has it."""
    return f"-{name}" if name in ("sr", "pt") else f"--{name}"


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """Flags and their values as words of a command; those that are None or False are left out."""
    words = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list | tuple) else [value] * (value is not True)
            words += [dashed(name), *map(str, values)]
    return words


def command_of(script: str, **flags: Any) -> str:
    """A command as it is typed, with flags as of `flag_words`."""
    return typed(script, *flag_words(flags))


def typed(script: str, *words: str) -> str:
    """The command of another script as it is typed in this folder: `../test.py` after `python ../train.py`."""
    beside = os.path.join(os.path.dirname(sys.argv[0]), script)
    return shlex.join(["python", os.path.relpath(beside) if os.path.isfile(beside) else script, *words])


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one JSON document of a `--json` run to stdout, with its schema version."""
    print(json.dumps({"schema": 1, **document}, indent=2, allow_nan=False))


@contextmanager
def memory_for(batch: int, *, resumed: bool = False) -> Iterator[None]:
    """Context of work on batches of `batch` pictures, in which a lack of memory names the next smaller size to try.

    Args:
        batch: of --batch-size.
        resumed: it is that of a run that goes on, which cannot change it.

    Raises:
        ResourceError: memory does not suffice.
    """
    try:
        yield
    except Exception as failure:
        if isinstance(failure, SuiteError) or not is_out_of_memory(failure):
            raise
        smaller = f"--batch-size {batch // 2}" if batch > 1 else "a smaller --img_size"
        way_out = f"try {smaller}"
        if resumed:
            way_out = f"resume it where there is more, or start a new run from its last.pt with {smaller}"
        raise ResourceError(f"out of memory with --batch-size {batch}; {way_out} ({failure})") from failure


def run(main: Callable[[], None]) -> NoReturn:
    """Call a script's `main` and leave with the exit status of what happened; `--debug` keeps the traceback."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it; the next file would get its number and what is printed
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: names of files may be no text
    for number in STOPS:
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup SIGHUP is ignored, and must stay so
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    try:
        keep_freed_memory()
        with progress_in_log("at work"):
            main()
        sys.stdout.flush()
        _flush(sys.stderr)
    except (Exception, KeyboardInterrupt) as failure:
        status = explained(failure)
        if status is None:
            raise
        sys.exit(status)
    sys.exit(0)


def explain(kind: type[BaseException], failure: BaseException, trace: TracebackType | None) -> None:
    """Do for imports at the top of a script, which come before `run`, what this does for the rest; sys.excepthook."""
    status = explained(failure)
    if status is not None:
        sys.exit(status)
    sys.__excepthook__(kind, failure, trace)


sys.excepthook = explain


def explained(failure: BaseException) -> int | None:
    """Print the line that tells of a failure, and return its exit status; None for a bug."""
    report = STOPPED.get(type(failure)) or _report(failure)
    stopped = isinstance(failure, (Interrupted, *STOPPED))
    if report is None or ("--debug" in sys.argv and not stopped):
        return None
    message, status = report
    who = "" if leads() else f"process {os.environ['RANK']}: "
    with suppress(OSError):
        if not stopped:
            print(f"error: {who}{one_line(message)}", file=sys.stderr)
        elif message:
            log(message)
    _flush(sys.stdout, sys.stderr)
    return status


def _flush(*streams: TextIO) -> None:
    """Write what is left in streams, or drop it: at the exit it would be tried again, and change the exit status."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(failure: BaseException) -> tuple[str, int] | None:
    """Message and exit status of a failure; None for a bug."""
    if isinstance(failure, SuiteError):
        return str(failure), failure.exit_status
    for kind, words, meaning in CAUSES:
        if isinstance(failure, kind) and words in str(failure):
            return f"{meaning} ({str(failure).strip().splitlines()[-1]})", 5
    if is_out_of_memory(failure):
        return f"out of memory; use a smaller --img_size ({failure})", 5
    if isinstance(failure, OSError) and failure.errno in OUT_OF_RESOURCES:
        return f"{failure.filename or 'writing'}: {failure.strerror}", 5
    if isinstance(failure, OSError) and failure.filename is not None:
        return f"{failure.filename}: {failure.strerror}", 2
    return None
