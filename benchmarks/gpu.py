"""What a GPU does in a second: training steps, a training that reads images, an evaluation, an image alone.

Nothing is downloaded: weights are random, images are drawn. It is meant to take less than 8 minutes. What the GPU
cannot do is left out and logged. `python -m benchmarks.results --rows gpu` keeps the figures for docs/results.md.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.ratios import Settings, Work, paired
from benchmarks.step import TimedTraining
from benchmarks.suite import Document, Finished, PageSection, machine, place, python
from models import Darknet, fuse, reduced
from utils.cli import Parser, flag, flag_words, log, positive_int, run, settings_from
from utils.darknet import cfg as cfg_file
from utils.data import toy
from utils.device import select_device
from utils.errors import SuiteError
from utils.report.run_dir import read_results
from utils.report.tables import Column

EXAMPLE = "python -m benchmarks.gpu --batch-size 32"
STEPS: dict[str, dict[str, Any]] = {
    **{f"--amp {name}": {"amp": name} for name in ("bf16", "fp16", "off")},
    **{"--compile": {"compiled": True}, "--KDstr 4": {"teaches_itself": True}, "-sr": {"sr": True, "prune": 1}},
}
"""Trainings whose steps are timed, and their flags; --amp is auto where nothing is said."""
COLUMNS = ("network", "what", *(Column(name, ".1f") for name in ("images a second", "ms", "waits, %", "GiB")))


@dataclass(frozen=True)
class GpuRow(Settings):
    """What is measured."""

    cfg: Sequence[str] = flag(("cfg/yolov4-tiny.cfg", "cfg/yolov4.cfg"), "networks", nargs="+", metavar="FILE")
    pictures: int = flag(512, "drawn images to train on, and to evaluate", type=positive_int, metavar="N")

    def finish(self, _: str) -> Finished:
        """Measure all, on the first GPU."""
        device, document = select_device("cuda"), machine()
        document["what"] = f"Input {self.img_size}, batches of {self.batch_size}, random weights."
        with tempfile.TemporaryDirectory() as folder:
            toy.build(Path(folder, "toy"), toy.ToyRecipe(self.pictures, self.pictures, self.img_size))
            lines = [[path, *line] for path in self.cfg for line in self.measured(path, device, folder)]
        return Finished(document | {"lines": lines})

    def measured(self, path: str, device: torch.device, folder: str) -> Iterator[list[Any]]:
        """Yield lines of a network, as in COLUMNS; the folder has a set of pictures, toy."""
        network, side = cfg_file.load(path), self.img_size
        for name, flags in STEPS.items():
            torch.cuda.empty_cache()
            try:
                ms = self.median(TimedTraining(Darknet(network), side, self.batch_size, "cuda:0", **flags).step)
            except (SuiteError, RuntimeError) as failure:
                log(f"{path}, {name}: {failure}; left out")
                continue
            free, memory = torch.cuda.mem_get_info(device)
            yield [f"step, {name}", 1000 * self.batch_size / ms, ms, None, (memory - free) / 2**30]
        flags = {"cfg": path, "data": f"{folder}/toy/toy.data", "project": folder, "name": Path(path).stem, "epochs": 2}
        flags |= {"img_size": side, "batch-size": self.batch_size, "nosave": True, "notest": True, "device": "0"}
        torch.cuda.empty_cache()
        python("train.py", *flag_words(flags))
        results = read_results(Path(folder, Path(path).stem, "results.csv"))
        yield ["train.py", self.pictures / results["seconds"][-1], None, 100 * results["loading"][-1], None]
        yield ["evaluation", self.pictures / results["test_seconds"][-1], None, None, None]
        plain, image = fuse(Darknet(network)).requires_grad_(False).to(device), torch.rand(1, 3, side, side).to(device)
        for name, model in (("float32", plain), ("float16", reduced(plain, torch.float16))):
            ms = self.median(lambda model=model: model(image).heads[0].cpu())
            yield [f"an image alone, {name}", 1000 / ms, ms, None, None]

    def median(self, work: Work) -> float:
        """Median milliseconds of some work."""
        return statistics.median(paired({"": work}, self.rounds)[""])


ROWS = {"gpu": GpuRow()}


def sections(stored: Mapping[str, Document]) -> Iterator[PageSection]:
    """A table of what was measured on a GPU, if anything was."""
    for document in [stored[name] for name in ROWS if name in stored]:
        note = f"GiB are those of the whole GPU. {place(document)}"
        yield PageSection("GPU", document["what"], COLUMNS, document["lines"], ["python -m benchmarks.gpu"], note)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a table and the row as JSON."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.gpu")
    parser.add_settings("what is measured", GpuRow)
    document = settings_from(parser.parse_args(argv), GpuRow).finish("").document
    print(*(section.markdown() for section in sections({"gpu": document})), json.dumps(document), sep="\n")


if __name__ == "__main__":
    run(main)
