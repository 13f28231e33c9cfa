"""What a journey won and lost: the numbers that matter, stage by stage, over the epochs, and against cheaper ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from utils.report.journey import figures
from utils.report.journey.baselines import Baseline
from utils.report.journey.content import Block, Headline, Table, Text, without_empty
from utils.report.journey.figures import drawing
from utils.report.journey.gather import Journey
from utils.report.journey.stages import Figures, Stage
from utils.report.pareto_plots import ParetoPoint, plot_pareto
from utils.report.run_dir import LAST_SHARE, LEAST_LAST, last_epochs
from utils.report.tables import Column

BUSY = 1.5
"""How many times the median the slowest tenth of the rounds may take on a quiet machine."""
RECOVERING = ("tune", "distil", "qat")
"""Trainings that make good what a compression cost."""


def outcome(journey: Journey) -> Iterator[Block]:
    """Cards, the table of stages, and how sure the differences are."""
    places = journey.networks
    if len(places) > 1:
        cards = tuple(_cards(_first(journey), journey.figures(journey.goal)))
        if cards:
            yield Headline(cards)
    if places:
        yield _stage_table(journey)
        yield Text(" ".join(_how_measured(journey)))
    if journey.measurement is not None and len(journey.measurement.stages) > 1:
        yield from differences(journey)


def _first(journey: Journey) -> Figures:
    """Of the first network, with the times of the files that were made of it for other runtimes."""
    place = journey.networks[0]
    found = journey.figures(place)
    times: dict[str, float] = {}
    for number in set(journey.networks) - {journey.goal}:
        parent = journey.links[number].parent
        if journey.stages[number].kind == "export" and parent is not None and parent.stage == place:
            times |= journey.figures(number).ms
    return replace(found, ms={**times, **found.ms})


def _cards(first: Figures, last: Figures) -> Iterator[tuple[str, str, str]]:
    for title, key in (("AP50", "map50"), ("AP50-95", "map50_95")):
        old, new = getattr(first, key), getattr(last, key)
        if old is not None and new is not None:
            yield title, f"{new:.3f}", f"{new - old:+.3f} from {old:.3f}"
    for title, key, unit, spec in (("Parameters", "parameters", 1e6, ".2f M"), ("Multiply-adds", "macs", 1e9, ".3f G"),
                                   ("File", "bytes", 1e6, ".2f MB")):  # fmt: skip
        old, new = getattr(first, key), getattr(last, key)
        if old and new:
            digits, _, suffix = spec.partition(" ")
            yield title, f"{new / unit:{digits}} {suffix}", f"{_factor(old, new)} from {old / unit:{digits}} {suffix}"
    for runtime, old in first.ms.items():
        if new := last.ms.get(runtime):
            yield "A picture", f"{new:.2f} ms", f"{_factor(old, new)} from {old:.2f} ms"


def _factor(old: float, new: float) -> str:
    """How much less or more."""
    return f"÷ {old / new:.2f}" if old >= new else f"× {new / old:.2f}"


def _stage_table(journey: Journey) -> Table:
    """A row a stage; columns that nothing is known for are left out."""
    places = journey.networks
    rows = {place: journey.figures(place) for place in places}
    runtimes = list(dict.fromkeys(runtime for found in rows.values() for runtime in found.ms))
    columns = [Column("stage"), Column("what"), Column("input"), Column("AP50"), Column("AP50-95"),
               Column("parameters"), Column("GMACs"), Column("MB", ".2f"),
               *(Column(f"ms, {runtime}", ".2f") for runtime in runtimes)]  # fmt: skip
    lines = [
        (f"{place + 1} {journey.stages[place].name}", journey.stages[place].title,
         None if found.size is None else "{} × {}".format(*found.size), found.map50, found.map50_95, found.parameters,
         None if found.macs is None else found.macs / 1e9, None if found.bytes is None else found.bytes / 1e6,
         *(found.ms.get(runtime) for runtime in runtimes))
        for place, found in rows.items()
    ]  # fmt: skip
    return without_empty("Every stage", columns, lines)


def _how_measured(journey: Journey) -> Iterator[str]:
    """What the table of stages can be trusted for."""
    measured = journey.measurement
    if measured is None:
        yield "Figures are those that the runs wrote down, each at its own best epoch; MB is the size of the file."
        if any(stage.figures.ms for stage in journey.stages):
            yield "Times of one pruning, before and after, were measured in turn; those of different runs were not."
        return
    yield (f"All networks were measured for this report on {measured.images} pictures of "
           f"{Path(measured.data).name}, times in turn, {measured.rounds} rounds; {measured.machine}. MB is the size "
           "of the file.")  # fmt: skip
    rows = [*measured.stages.values(), *measured.others.values()]
    if any(row.p90 > BUSY * row.ms for row in rows):
        yield "The machine had other work to do: some of the times vary much, so they compare little."


def differences(journey: Journey) -> Iterator[Block]:
    """How far accuracy, and its difference to the first stage, hang on the pictures."""
    measured = journey.measurement
    rows = [(f"{place + 1} {journey.stages[place].name}", row) for place, row in measured.stages.items()]
    lines = [
        (name, interval(row.map50, ".3f"), *((interval(gain, "+.3f") for gain in (row.gain50, row.gain50_95)) if number
         else (None, None)), row.p90)
        for number, (name, row) in enumerate([*rows, *measured.others.items()])
    ]  # fmt: skip
    first = rows[0][0]
    columns = (Column("network"), Column("AP50"), Column(f"AP50 less that of {first}"),
               Column(f"AP50-95 less that of {first}"), Column("ms, 90 % of rounds below", ".2f"))  # fmt: skip
    yield Table("How sure that is", columns, tuple(lines))
    yield Text(f"[low, high] are {100 * measured.share:g} % intervals of a paired bootstrap over the pictures, "
               f"{measured.draws} draws, seed {measured.seed}. An interval of a difference that holds 0 shows no "
               "difference; none says what another seed of the training would give.")  # fmt: skip


def interval(values: Sequence[float], spec: str) -> str:
    """A value and the ends of its interval."""
    value, low, high = (format(number, spec) for number in values)
    return f"{value} [{low}, {high}]"


def course(journey: Journey) -> Iterator[Block]:
    """Accuracy over all epochs; recovery from the same network side by side."""
    shown = {number: stage for number, stage in enumerate(journey.stages, 1)
             if stage.figures.map50 is not None or stage.results.get("map50")}  # fmt: skip
    if any(stage.results.get("map50") for stage in shown.values()):
        caption, words = "Average precision over the epochs of every stage.", "; ".join(map(_ends, shown.values()))
        yield drawing("course", partial(figures.plot_course, shown), caption, words, 680)
        yield from _last_epochs(shown)
    groups: dict[int | None, list[Stage]] = {}
    for stage, link in zip(journey.stages, journey.links, strict=True):
        if stage.kind in RECOVERING and stage.results.get("map50"):
            groups.setdefault(None if link.parent is None else link.parent.stage, []).append(stage)
    before = journey.stages[0].figures.map50
    for number, (parent, stages) in enumerate(groups.items(), 1):
        if len(stages) > 1:
            start = None if parent is None else journey.stages[parent].figures.map50
            draw = partial(figures.plot_recovery, stages, before, start)
            words = "; ".join(_ends(stage) for stage in stages)
            yield drawing(f"recovery{number}", draw, "What came back in trainings that began with one network.", words)


def _last_epochs(stages: Mapping[int, Stage]) -> Iterator[Block]:
    """The accuracy of every training's best epoch, and the median of its last ones."""
    rows = []
    for number, stage in stages.items():
        found = last_epochs(stage.results)
        if found["median_epochs"]:
            rows.append((f"{number} {stage.name}", stage.best_epoch, stage.figures.map50, stage.figures.map50_95,
                         *found.values()))  # fmt: skip
    titles = ("training", "epoch kept", "AP50", "AP50-95", "last epochs", "their median AP50", "their median AP50-95")
    yield Table("The epoch that was kept and the last ones", tuple(map(Column, titles)), tuple(rows))
    yield Text(
        "best.pt is chosen on the pictures that its accuracy is reported on, so this accuracy is a little too high. "
        f"The median of the last {LAST_SHARE:.0%} of the epochs, at least {LEAST_LAST}, is not chosen in this way."
    )


def _ends(stage: Stage) -> str:
    value = stage.figures.map50
    return f"{stage.name}: AP50 {'unknown' if value is None else f'{value:.3f}'}"


def pareto(journey: Journey) -> Iterator[Block]:
    """Stages and baselines in one plot; only networks whose accuracy, cost and time are known."""
    points = [*_points(journey), *(_baseline_point(baseline) for baseline in journey.baselines)]
    if len(points) < 2 or not (journey.measurement or journey.baselines):
        return
    draw = partial(plot_pareto, points, size=(11.5, 4.8))
    words = "; ".join(f"{point.name}: AP50 {point.ap50:.3f}, {point.macs / 1e9:.3f} GMACs, {point.ms:.2f} ms"
                      for point in points)  # fmt: skip
    caption = "AP50 against parameters, multiply-adds and milliseconds"
    sure = "; bars are 95 % intervals" if any(point.low < point.high for point in points) else ""
    yield drawing(
        "pareto", draw, f"{caption}{sure}. The dashed line joins the networks that no other beats.", words, 860
    )
    if journey.baselines:
        rows = tuple((b.name, None if b.size is None else "{} × {}".format(*b.size), b.map50, b.map50_95, b.parameters,
                      b.macs / 1e9, b.ms) for b in journey.baselines)  # fmt: skip
        columns = [*map(Column, ("network", "input", "AP50", "AP50-95", "parameters", "GMACs")), Column("ms", ".2f")]
        yield without_empty("Networks beside the journey", columns, list(rows))


def _points(journey: Journey) -> Iterator[ParetoPoint]:
    for place in journey.networks:
        found = journey.figures(place)
        row = None if journey.measurement is None else journey.measurement.stages.get(place)
        if found.map50 is not None and found.parameters and found.macs and found.ms:
            low, high = (found.map50, found.map50) if row is None else row.map50[1:]
            name = f"{place + 1} {journey.stages[place].name}"
            ms = next(iter(found.ms.values()))
            yield ParetoPoint(name, "journey", found.map50, low, high, found.parameters, found.macs, ms)


def _baseline_point(baseline: Baseline) -> ParetoPoint:
    """Those whose names begin with the same word are a family."""
    b, family = baseline, next(iter(baseline.name.split()), "other")
    return ParetoPoint(b.name, family, b.map50, b.low, b.high, b.parameters, b.macs, b.ms)
