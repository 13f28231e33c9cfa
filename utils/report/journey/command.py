"""The command that started a run, as far as its files tell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SWITCHES = {"pretrain": "-pt", "sr": "-sr", "single_cls": "--single_cls", "adam": "--adam", "rect": "--rect",
            "multi_scale": "--multi-scale", "no_flip": "--no-flip", "all_convs": "--all-convs", "kd_mask": "--kd-mask",
            "BN_Fold": "--BN_Fold", "FPGA": "--FPGA", "decode": "--decode", "nms": "--nms", "half": "--half",
            "int8": "--int8", "dynamic_batch": "--dynamic-batch"}  # fmt: skip
"""Flags without a value that change what is made."""
LEFT_OUT = ("project", "name", "workers", "device", "evaluator", "mode", "cache", "cache_dir",
            "resume", "save_period", "nominal_batch", "output", "opset")  # fmt: skip
"""Flags that say where and how a run was done, not what came of it."""
LINE = 96
"""Characters of a line of a command, unless one flag has more."""
_FLAG = re.compile(r"--?[A-Za-z]")
ORIGINAL = ("img_size", "layer_keep", "t_cfg", "t_weights", "AT_str", "a_bit", "w_bit")
"""Flags that are documented with an underscore."""
SCRIPTS = {"prune": "{strategy}_prune.py", "quantize": "quantize.py",
           "export": "export.py"}  # fmt: skip
"""By kind of stage; all others are of train.py."""


def shown_command(kind: str, args: Mapping[str, Any], called: Sequence[str], plan: Mapping[str, Any]) -> str:
    """The command itself where it is known, else what args.yaml says of it; empty where there is neither.

    args.yaml has every flag, whether it was given or not, so of it the flags that matter are shown.

    Args:
        kind: of the stage.
        args: args.yaml.
        called: script and flags; empty where they are not known.
        plan: plan.json of a pruning.
    """
    if called:
        return shlex.join(["python", *called])
    if not args:
        return ""
    script = SCRIPTS.get(kind, "train.py").format(strategy=plan.get("strategy", "slim"))
    return shlex.join(["python", script, *_words(args)])


def _words(args: Mapping[str, Any]) -> Iterator[str]:
    """Flags with values that are something, and the switches that are on."""
    for key, value in args.items():
        if key in LEFT_OUT or (value is True and key not in SWITCHES):
            continue
        if value is True:
            yield SWITCHES[key]
        elif value not in (None, False, [], "") or (key == "prune" and value == 0 and args.get("sr")):
            yield f"--{key if key in ORIGINAL else key.replace('_', '-')}"
            values = value if isinstance(value, list) else [value]
            yield from (str(entry) for entry in values if isinstance(entry, str | int | float))


def wrapped(command: str) -> tuple[str, ...]:
    """A command in lines that a shell takes as one, broken before flags only."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes without an end
        return (command,)
    parts: list[list[str]] = []
    for word in words:
        if not parts or _FLAG.match(word):
            parts.append([])
        parts[-1].append(word)
    lines: list[str] = []
    for part in map(shlex.join, parts):
        if lines and len(lines[-1]) + len(part) < LINE:
            lines[-1] += f" {part}"
        else:
            lines.append(part if not lines else f"    {part}")
    return (*(f"{line} \\" for line in lines[:-1]), *lines[-1:])
