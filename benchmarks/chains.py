"""Real compressions: train, train sparse, prune, fine-tune; one section of docs/results.md each.

A step that is finished is not run again; a training that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trainings import (
    PICTURES,
    RUNS,
    STORED,
    TRAIN,
    describe_environment,
    measure,
    publish,
    python,
    train,
)
from utils.files import atomic_write_text, read_text
from utils.report.run_dir import read_results
from utils.report.tables import Column, markdown_table

SHOWN = {"sparse": ("gamma/epochs.png", "gamma/course.png"), "pruned": ("channels.png", "gamma.png", "detections.jpg")}
"""Pictures of the steps that are copied into the documentation."""
COLUMNS = ("map50", "map50_95", "parameters", "macs")


@dataclass(frozen=True)
class Chain:
    """One compression. A step is the flags of its script, beside those that all trainings have."""

    what: str
    cfg: str
    """`{shared}` in it is the folder of the real data, as in `data` and the steps."""
    data: str
    size: int
    base: tuple[str, ...]
    sparse: tuple[str, ...]
    prune: tuple[str, ...]
    """The script and its flags; the percentage is the one that is advised for the sparse network."""
    tuned: tuple[str, ...]
    publish: bool = False
    """Copy pictures into docs/images; only for data whose licence allows it."""

    def training(self, name: str, step: str, weights: Path | None, cfg: str | None = None) -> list[str]:
        """The arguments of python for one of the trainings."""
        shared = os.environ.get("DARKNET_SHARED", "../shared")
        own = [flag.format(shared=shared) for flag in getattr(self, step)]
        start = ["--weights", str(weights)] if weights else []
        files = ["--cfg", cfg or self.cfg.format(shared=shared), "--data", self.data.format(shared=shared)]
        return ["train.py", *files, *start, "--img_size", str(self.size), *TRAIN, *own,
                "--project", str(RUNS / name), "--name", step]  # fmt: skip


ROADSIGNS = "{shared}/data/roadsigns/roadsigns.data"
CHAINS = {
    "roadsigns-yolov3-tiny-slim": Chain(
        "21 classes, from COCO weights, no flips", "cfg/yolov3-tiny.cfg", ROADSIGNS, 224,
        base=("--epochs", "10", "-pt", "--no-flip", "--weights", "{shared}/data/weights/yolov3-tiny.weights"),
        sparse=("--epochs", "15", "--no-flip", "-sr", "--prune", "1", "--s", "auto"),
        prune=("slim_prune.py",),
        tuned=("--epochs", "8", "--no-flip"),
        publish=True,
    ),
}  # fmt: skip


def finish(name: str, chain: Chain) -> None:
    """Run what is left of a chain, and store what was found."""
    folder = RUNS / name
    data = chain.data.format(shared=os.environ.get("DARKNET_SHARED", "../shared"))
    weights = {step: folder / step / "weights" / "best.pt" for step in ("base", "sparse", "tuned")}
    commands = {"base": chain.training(name, "base", None)}
    train(folder / "base", commands["base"])
    commands["sparse"] = chain.training(name, "sparse", weights["base"])
    train(folder / "sparse", commands["sparse"])
    commands["pruned"], pruned = _prune(folder, chain, data, weights["sparse"])
    model = Path(pruned["weights"]).with_name("model.pt")
    commands["tuned"] = chain.training(name, "tuned", model, pruned["cfg"])
    train(folder / "tuned", commands["tuned"])
    steps = {step: measure(data, chain.size, path) for step, path in weights.items()}
    order = ("base", "sparse", "pruned", "tuned")
    document = {
        "row": name,
        "commands": [" ".join(["python", *commands[step]]) for step in order],
        **describe_environment(folder / "tuned"),
        "train_minutes": round(sum(_minutes(folder / step) for step in weights), 1),
        "percent": pruned["percent"],
        "ms": {when: pruned[when]["ms"] for when in ("before", "after")},
        "weights_bytes": {when: pruned[when]["weights_bytes"] for when in ("before", "after")},
        "certificate": pruned["certificate"],
        "steps": {
            step: {key: (pruned["after"] if step == "pruned" else steps[step])[key] for key in COLUMNS}
            for step in order
        },
    }
    STORED.mkdir(exist_ok=True)
    atomic_write_text(STORED / f"{name}.json", json.dumps(document, indent=2) + "\n")
    if chain.publish:
        PICTURES.mkdir(parents=True, exist_ok=True)
        for step, pictures in SHOWN.items():
            for picture in pictures:
                publish(folder / step / picture, PICTURES / _published(name, step, picture))


def _prune(folder: Path, chain: Chain, data: str, weights: Path) -> tuple[list[str], dict[str, Any]]:
    """Prune at the percentage that is advised, or take what was found before; the command and its JSON document."""
    stored = folder / "pruned.json"
    common = [*chain.prune, "--weights", str(weights), "--data", data, "--img_size", str(chain.size)]
    if not stored.exists():
        advice = json.loads(python(*common, "--percent", "0", "--dry-run", "--json"))["advised_percent"]
        command = [*common, "--percent", f"{advice:g}", "--project", str(folder), "--name", "pruned", "--json"]
        document = {"command": command, "percent": advice, **json.loads(python(*command))}
        atomic_write_text(stored, json.dumps(document, indent=2) + "\n")
    document = json.loads(read_text(stored))
    return [argument for argument in document["command"] if argument != "--json"], document


def _minutes(run: Path) -> float:
    return sum(read_results(run / "results.csv")["seconds"]) / 60


def _published(name: str, step: str, picture: str) -> str:
    return f"{name}_{step}_{picture.replace('/', '_')}"


def section(name: str, document: dict[str, Any]) -> list[str]:
    """Lines of docs/results.md for a chain."""
    chain = CHAINS[name]
    titles = {"base": "trained", "sparse": "sparse-trained", "pruned": f"pruned, --percent {document['percent']:g}",
              "tuned": "fine-tuned"}  # fmt: skip
    columns = ("", Column("AP50", ".3f"), Column("AP50-95", ".3f"), "parameters", Column("GMACs", ".3f"),
               Column(".weights MB", ".2f"), Column("ms", ".1f"))  # fmt: skip
    rows = []
    for step, title in titles.items():
        found = document["steps"][step]
        when = "before" if step in ("base", "sparse") else "after"
        rows.append((title, found["map50"], found["map50_95"], found["parameters"], found["macs"] / 1e9,
                     document["weights_bytes"][when] / 1e6, document["ms"][when]))  # fmt: skip
    lines = [f"## {name}", "", f"{chain.what}; @{chain.size}; {document['train_minutes']} minutes of training.", ""]
    lines += [markdown_table(columns, rows), "", *(f"    {command}" for command in document["commands"]), ""]
    lines += [f"Seed 0; {document['machine']}, {document['threads']} threads, PyTorch {document['torch']}, commit "
              f"{(document['commit'] or 'unknown')[:9]}. Milliseconds: median of forward passes of one picture, both "
              "networks in turn.", ""]  # fmt: skip
    if chain.publish:
        for step, pictures in SHOWN.items():
            for picture in pictures:
                lines += [f"![{step}: {picture}](images/{_published(name, step, picture)})", ""]
    return lines
