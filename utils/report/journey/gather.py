"""A journey: stages in the order in which one was made from the other, proved by the sha256 of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import InputError
from utils.files import sha256
from utils.report.cost import network_cost
from utils.report.journey.baselines import Baseline
from utils.report.journey.stages import Figures, Stage, figures_of, read_stage
from utils.runtime.choice import KINDS
from utils.runtime.exported import ExportedFile

if TYPE_CHECKING:
    from utils.report.journey.measure import Measurement


@dataclass(frozen=True)
class Ancestor:
    """A file that a network was made from, as its lineage says."""

    path: str
    sha256: str
    teacher: str | None
    """The flag that made it a teacher; None for weights that were taken over."""
    stage: int | None
    """Place of the stage whose file has this sha256 now; None: no stage of the journey."""
    changed: bool = False
    """A stage of the journey has its file at this path, with another sha256."""


@dataclass(frozen=True)
class Link:
    """Where the file of a stage comes from."""

    sha256: str | None
    """Of the stage's own file; None without one."""
    ancestors: tuple[Ancestor, ...] = ()
    """Oldest first."""

    @property
    def parent(self) -> Ancestor | None:
        """What the stage began with."""
        return next((ancestor for ancestor in reversed(self.ancestors) if ancestor.teacher is None), None)


@dataclass(frozen=True)
class Journey:
    """All that a report tells."""

    title: str
    stages: tuple[Stage, ...]
    links: tuple[Link, ...]
    """One a stage."""
    measurement: Measurement | None = None
    """What was measured for the report, in place of what the runs say."""
    baselines: tuple[Baseline, ...] = ()

    def figures(self, place: int) -> Figures:
        """Of a stage: what was measured for the report, else what its run says."""
        found = self.stages[place].figures
        if self.measurement is None or (row := self.measurement.stages.get(place)) is None:
            return found
        return replace(found, map50=row.map50.value, map50_95=row.map50_95.value, ms={row.runtime: row.ms},
                       size=row.size, parameters=row.parameters, macs=row.macs)  # fmt: skip

    @property
    def way(self) -> tuple[int, ...]:
        """Places of the stages that led to the goal, and of the goal."""
        above = {ancestor.stage for ancestor in self.links[self.goal].ancestors if ancestor.teacher is None}
        return tuple(place for place in self.networks if place in above or place == self.goal)

    @property
    def goal(self) -> int:
        """Place of the network that most stages of the journey led to; of equal ones the last."""

        def above(place: int) -> int:
            return len({ancestor.stage for ancestor in self.links[place].ancestors if ancestor.teacher is None})

        return max(self.networks, key=lambda place: (above(place), place))

    @property
    def networks(self) -> tuple[int, ...]:
        """Places of the stages that made a network."""
        return tuple(range(len(self.stages)))


def gather(runs: Sequence[Path | str], title: str | None = None, baselines: tuple[Baseline, ...] = ()) -> Journey:
    """Read run directories and order them by lineage; those that do not come from one another keep their order.

    Raises:
        InputError: no run, one given twice, or one that cannot be read.
    """
    paths = [Path(run) for run in runs]
    if not paths:
        raise InputError("RUN: at least one run directory is needed")
    for place, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:place]]:
            raise InputError(f"{path}: is given twice")
    stages = [_costed(stage) for stage in _named([read_stage(path) for path in paths])]
    entries = [_lineage(stage) for stage in stages]
    order = _order(entries)
    stages, entries = [stages[place] for place in order], [entries[place] for place in order]
    links = [Link(digest, _ancestors(stages, entries, lineage)) for digest, lineage in entries]
    stages = [_told(_with_parent(stage, link, stages), lineage)
              for stage, link, (_, lineage) in zip(stages, links, entries, strict=True)]  # fmt: skip
    return Journey(title or _title(paths), tuple(_timed(stages, links)), tuple(links), baselines=baselines)


def _costed(stage: Stage) -> Stage:
    """A file for another runtime says which network it is."""
    if (file := exported(stage)) is None:
        return stage
    network = file.metadata.network
    cost, net = network_cost(network), network.net
    size = (net.height, net.width)
    return replace(stage, figures=replace(stage.figures, parameters=cost.parameters, macs=cost.macs, size=size))


def exported(stage: Stage) -> ExportedFile | None:
    """What a file for another runtime says of itself; None if the stage made no such file."""
    kind = KINDS.get(stage.weights.suffix) if stage.weights is not None else None
    return None if kind is None else kind.read(stage.weights)


Entry = tuple[str | None, tuple[Mapping[str, Any], ...]]
"""sha256 of a stage's file, and the lineage inside it."""


def _lineage(stage: Stage) -> Entry:
    """What the file of a stage says of itself; nothing is said by a .weights or .torchscript file."""
    if stage.weights is None:
        return None, ()
    if stage.weights.suffix == ".pt":
        from utils.checkpoint import read_checkpoint

        found = read_checkpoint(stage.weights).get("lineage", ())
    else:
        file = exported(stage)
        found = () if file is None else file.metadata.lineage
    return sha256(stage.weights), tuple(entry for entry in found if {"path", "sha256"} <= set(entry))


def _order(entries: Sequence[Entry]) -> list[int]:
    """Places of the stages, every one after those it was made from."""
    makers = {digest: place for place, (digest, _) in enumerate(entries) if digest is not None}
    done: list[int] = []

    def visit(place: int, above: tuple[int, ...] = ()) -> None:
        if place in done or place in above:
            return
        for entry in entries[place][1]:
            if entry["sha256"] in makers:
                visit(makers[entry["sha256"]], (*above, place))
        done.append(place)

    for place in range(len(entries)):
        visit(place)
    return done


def _ancestors(
    stages: Sequence[Stage], entries: Sequence[Entry], lineage: Sequence[Mapping[str, Any]]
) -> tuple[Ancestor, ...]:
    makers = {digest: place for place, (digest, _) in enumerate(entries) if digest is not None}
    files = {stage.weights.resolve() for stage in stages if stage.weights is not None}
    return tuple(
        Ancestor(
            path=str(entry["path"]),
            sha256=str(entry["sha256"]),
            teacher=None if entry.get("teacher") is None else str(entry["teacher"]),
            stage=makers.get(entry["sha256"]),
            changed=entry["sha256"] not in makers and Path(str(entry["path"])).resolve() in files,
        )
        for entry in lineage
    )


def _with_parent(stage: Stage, link: Link, stages: Sequence[Stage]) -> Stage:
    """The stage with the kind that its parent makes it.

    A training that began with a pruned network is a fine-tuning; a .pt made from a file of no stage is the original.
    """
    parent = None if link.parent is None or link.parent.stage is None else stages[link.parent.stage]
    if parent is None and stage.kind == "export" and stage.args.get("format") == "pt":
        return replace(stage, kind="original")
    return replace(stage, kind="tune") if stage.kind == "train" and parent and parent.kind == "prune" else stage


def _told(stage: Stage, lineage: Sequence[Mapping[str, Any]]) -> Stage:
    """A stage whose file says which command made it is shown with that."""
    command = lineage[-1].get("command") if lineage else None
    return replace(stage, command=command) if isinstance(command, str) and stage.kind == "quantize" else stage


def _timed(stages: Sequence[Stage], links: Sequence[Link]) -> list[Stage]:
    """A stage that was not timed has the time that the pruning of its network took for it."""
    found = list(stages)
    for stage, link in zip(stages, links, strict=True):
        parent = None if link.parent is None else link.parent.stage
        if parent is not None and stage.kind == "prune" and not found[parent].figures.ms:
            before = figures_of(stage.plan, "before").ms
            found[parent] = replace(found[parent], figures=replace(found[parent].figures, ms=before))
    return found


def _named(stages: Sequence[Stage]) -> list[Stage]:
    """Stages whose names differ: by as many folders above as it takes."""
    names = [stage.name for stage in stages]
    parts = [stage.path.resolve().parts for stage in stages]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(part[-depth:]) for part in parts]
    return [replace(stage, name=name) for stage, name in zip(stages, names, strict=True)]


def _title(paths: Sequence[Path]) -> str:
    """The folder that all runs are in, or the run itself."""
    above = {path.resolve().parent for path in paths}
    lone = len(paths) == 1
    return paths[0].resolve().name if lone or len(above) > 1 else above.pop().name
