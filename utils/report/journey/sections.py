"""The sections of a report: what of a journey is shown, in which order, in which words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from utils.report.gamma_plots import SMALL, plot_gamma_change, share_below
from utils.report.journey import figures
from utils.report.journey.baselines import Baseline
from utils.report.journey.content import Block, Code, Drawing, Folded, Headline, Pictures, Section, Table, Text
from utils.report.journey.document import certificate
from utils.report.journey.gather import Ancestor, Journey, Link
from utils.report.journey.stages import Figures, Stage
from utils.report.pareto_plots import ParetoPoint, plot_pareto
from utils.report.pruning_plots import plot_channels
from utils.report.quantization_plots import LayerNoise, plot_noise
from utils.report.sensitivity_plots import plot_sensitivity
from utils.report.tables import Cell, Column

RECOVERING = ("tune", "distil", "qat")
"""Trainings that make good what a compression cost."""
FLOAT_BITS = 32
PROOFS = {
    "compact_vs_silenced": "compact and silenced, float32",
    "compact_vs_silenced_float64": "float64",
    "compact_vs_keep_size": "compact and keep-size",
    "border": "border",
}
"""Keys of a certificate and what they are called."""


def sections(journey: Journey) -> tuple[Section, ...]:
    """All sections that have something to show."""
    made = (
        Section("What was won, what was lost", tuple(_outcome(journey))),
        Section("Accuracy along the way", tuple(_course(journey))),
        Section("Accuracy against cost", tuple(_pareto(journey))),
        Section("Detections before and after", tuple(_detections(journey))),
        Section("Channels", tuple(_channels(journey))),
        Section("Scales of batch normalisation", tuple(_gammas(journey))),
        Section("Sensitivity", tuple(_sensitivity(journey))),
        Section("Quantization noise", tuple(_sqnr(journey))),
        Section("Certificates of pruning", tuple(_certificates(journey))),
        Section("How every network was made", tuple(_lineage(journey))),
    )
    return tuple(section for section in made if section.blocks)


def lead(journey: Journey) -> str:
    """One sentence under the title."""
    steps = " → ".join(stage.title for stage in journey.stages)
    data = next((Path(str(stage.args["data"])).stem for stage in journey.stages if stage.args.get("data")), None)
    times = sorted(str(stage.env["time"])[:10] for stage in journey.stages if stage.env.get("time"))
    when = "" if not times else times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"
    return "; ".join(part for part in (steps, data and f"data set {data}", when) if part)


def _outcome(journey: Journey) -> Iterator[Block]:
    """Cards, the table of stages, and how sure the differences are."""
    places = journey.networks
    if len(places) > 1:
        cards = tuple(_cards(journey.figures(places[0]), journey.figures(places[-1])))
        if cards:
            yield Headline(cards)
    if places:
        yield _stage_table(journey)
        yield Text(" ".join(_how_measured(journey)))


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
    return _without_empty("Every stage", columns, lines)


def _without_empty(caption: str, columns: list[Column], lines: list[tuple[Cell, ...]]) -> Table:
    used = [place for place in range(len(columns)) if any(line[place] is not None for line in lines)]
    rows = tuple(tuple(line[place] for place in used) for line in lines)
    return Table(caption, tuple(columns[place] for place in used), rows)


def _how_measured(journey: Journey) -> Iterator[str]:
    """What the table of stages can be trusted for."""
    measured = journey.measurement
    if measured is None:
        yield "Figures are those that the runs wrote down, each at its own best epoch; MB is the size of the file."
        if any(stage.figures.ms for stage in journey.stages):
            yield "Times of one pruning, before and after, were measured in turn; those of different runs were not."
        return
    yield (f"All networks were measured for this report on {measured.images} pictures of {measured.data}, times in "
           f"turn over {measured.rounds} rounds; {measured.machine}.")  # fmt: skip


def _course(journey: Journey) -> Iterator[Block]:
    """Accuracy over all epochs; recovery from the same network side by side."""
    shown = [stage for stage in journey.stages if stage.figures.map50 is not None or stage.results.get("map50")]
    if any(stage.results.get("map50") for stage in shown):
        caption, words = "Average precision over the epochs of every stage.", "; ".join(map(_ends, shown))
        yield _drawing("course", partial(figures.plot_course, shown), caption, words, 680)
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
            yield _drawing(f"recovery{number}", draw, "What came back in trainings that began with one network.", words)


def _ends(stage: Stage) -> str:
    value = stage.figures.map50
    return f"{stage.name}: AP50 {'unknown' if value is None else f'{value:.3f}'}"


def _drawing(name: str, draw: Callable[[Path], object], caption: str, words: str, least_width: int = 560) -> Drawing:
    return Drawing(figures.as_svg(draw, name), f"{caption} {words}", caption, least_width)


def _pareto(journey: Journey) -> Iterator[Block]:
    """Stages and baselines in one plot; only networks whose accuracy, cost and time are known."""
    points = [*_points(journey), *(_baseline_point(baseline) for baseline in journey.baselines)]
    if len(points) < 2 or not (journey.measurement or journey.baselines):
        return
    draw = partial(plot_pareto, points, size=(11.5, 4.8))
    words = "; ".join(f"{point.name}: AP50 {point.ap50:.3f}, {point.macs / 1e9:.3f} GMACs, {point.ms:.2f} ms"
                      for point in points)  # fmt: skip
    caption = "AP50 against parameters, multiply-adds and milliseconds"
    sure = "; bars are 95 % intervals" if any(point.low < point.high for point in points) else ""
    yield _drawing(
        "pareto", draw, f"{caption}{sure}. The dashed line joins the networks that no other beats.", words, 860
    )
    if journey.baselines:
        rows = tuple((b.name, None if b.size is None else "{} × {}".format(*b.size), b.map50, b.map50_95, b.parameters,
                      b.macs / 1e9, b.ms) for b in journey.baselines)  # fmt: skip
        columns = [*map(Column, ("network", "input", "AP50", "AP50-95", "parameters", "GMACs")), Column("ms", ".2f")]
        yield _without_empty("Cheap ways to the same end", columns, list(rows))


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
    b = baseline
    return ParetoPoint(b.name, "cheap baseline", b.map50, b.low, b.high, b.parameters, b.macs, b.ms)


def _detections(journey: Journey) -> Iterator[Block]:
    """Pictures of which most changed; else those that the last pruning drew."""
    measured = journey.measurement
    if measured is None or measured.comparison is None:
        return
    from utils.report.journey.lost import CONFIDENCE, OVERLAP, jpeg, panels

    found = measured.comparison
    first, last = (journey.stages[place].name for place in (min(measured.stages), max(measured.stages)))
    yield Text(f"Of {found.objects} objects {first} finds {found.before} and {last} finds {found.after}, at confidence "
               f"{CONFIDENCE} and IoU {OVERLAP}: {found.lost} were lost, {found.gained} gained. Shown are the pictures "
               "where most changed.")  # fmt: skip
    for picture in found.pictures:
        name = Path(picture.path).name
        objects, lost, gained = len(picture.truth), len(picture.lost), len(picture.gained)
        captions = (f"Ground truth: {objects}", f"{first}: {len(picture.before)} boxes",
                    f"{last}: {len(picture.after)} boxes, {lost} lost, {gained} gained")  # fmt: skip
        images = (jpeg(panel) for panel in panels(picture, found.names))
        yield Pictures(name, tuple((image, f"{name}. {caption}", caption)
                                   for image, caption in zip(images, captions, strict=True)))  # fmt: skip


def _channels(journey: Journey) -> Iterator[Block]:
    for number, stage in _numbered(journey, lambda stage: stage.channels):
        bars = stage.channels
        before, after = sum(bar.before for bar in bars), sum(bar.kept for bar in bars)
        caption = f"{number} {stage.name}: channels of every convolution, {after} of {before} stay."
        yield _drawing(f"channels{number}", partial(plot_channels, bars), caption,
                       f"{len(bars)} convolutions.", 600 + 6 * len(bars))  # fmt: skip
        rows = tuple((f"block {bar.block}", bar.before, bar.kept, 100 * bar.kept / bar.before) for bar in bars)
        columns = (Column("convolution"), Column("before"), Column("after"), Column("kept, %", ".1f"))
        caption = f"{number} {stage.name}: channels by layer"
        yield Folded("All layers in numbers", (Table(caption, columns, rows),))


def _gammas(journey: Journey) -> Iterator[Block]:
    for number, stage in _numbered(journey, lambda stage: stage.gammas):
        edges, before, after = stage.gammas
        yield _drawing(f"gammas{number}", partial(plot_gamma_change, edges, before, after),
                       f"{number} {stage.name}: |γ| before and after.",
                       f"{share_below(edges, before, SMALL):.1%} below {SMALL:g} before, "
                       f"{share_below(edges, after, SMALL):.1%} after.")  # fmt: skip


def _sensitivity(journey: Journey) -> Iterator[Block]:
    for number, stage in _numbered(journey, lambda stage: stage.sensitivity):
        found = stage.sensitivity
        draw = partial(plot_sensitivity, found.shares, found.groups, found.layers, found.map50)
        caption = f"{number} {stage.name}: what AP50 loses when one part alone loses channels."
        yield _drawing(f"sensitivity{number}", draw, caption, f"AP50 before: {found.map50:.3f}.", 760)
        columns = (Column("part"), *(Column(f"{100 * share:.0f} %", ".2f") for share in found.shares))
        parts = (*found.groups.items(), *((f"layer {name}", drops) for name, drops in found.layers.items()))
        table = Table("Points of AP50 lost", columns, tuple((name, *drops) for name, drops in parts))
        yield Folded("All parts in numbers", (table,))


def _sqnr(journey: Journey) -> Iterator[Block]:
    for number, stage in _numbered(journey, lambda stage: any(row.decibels is not None for row in stage.sqnr)):
        rows = stage.sqnr
        known = [row for row in rows if row.decibels is not None]
        weakest = min(known, key=lambda row: row.decibels)
        bars = [LayerNoise(row.block, row.decibels, row.alone, row.bits == FLOAT_BITS) for row in rows]
        yield _drawing(f"sqnr{number}", partial(plot_noise, bars),
                       f"{number} {stage.name}: signal to quantization noise of every convolution.",
                       f"Least: {weakest.name}, {weakest.decibels:.1f} dB.", 600 + 6 * len(bars))  # fmt: skip
        columns = [Column("layer"), Column("weights, bits"), Column("outputs, bits"), Column("SQNR, dB", ".1f"),
                   Column("alone, dB", ".1f")]  # fmt: skip
        lines = [(row.name, row.bits, row.activation_bits, row.decibels, row.alone) for row in rows]
        caption = f"{number} {stage.name}: noise by layer"
        yield Folded("All layers in numbers", (_without_empty(caption, columns, lines),))


def _certificates(journey: Journey) -> Iterator[Block]:
    rows = []
    for number, stage in _numbered(journey, certificate):
        proof = certificate(stage)
        rows.append((f"{number} {stage.name}", *(proof.get(key) for key in PROOFS)))
    if rows:
        yield Text("The pruned network puts out what the network before it does with the removed channels silenced, at "
                   "every pixel. Differences are the largest, relative to the largest output. The last column is what "
                   "giving constants to the next layer changes at zero-padded borders.")  # fmt: skip
        yield _without_empty(
            "Largest relative differences",
            [Column("stage"), *(Column(title, ".1e") for title in PROOFS.values())],
            rows,
        )


def _lineage(journey: Journey) -> Iterator[Block]:
    for number, (stage, link) in enumerate(zip(journey.stages, journey.links, strict=True), 1):
        blocks: list[Block] = [Code((stage.command,))] if stage.command else []
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
    for ancestor in link.ancestors:
        if ancestor is link.parent or ancestor.teacher is not None:
            yield (
                ("made from" if ancestor.teacher is None else f"teacher, {ancestor.teacher}"),
                _where(journey, ancestor),
            )


def _where(journey: Journey, ancestor: Ancestor) -> str:
    if ancestor.stage is not None:
        return f"{ancestor.stage + 1} {journey.stages[ancestor.stage].name}, the same sha256"
    why = "which was changed since" if ancestor.changed else "not among the runs shown"
    return f"{ancestor.path}, {why}, sha256 {ancestor.sha256}"


def _numbered(journey: Journey, wanted: Callable[[Stage], object]) -> Iterator[tuple[int, Stage]]:
    """Stages that have something, and their numbers."""
    for number, stage in enumerate(journey.stages, 1):
        found = wanted(stage)
        if found is not None and found is not False and found != ():
            yield number, stage
