"""What a step with distillation costs beside a step without and the teacher's forward pass.

The student is made here, from the network with random γ by removing --percent of its channels; the teacher is the
network itself. Pictures and boxes are random. A step is forward, loss and backward; the teacher is fused, and gives
beside its heads what the strategy wants, but not where it is measured alone. The three are run in turn, in one process,
for every strategy; then its terms alone, forward and backward from outputs that are there already. The ratio is that of
the step with distillation to step + teacher: 1 if the terms cost nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models import Darknet, Outputs, load_arrays
from utils.cli import Parser, fraction, image_side, log, positive_int, random_seed, run
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Network
from utils.detection.settings import ASSIGNMENTS, LossSettings
from utils.distillation.matching import Kept
from utils.distillation.strategies import AT, KD, Distillation, distillation
from utils.distillation.terms import Distiller, Teacher
from utils.graph import channel_graph
from utils.pruning.policy import ChannelPolicy
from utils.pruning.report import kept
from utils.pruning.surgery import arrays_of, gammas_of, prune_network
from utils.pruning.target import Amount, make_plan
from utils.report.latency import interleaved
from utils.report.run_dir import environment
from utils.report.tables import Column, markdown_table
from utils.training.objective import Objective
from utils.training.team import Team

EXAMPLE = "python -m benchmarks.distil --KDstr 3 cwd --AT_str 2 --img_size 256 --batch-size 16"
FORMAT = torch.channels_last
SETTINGS = LossSettings()
OBJECTS = 10
"""Boxes in a picture."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, program="python -m benchmarks.distil")
    add = parser.add_argument_group("what is measured").add_argument
    add("--cfg", default="cfg/yolov4-tiny.cfg", metavar="FILE", help="network of the teacher (default: %(default)s)")
    add("--percent", type=fraction, default=0.5, metavar="P", help="of its channels the student lacks (default: 0.5)")
    add("--KDstr", nargs="+", default=[], choices=tuple(KD), help="strategies (default: all, unless --AT_str is given)")
    add("--AT_str", nargs="+", default=[], choices=tuple(AT), help="strategies (default: all, unless --KDstr is given)")
    add("--img_size", type=image_side, default=256, metavar="N", help="side of the input (default: %(default)s)")
    add("--batch-size", type=positive_int, default=16, metavar="N", help="pictures (default: %(default)s)")
    add("--rounds", type=positive_int, default=20, metavar="N", help="of each strategy (default: %(default)s)")
    add("--seed", type=random_seed, default=0, metavar="N", help="of everything random (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.KDstr and not args.AT_str:
        args.KDstr, args.AT_str = list(KD), list(AT)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row a strategy."""
    args = parse_args(argv)
    distillations = [distillation(key, None) for key in args.KDstr] + [distillation(None, key) for key in args.AT_str]
    torch.manual_seed(args.seed)
    network = cfg_file.load(args.cfg)
    pair = make_pair(network, args.percent, args.batch_size, args.img_size)
    rows = []
    for chosen in distillations:
        log(f"{chosen.name}: {', '.join(chosen.terms)}")
        rows.append((chosen.name, *pair.measure(chosen, args.rounds)))
    milliseconds = (Column(title, ".1f") for title in ("step ms", "teacher ms", "step with distillation ms"))
    columns = ("strategy", *milliseconds, Column("ratio"), "costliest term", Column("its share", ".1%"))
    print(markdown_table(columns, rows))
    print(f"{args.cfg}, --percent {args.percent:g}, {args.img_size} × {args.img_size}, batch {args.batch_size}, "
          f"{OBJECTS} boxes a picture, medians of {args.rounds} rounds in turn; "
          f"{environment()['cpu']}, threads: {torch.get_num_threads()}, PyTorch {torch.__version__}, "
          f"seed {args.seed}")  # fmt: skip


@dataclass(frozen=True)
class NetworkPair:
    """A student, its teacher and one batch."""

    student: Darknet
    teacher: Teacher
    kept: Kept
    images: Tensor
    """[B, C, H, W], 0…1."""
    targets: Tensor
    """[N, 6] picture, class, cx, cy, w, h; boxes as fractions of the network input."""

    def measure(self, chosen: Distillation, rounds: int) -> tuple[float, float, float, float, str, float]:
        """Milliseconds of step, teacher, and step with distillation; the ratio of the last to the sum of the others.

        Then the term that takes longest, and its share of that sum.
        """
        distiller = self.distiller(chosen)
        plain = Objective(self.student, SETTINGS, None, Team(torch.device("cpu")))
        distilled = Objective(self.student, SETTINGS, None, Team(torch.device("cpu")), distiller)
        runs = {
            "step": lambda: self._step(plain),
            "teacher": lambda: self.teacher(self.images),
            "distilled": lambda: self._step(distilled),
        }
        step, teacher, both = (lap.median for lap in interleaved(runs, rounds=rounds, seconds=math.inf).values())
        laps = interleaved(self._terms(chosen, distiller), rounds=rounds, seconds=math.inf)
        costliest = max(laps, key=lambda term: laps[term].median)
        alone = step + teacher
        return step, teacher, both, both / alone, costliest, laps[costliest].median / alone

    def distiller(self, chosen: Distillation) -> Distiller:
        """Return the terms between student and teacher."""
        return Distiller(self.student, self.teacher, chosen, ASSIGNMENTS[SETTINGS.assignment], self.kept)

    def _step(self, objective: Objective) -> None:
        objective(self.images, self.targets)["total"].backward()
        self.student.zero_grad()

    def _terms(self, chosen: Distillation, distiller: Distiller) -> Mapping[str, Callable[[], None]]:
        """For each term a function that computes it alone, and its gradient in the student's outputs."""
        with torch.no_grad():
            outputs = self.student(self.images, *distiller.wanted)
        teacher = distiller.teach(self.images)
        single = {term: dataclasses.replace(chosen, terms={term: weight}) for term, weight in chosen.terms.items()}
        return {
            term: partial(self._alone, self.distiller(one), teacher, outputs) for term, one in single.items()
        }  # fmt: skip

    def _alone(self, distiller: Distiller, teacher: Outputs, outputs: Outputs) -> None:
        leaves = Outputs(
            tuple(head.detach().requires_grad_() for head in outputs.heads),
            *(
                {block: value.detach().requires_grad_() for block, value in found.items()}
                for found in (outputs.features, outputs.maps)
            ),
        )
        (value,) = distiller(teacher, leaves, self.targets, tuple(self.images.shape[2:])).values()
        if value.requires_grad:  # not where there is nothing to compare
            value.backward()


def make_pair(network: Network, percent: float, count: int, side: int) -> NetworkPair:
    """A teacher with random γ, the student that is left of it, and `count` random square pictures.

    Args:
        network: of the teacher.
        percent: share of the channels, network-wide, that the student lacks.
        count: pictures.
        side: of a picture, in pixels.
    """
    model = Darknet(network).train().to(memory_format=FORMAT)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("bn.weight"):
                value.uniform_()
    arrays = arrays_of(model)
    graph = channel_graph(network)
    plan = make_plan(graph, gammas_of(network, arrays), ChannelPolicy(0.0, layer_keep=0.01), Amount(percent, None))
    small = prune_network(graph, arrays, plan.removal)
    student = load_arrays(small.network, {name: torch.tensor(array) for name, array in small.arrays.items()})
    targets = torch.rand(count * OBJECTS, 6)
    targets[:, 0] = torch.arange(count).repeat_interleave(OBJECTS)
    targets[:, 1] = (targets[:, 1] * network.classes).floor()
    targets[:, 4:] = 0.05 + 0.4 * targets[:, 4:]
    images = torch.rand(count, network.net.channels, side, side).contiguous(memory_format=FORMAT)
    return NetworkPair(student.train().to(memory_format=FORMAT), Teacher(model, torch.device("cpu")),
                  kept(plan, None), images, targets)  # fmt: skip


if __name__ == "__main__":
    run(main)
