"""The sections of a report, in their order, and how every network was made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from utils.report.journey import evidence, outcome
from utils.report.journey.command import wrapped
from utils.report.journey.content import Block, Code, Folded, Section, Table
from utils.report.journey.gather import Ancestor, Journey, Link
from utils.report.journey.stages import Stage
from utils.report.tables import Column


def sections(journey: Journey) -> tuple[Section, ...]:
    """All sections that have something to show."""
    made = (
        Section("What was won, what was lost", tuple(outcome.outcome(journey))),
        Section("Accuracy along the way", tuple(outcome.course(journey))),
        Section("Accuracy against cost", tuple(outcome.pareto(journey))),
        Section("Detections before and after", tuple(evidence.detections(journey))),
        Section("Channels", tuple(evidence.channels(journey))),
        Section("Scales of batch normalisation", tuple(evidence.gammas(journey))),
        Section("Quantization noise", tuple(evidence.sqnr(journey))),
        Section("Certificates of pruning", tuple(evidence.certificates(journey))),
        Section("How every network was made", tuple(_lineage(journey))),
    )
    return tuple(section for section in made if section.blocks)


def lead(journey: Journey) -> str:
    """One sentence under the title."""
    steps = " → ".join(journey.stages[place].title for place in (journey.way if journey.networks else ()))
    data = next((Path(str(stage.args["data"])).stem for stage in journey.stages if stage.args.get("data")), None)
    times = sorted(str(stage.env["time"])[:10] for stage in journey.stages if stage.env.get("time"))
    when = "" if not times else times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    return "; ".join(part for part in (steps, data and f"data set {data}", when) if part)


def _lineage(journey: Journey) -> Iterator[Block]:
    for number, (stage, link) in enumerate(zip(journey.stages, journey.links, strict=True), 1):
        blocks: list[Block] = [Code(wrapped(stage.command))] if stage.command else []
        facts = [("run", str(stage.path)), ("file", None if stage.weights is None else stage.weights.name),
                 ("sha256", link.sha256), *_origins(journey, link), ("commit", stage.env.get("git_commit")),
                 ("machine", stage.env.get("cpu")), ("time", stage.env.get("time")),
                 *((package, version) for package, version in _packages(stage) if package == "torch")]  # fmt: skip
        rows = tuple((name, str(value)) for name, value in facts if value)
        blocks.append(Table(f"Stage {number}", (Column("fact"), Column("value")), rows, prose=True))
        yield Folded(f"{number} {stage.name}: {stage.title}", tuple(blocks))


def _packages(stage: Stage) -> Iterator[tuple[str, str]]:
    packages = stage.env.get("packages")
    yield from packages.items() if isinstance(packages, dict) else ()


def _origins(journey: Journey, link: Link) -> Iterator[tuple[str, str]]:
    """What the stage began with and was taught by, and whether that is proved."""
    first = next((place for place, ancestor in enumerate(link.ancestors) if ancestor is link.parent), 0)
    for ancestor in link.ancestors[first:]:
        name = "made from" if ancestor.teacher is None else f"teacher, {ancestor.teacher}"
        yield name, _where(journey, ancestor)


def _where(journey: Journey, ancestor: Ancestor) -> str:
    if ancestor.stage is not None:
        return f"{ancestor.stage + 1} {journey.stages[ancestor.stage].name}, the same sha256"
    why = "which was changed since" if ancestor.changed else "not among the runs shown"
    return f"{ancestor.path}, {why}, sha256 {ancestor.sha256}"
