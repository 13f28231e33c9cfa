"""Real compressions: train, train sparse, prune, fine-tune; one section of docs/results.md each.

A step that is finished is not run again; a training that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.rows import BF16
from benchmarks.trainings import RUNS, TRAIN, Finished, describe_environment, measure, python, shared, train
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Convolutional
from utils.files import atomic_write_text, read_text
from utils.report.run_dir import read_results
from utils.report.tables import Column, markdown_table

SHOWN = {
    "sparse": ("gamma/epochs.png", "gamma/course.png"),
    "pruned": ("channels.png", "importance.png", "detections.jpg"),
}
"""Pictures of the steps that are copied into the documentation."""
QUARTER = "a quarter of "
COLUMNS = ("map50", "map50_95", "parameters", "macs")


@dataclass(frozen=True)
class Chain:
    """One compression. A step is the flags of its script, beside those that all steps have."""

    what: str
    cfg: str
    """`{shared}` in it is the folder of the real data, as in `data` and the steps."""
    data: str
    size: int
    base: tuple[str, ...] | Path
    """Flags of the first training, or the run directory of another row whose network is taken."""
    sparse: tuple[str, ...]
    """Of the sparse training; empty: there is none."""
    prune: tuple[str, ...]
    """The script and its flags; without --percent it is the one that is advised."""
    tuned: tuple[str, ...] = ()
    """Of the fine-tuning; empty: there is none."""
    publish: bool = False
    """Copy pictures into docs/images; only for data whose licence allows it."""

    def training(self, folder: Path, step: str, weights: Path | None, cfg: str | None = None) -> list[str]:
        """The arguments of python for one of the trainings."""
        own = [flag.format(shared=shared()) for flag in getattr(self, step)]
        start = ["--weights", str(weights)] if weights else []
        cfg = cfg or quarter(self.cfg).format(shared=shared())
        files = ["--cfg", cfg, "--data", self.data.format(shared=shared())]
        return ["train.py", *files, *start, "--img_size", str(self.size), *TRAIN, *own,
                "--project", str(folder), "--name", step]  # fmt: skip


def quarter(path: str) -> str:
    """The cfg itself, or behind QUARTER one with a quarter of its widths, in multiples of 8, which is written."""
    if not path.startswith(QUARTER):
        return path
    network = cfg_file.load(path.removeprefix(QUARTER))
    heads = {head - 1 for head in network.heads}
    blocks = tuple(
        replace(block, filters=max(8, round(block.filters / 32) * 8))
        if isinstance(block, Convolutional) and i not in heads
        else block
        for i, block in enumerate(network.blocks)
    )
    narrow = RUNS / f"{Path(path).stem}-quarter.cfg"
    narrow.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(narrow, cfg_file.format_network(replace(network, blocks=blocks)))
    return str(narrow)


ROADSIGNS, BCCD = "{shared}/data/roadsigns/roadsigns.data", "{shared}/data/bccd/bccd.data"
TINY3, TINY4 = "cfg/yolov3-tiny.cfg", "cfg/yolov4-tiny.cfg"
NANO = "{shared}/data/weights/MobileNetV2-YOLOv3-Nano-coco"
SPARSE = ("-sr", "--prune", "1", "--s", "auto")
TUNED = ("--epochs", "8", "--no-flip")
GAMMA = ("--importance", "gamma")
PAPER = "roadsigns-yolov4-quarter"
"""Rows in the setting of Chu et al. (arXiv:2306.01526), with a quarter of yolov4's widths."""
TAUGHT = (
    "--no-flip",
    *BF16,
    "--t_weights",
    str(RUNS / PAPER / "base/weights/best.pt"),
    "--KDstr",
    "4",
    "--AT_str",
    "2",
)
GROUPS = ("group_prune.py", "--target-macs", "0.5", "--multiple-of", "8")
CHAINS = {
    "roadsigns-yolov3-tiny-slim": Chain(
        "21 classes, from COCO weights", TINY3, ROADSIGNS, 224,
        base=("--epochs", "10", "-pt", "--no-flip", "--weights", "{shared}/data/weights/yolov3-tiny.weights"),
        sparse=("--epochs", "15", "--no-flip", *SPARSE), prune=("slim_prune.py",), tuned=TUNED, publish=True,
    ),
    "roadsigns-yolov3-tiny-slim-dense": Chain(
        "the same without sparse training", TINY3, ROADSIGNS, 224, base=RUNS / "roadsigns-yolov3-tiny-slim" / "base",
        sparse=(), prune=("slim_prune.py", *GAMMA, "--percent", "0.5"), tuned=TUNED,
    ),
    "roadsigns-yolov3-tiny-33-slim": Chain(
        "from the network that was trained to its end", TINY3, ROADSIGNS, 224, base=RUNS / "roadsigns-yolov3-tiny-33",
        sparse=("--epochs", "15", "--no-flip", *SPARSE), prune=("slim_prune.py", "--percent", "0.3"),
        tuned=("--epochs", "15", "--no-flip"),
    ),
    "roadsigns-yolov3-tiny-33-gentle": Chain(
        "the same with less pressure and smaller steps of fine-tuning", TINY3, ROADSIGNS, 224,
        base=RUNS / "roadsigns-yolov3-tiny-33",
        sparse=("--epochs", "15", "--no-flip", *SPARSE, "--s-share", "0.35"),
        prune=("slim_prune.py", "--percent", "0.3"),
        tuned=("--epochs", "15", "--no-flip", "--hyp", "data/hyp.finetune.yaml"),
    ),
    "roadsigns-yolov3-tiny-33-half": Chain(
        "half of the multiply-adds of that sparse training, and more fine-tuning", TINY3, ROADSIGNS, 224,
        base=RUNS / "roadsigns-yolov3-tiny-33-gentle" / "sparse", sparse=(),
        prune=("slim_prune.py", "--target-macs", "0.5"),
        tuned=("--epochs", "24", "--no-flip", "--hyp", "data/hyp.finetune.yaml"),
    ),
    "roadsigns-nano-slim": Chain(
        "MobileNetV2-YOLOv3-Nano, which has residual units, from COCO weights", f"{NANO}.cfg", ROADSIGNS, 224,
        base=("--epochs", "10", "-pt", "--no-flip", "--weights", f"{NANO}.weights"),
        sparse=("--epochs", "15", "--no-flip", *SPARSE), prune=("slim_prune.py",), tuned=TUNED,
    ),
    **{
        f"roadsigns-nano-{script}": Chain(
            "the same network, another strategy", f"{NANO}.cfg", ROADSIGNS, 224,
            base=RUNS / "roadsigns-nano-slim" / "sparse",
            sparse=(), prune=(f"{script}_prune.py", *amount), tuned=TUNED if script == "layer_channel" else (),
        )
        for script, amount in {
            "shortcut": ("--percent", "0.3"), "layer": ("--shortcut", "3"),
            "layer_channel": ("--shortcut", "3", "--percent", "0.3"),
        }.items()
    },
    **{
        f"bccd-yolov4-tiny-{schedule}": Chain(
            f"15 sparse epochs, {schedule} s, slim at 0.5", TINY4, BCCD, 192, base=RUNS / "bccd-yolov4-tiny",
            sparse=("--epochs", "15", *SPARSE[:-1], "0.03", "--s-schedule", schedule),
            prune=("slim_prune.py", "--percent", "0.5"),
        )
        for schedule in ("dynamic", "constant")
    },
    **{
        f"roadsigns-yolov3-tiny-{script}-30": Chain(
            f"{script}_prune.py at 0.3", TINY3, ROADSIGNS, 224, base=RUNS / "roadsigns-yolov3-tiny-slim" / "sparse",
            sparse=(), prune=(f"{script}_prune.py", "--percent", "0.3"), tuned=TUNED,
        )
        for script in ("slim", "regular", "group")
    },
    PAPER: Chain(
        "yolov4 with a quarter of its widths, group_prune.py by taylor, KDstr 4 and AT 2", f"{QUARTER}cfg/yolov4.cfg",
        ROADSIGNS, 224, base=("--epochs", "60", "--no-flip", *BF16), sparse=(),
        prune=(*GROUPS, "--importance", "taylor"), tuned=("--epochs", "40", *TAUGHT),
    ),
    f"{PAPER}-dynamic": Chain(
        "the same by γ after dynamic sparse training, for as many epochs", f"{QUARTER}cfg/yolov4.cfg", ROADSIGNS, 224,
        base=RUNS / PAPER / "base", sparse=("--epochs", "15", "--no-flip", *BF16, *SPARSE),
        prune=(*GROUPS, *GAMMA), tuned=("--epochs", "25", *TAUGHT),
    ),
    "bccd-yolov4-tiny-slim": Chain(
        "3 classes", TINY4, BCCD, 256, base=RUNS / "bccd-yolov4-tiny",
        sparse=("--epochs", "20", *SPARSE), prune=("slim_prune.py",), tuned=("--epochs", "15"), publish=True,
    ),
    "bccd-yolov4-tiny-slim-dense": Chain(
        "the same without sparse training", TINY4, BCCD, 256, base=RUNS / "bccd-yolov4-tiny",
        sparse=(), prune=("slim_prune.py", *GAMMA, "--percent", "0.5"), tuned=("--epochs", "15"),
    ),
}  # fmt: skip
ORDER = ("base", "sparse", "pruned", "tuned")


def finish(name: str, chain: Chain) -> Finished:
    """Run what is left of a chain, and measure its networks."""
    folder, data = RUNS / name, chain.data.format(shared=shared())
    commands: dict[str, list[str]] = {}
    runs: dict[str, Path] = {}
    weights = None
    for step in ("base", "sparse"):
        flags = getattr(chain, step)
        if isinstance(flags, Path):
            runs[step] = flags
        elif flags:
            commands[step], runs[step] = chain.training(folder, step, weights), folder / step
            train(runs[step], commands[step])
        weights = runs[step] / "weights" / "best.pt" if flags else weights
    commands["pruned"], pruned = _prune(folder, chain, data, weights)
    if chain.tuned:
        model = Path(pruned["run_dir"]) / "model.pt"
        commands["tuned"], runs["tuned"] = chain.training(folder, "tuned", model, pruned["cfg"]), folder / "tuned"
        train(runs["tuned"], commands["tuned"])
    steps = {step: measure(data, chain.size, run / "weights" / "best.pt") for step, run in runs.items()}
    steps["pruned"] = pruned["after"]
    document = {
        "commands": [_told(commands[step]) for step in ORDER if step in commands],
        **describe_environment(Path(pruned["run_dir"])),
        "train_minutes": round(sum(_minutes(runs[step]) for step in commands if step in runs), 1),
        "percent": pruned["percent"],
        "shortcut": pruned["shortcut"],
        "ms": {when: pruned[when]["ms"] for when in ("before", "after")},
        "weights_bytes": {when: pruned[when]["weights_bytes"] for when in ("before", "after")},
        "certificate": pruned["certificate"],
        "silenced": pruned["silenced"],
        "steps": {step: {key: steps[step][key] for key in COLUMNS} for step in ORDER if step in steps},
    }
    shown = _pictures(chain) if chain.publish else ()
    return Finished(document, {_published(name, step, picture): folder / step / picture for step, picture in shown})


def _told(command: list[str]) -> str:
    """A command as it is written where the data lie in ../shared."""
    return " ".join(["python", *command]).replace(shared(), "../shared")


def _pictures(chain: Chain) -> list[tuple[str, str]]:
    return [
        (step, picture) for step, pictures in SHOWN.items() for picture in pictures if step != "sparse" or chain.sparse
    ]


def _prune(folder: Path, chain: Chain, data: str, weights: Path) -> tuple[list[str], dict[str, Any]]:
    """Prune, or take what was found before; the command and its JSON document."""
    stored = folder / "pruned.json"
    common = [*chain.prune, "--weights", str(weights), "--data", data, "--img_size", str(chain.size)]
    if not stored.exists():
        if not {"--percent", "--shortcut", "--target-macs"} & set(common):
            advice = json.loads(python(*common, "--percent", "0", "--dry-run", "--json"))["advised_percent"]
            common += ["--percent", f"{advice:g}"]
        command = [*common, "--project", str(folder), "--name", "pruned"]
        document = {**json.loads(python(*command, "--json")), "command": command}
        atomic_write_text(stored, json.dumps(document, indent=2) + "\n")
    document = json.loads(read_text(stored))
    return document["command"], document


def _minutes(run: Path) -> float:
    return sum(read_results(run / "results.csv")["seconds"]) / 60


def _published(name: str, step: str, picture: str) -> str:
    return f"{name}_{step}_{picture.replace('/', '_')}"


def section(name: str, document: dict[str, Any]) -> list[str]:
    """Lines of docs/results.md for a chain."""
    chain = CHAINS[name]
    amount = ", ".join(f"--{key} {document[key]:g}" for key in ("shortcut", "percent") if document.get(key) is not None)
    titles = {"base": "trained", "sparse": "sparse-trained", "pruned": f"pruned, {amount}", "tuned": "fine-tuned"}
    columns = ("", Column("AP50", ".3f"), Column("AP50-95", ".3f"), "parameters", Column("GMACs", ".3f"),
               Column(".weights MB", ".2f"), Column("ms", ".1f"))  # fmt: skip
    rows = []
    for step, found in document["steps"].items():
        when = "before" if step in ("base", "sparse") else "after"
        if step == "pruned":
            silenced = document["silenced"]
            rows.append(("removed channels silent, constants and all", silenced["map50"], silenced["map50_95"],
                         *(None,) * 4))  # fmt: skip
        rows.append((titles[step], found["map50"], found["map50_95"], found["parameters"], found["macs"] / 1e9,
                     document["weights_bytes"][when] / 1e6, document["ms"][when]))  # fmt: skip
    lines = [f"## {name}", "", f"{chain.what}; {chain.size} × {chain.size}; {document['train_minutes']} minutes of "
             "training.", ""]  # fmt: skip
    lines += [markdown_table(columns, rows), "", *(f"    {command}" for command in document["commands"]), ""]
    lines += [f"Seed 0; {document['machine']}, {document['threads']} threads, PyTorch {document['torch']}, commit "
              f"{(document['commit'] or 'unknown')[:9]}. Milliseconds: median of forward passes of one picture, both "
              "networks in turn.", ""]  # fmt: skip
    if chain.publish:
        for step, picture in _pictures(chain):
            lines += [f"![{step}: {picture}](images/{_published(name, step, picture)})", ""]
    return lines
