"""What a journey did to a network: its channels, scales, noise and detections, and what is proved of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from utils.report.gamma_plots import SMALL, plot_gamma_change, share_below
from utils.report.journey.content import Block, Folded, Pictures, Table, Text, without_empty
from utils.report.journey.document import certificate
from utils.report.journey.figures import drawing
from utils.report.journey.gather import Journey
from utils.report.journey.stages import Stage
from utils.report.pruning_plots import plot_channels
from utils.report.quantization_plots import LayerNoise, plot_noise
from utils.report.tables import Column

FLOAT_BITS = 32
PROOFS = {
    "compact_vs_silenced": "compact and silenced, float32",
    "compact_vs_silenced_float64": "float64",
    "compact_vs_keep_size": "compact and keep-size",
    "border": "border",
}
"""Keys of a certificate and what they are called."""


def detections(journey: Journey) -> Iterator[Block]:
    """The pictures in which most changed, if networks were measured."""
    measured = journey.measurement
    if measured is None or measured.comparison is None:
        return
    from utils.report.journey.lost import CONFIDENCE, OVERLAP, jpeg, panels

    found = measured.comparison
    first, last = (journey.stages[place].name for place in measured.compared)
    yield Text(f"Of {found.objects} objects {first} finds {found.before} and {last} finds {found.after}, at confidence "
               f"{CONFIDENCE} and IoU {OVERLAP}: {found.lost} were lost, {found.gained} gained. Shown are the pictures "
               "where most changed.")  # fmt: skip
    for picture in found.pictures:
        name = Path(picture.path).name
        objects, lost, gained = len(picture.truth), len(picture.lost), len(picture.gained)
        before, after = (f"{len(rows)} box{'es' * (len(rows) != 1)}" for rows in (picture.before, picture.after))
        changed = "".join(f", {count} {what}" for count, what in ((lost, "lost"), (gained, "gained")) if count)
        captions = f"ground truth: {objects}", f"{first}: {before}", f"{last}: {after}{changed}"
        images = (jpeg(panel) for panel in panels(picture, found.names))
        yield Pictures(name, tuple((image, f"{name}. {caption}", caption)
                                   for image, caption in zip(images, captions, strict=True)))  # fmt: skip


def channels(journey: Journey) -> Iterator[Block]:
    """What every pruning kept of each convolution."""
    for number, stage in _numbered(journey, lambda stage: stage.channels):
        bars = stage.channels
        before, after = sum(bar.before for bar in bars), sum(bar.kept for bar in bars)
        caption = f"{number} {stage.name}: channels of every convolution, {after} of {before} stay."
        yield drawing(f"channels{number}", partial(plot_channels, bars), caption,
                       f"{len(bars)} convolutions.", 600 + 6 * len(bars))  # fmt: skip
        rows = tuple((f"block {bar.block}", bar.before, bar.kept, 100 * bar.kept / bar.before) for bar in bars)
        columns = (Column("convolution"), Column("before"), Column("after"), Column("kept, %", ".1f"))
        caption = f"{number} {stage.name}: channels by layer"
        yield Folded("All layers in numbers", (Table(caption, columns, rows),))


def gammas(journey: Journey) -> Iterator[Block]:
    """|γ| before and after every sparse training."""
    for number, stage in _numbered(journey, lambda stage: stage.gammas):
        edges, before, after = stage.gammas
        yield drawing(f"gammas{number}", partial(plot_gamma_change, edges, before, after),
                       f"{number} {stage.name}: |γ| before and after.",
                       f"{share_below(edges, before, SMALL):.1%} below {SMALL:g} before, "
                       f"{share_below(edges, after, SMALL):.1%} after.")  # fmt: skip


def sqnr(journey: Journey) -> Iterator[Block]:
    """What rounding did to every convolution."""
    for number, stage in _numbered(journey, lambda stage: any(row.decibels is not None for row in stage.sqnr)):
        rows = stage.sqnr
        known = [row for row in rows if row.decibels is not None]
        weakest = min(known, key=lambda row: row.decibels)
        bars = [LayerNoise(row.block, row.decibels, row.alone, row.bits == FLOAT_BITS) for row in rows]
        yield drawing(f"sqnr{number}", partial(plot_noise, bars),
                       f"{number} {stage.name}: signal to quantization noise of every convolution.",
                       f"Least: {weakest.name}, {weakest.decibels:.1f} dB.", 600 + 6 * len(bars))  # fmt: skip
        columns = [Column("layer"), Column("weights, bits"), Column("outputs, bits"), Column("SQNR, dB", ".1f"),
                   Column("alone, dB", ".1f")]  # fmt: skip
        lines = [(row.name, row.bits, row.activation_bits, row.decibels, row.alone) for row in rows]
        caption = f"{number} {stage.name}: noise by layer"
        yield Folded("All layers in numbers", (without_empty(caption, columns, lines),))


def certificates(journey: Journey) -> Iterator[Block]:
    """What was proved of every pruned network."""
    rows = []
    for number, stage in _numbered(journey, certificate):
        proof = certificate(stage)
        rows.append((f"{number} {stage.name}", *(proof.get(key) for key in PROOFS)))
    if rows:
        yield Text("The pruned network puts out what the network before it does with the removed channels silenced, at "
                   "every pixel. Differences are the largest, relative to the largest output. The last column is what "
                   "giving constants to the next layer changes at zero-padded borders.")  # fmt: skip
        yield without_empty(
            "Largest relative differences",
            [Column("stage"), *(Column(title, ".1e") for title in PROOFS.values())],
            rows,
        )


def _numbered(journey: Journey, wanted: Callable[[Stage], object]) -> Iterator[tuple[int, Stage]]:
    """Stages that have something, and their numbers."""
    for number, stage in enumerate(journey.stages, 1):
        found = wanted(stage)
        if found is not None and found is not False and found != ():
            yield number, stage
