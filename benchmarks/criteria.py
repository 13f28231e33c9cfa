"""What ranks the channels that go: slim_prune.py with several flags beside torch-pruning, at equal multiply-adds.

All begin with one trained network, round widths to multiples of 8 and leave the heads whole. They are measured as cut,
and in rows that train again after one and the same distillation by the network before (--KDstr 4). Seconds are those of
scoring and cutting: of slim_prune.py from starting Python to the written file.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import peers, suite
from benchmarks.suite import BCCD, BF16, CHESS, ROADSIGNS, RUNS, SEEDS, TRAIN, DataSet, Document, Finished, PageSection
from benchmarks.trainings import accuracies
from utils.checkpoint import load_model, write_darknet
from utils.cli import require
from utils.darknet.cfg import format_network
from utils.darknet.data_file import load_data
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.index import index
from utils.errors import InputError
from utils.files import atomic_write_text, read_text, sha256
from utils.flags import choose_model
from utils.report.tables import Column

OURS = (
    "--importance gamma --reconstruct 0",
    "--importance gamma",
    "--importance taylor --rounds 1 --reconstruct 0",
    "--importance taylor --rounds 1",
    "--importance taylor --rounds 2",
    "--importance taylor --rounds 4",
)
PEERS = ("LAMP", "GroupTaylor", "BNScale", "GroupMagnitude")
CRITERIA = (*(f"slim_prune.py {flags}" for flags in OURS), *(f"torch-pruning {peer}" for peer in PEERS))
TUNED = tuple(CRITERIA[number] for number in (1, 3, 5, 6, 7))
"""The criteria of rows that train again: the best of each kind, as each takes 3 trainings."""


@dataclass(frozen=True)
class Criteria:
    """One network, cut by all criteria."""

    source: str
    """Row of the network before."""
    data: DataSet
    size: int
    epochs: int
    """Of the distillation."""
    flags: tuple[str, ...] = ()
    """Of train.py, beside."""
    shares: tuple[float, ...] = (0.5, 0.33, 0.25)
    """Of the multiply-adds that are left at most."""
    seeds: tuple[int, ...] = ()
    """Of the distillation; empty: there is none."""
    criteria: tuple[str, ...] = CRITERIA
    teacher: str = ""
    """Row of the network that teaches, where it is not the source."""

    def finish(self, name: str) -> Finished:
        """Cut by every criterion, train, and measure all at once.

        Raises:
            InputError: the row of the network before, or torch-pruning, is missing.
        """
        require(name, "torch_pruning")
        weights, folder = suite.weights_of(self.source), RUNS / name.partition("-tuned")[0]
        files: dict[str, object] = {"before": weights}
        trained: dict[str, list[str]] = {}
        networks = []
        for share, criterion in itertools.product(self.shares, self.criteria):
            network = self.cut(weights, folder, criterion, share)
            networks.append(network)
            files[network["name"]] = f"{network['cfg']}:{network['weights']}"
            runs = [self.distil(folder, network, seed) for seed in self.seeds]
            files |= {run.name: run / "weights" / "best.pt" for run in runs}
            trained[network["name"]] = [run.name for run in runs]
        document = suite.compare(self.data.flags(self.size), files)
        figures = {network["network"]: network for network in document.pop("networks")}
        document |= {"epochs": self.epochs if self.seeds else 0, "seeds": self.seeds, "before": figures["before"]}
        document["networks"] = []
        for network in networks:
            facts = {key: network[key] for key in ("criterion", "share", "seconds")}
            after = [figures[name] for name in trained[network["name"]]]
            document["networks"].append({**figures[network["name"]], **facts, "trained": after})
        return Finished(document)

    def cut(self, weights: Path, folder: Path, criterion: str, share: float) -> dict[str, Any]:
        """Prune by a criterion, or read what was pruned before: the document in the folder, with the files.

        Raises:
            InputError: the folder has it of another network, data set or size.
        """
        name = re.sub(r"[^\w.]+", "-", f"{criterion} {share:g}")
        path = folder / f"{name}.json"
        origin = {"source": sha256(weights), "data": suite.shared(self.data.file), "img_size": self.size}
        if path.exists():
            document = json.loads(read_text(path))
            if {key: document[key] for key in origin} != origin:
                raise InputError(f"{path}: of another network, data set or size; move {folder} away")
            return document
        path.parent.mkdir(parents=True, exist_ok=True)
        program, *flags = criterion.split()
        started = time.perf_counter()
        if program == "slim_prune.py":
            command = [program, "--weights", weights, *self.data.flags(self.size), "--target-macs", share]
            command += ["--multiple-of", 8, "--no-test", *flags, "--project", folder, "--name", name]
            pruned = json.loads(suite.python(*command, "--json"))
            files = {key: pruned[key] for key in ("cfg", "weights")}
        else:
            files = self.cut_by_peer(weights, folder / name, flags[0], share)
        seconds = round(time.perf_counter() - started, 1)
        document = {"name": name, "criterion": criterion, "share": share, **origin, **files, "seconds": seconds}
        atomic_write_text(path, json.dumps(document, indent=2) + "\n")
        return document

    def cut_by_peer(self, weights: Path, folder: Path, criterion: str, share: float) -> dict[str, str]:
        """Files of the network that torch-pruning leaves."""
        model, size = load_model(choose_model(None, str(weights))).model, (self.size, self.size)
        if criterion == peers.GRADIENT:
            data = load_data(suite.shared(self.data.file))
            peers.gradients(model, make_loader(DetectionDataset(index(data.train, data.names), size=size), 16))
        pruned = peers.prune(model, criterion, share, size)
        folder.mkdir(exist_ok=True)
        files = {key: folder / f"model.{key}" for key in ("cfg", "weights")}
        atomic_write_text(files["cfg"], format_network(pruned.network))
        write_darknet(files["weights"], pruned)
        return {key: str(path) for key, path in files.items()}

    def distil(self, folder: Path, network: Mapping[str, Any], seed: int) -> Path:
        """Run directory of a distillation that is finished."""
        run_dir, teacher = folder / f"{network['name']}-{self.epochs}-seed{seed}", self.teacher or self.source
        command = ["train.py", "--cfg", network["cfg"], "--weights", network["weights"], *self.data.flags(self.size)]
        command += ["--t_weights", suite.weights_of(teacher), "--KDstr", 4, "--epochs", self.epochs, "--seed", seed]
        suite.train(run_dir, *command, *TRAIN, *BF16, *self.flags, "--project", folder, "--name", run_dir.name)
        return run_dir


CUT = {
    "criteria-chess": Criteria("chess-yolov3-tiny", CHESS, 256, 25),
    "criteria-bccd": Criteria("bccd-yolov4-tiny", BCCD, 256, 20),
    "criteria-roadsigns": Criteria("roadsigns-yolov3-tiny-33", ROADSIGNS, 224, 8, ("--no-flip",)),
    "criteria-chess-sparse": Criteria("chess-yolov3-tiny-sparse", CHESS, 256, 25, teacher="chess-yolov3-tiny"),
}
ROWS = CUT | {
    f"{name}-tuned-{100 * share:.0f}": replace(row, shares=(share,), seeds=SEEDS, criteria=TUNED)
    for name, row in CUT.items()
    for share in row.shares
}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """A section for each network and share."""
    for name in [name for name in ROWS if name in stored]:
        document = stored[name]
        trained = bool(document["epochs"])
        after = ["trained: AP50", "AP50-95"] if trained else []
        columns = ["criterion", Column("MACs ≤", ".2f"), "AP50", "AP50-95", "parameters", "GMACs", Column("s", ".0f")]
        lines = [["before", None, *_figures(document["before"]), None, *(None for _ in after)]]
        for network in document["networks"]:
            line = [network["criterion"], network["share"], *_figures(network), network["seconds"]]
            lines.append(line + (accuracies(network["trained"]) if trained else []))
        distilled = f", then distilled for {document['epochs']} epochs, ± over seeds" if trained else ""
        what = f"{ROWS[name].source}, cut by our criteria of importance and torch-pruning's{distilled}."
        note = f"{document['images']} images. {suite.place(document)}"
        yield PageSection(name, what, columns + after, lines, note=note)


def _figures(network: Mapping[str, Any]) -> list[Any]:
    return [network["map50"], network["map50_95"], network["parameters"], network["macs"] / 1e9]
