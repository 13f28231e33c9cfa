"""What a quantization after training says and leaves in its run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from models import Darknet
from utils.checkpoint import LoadedModel, write_checkpoint
from utils.darknet.cfg import format_network
from utils.layers import ConvBlock
from utils.quantization.scheme import QuantSettings
from utils.report.quantization_plots import LayerNoise, plot_noise
from utils.report.run_dir import RunDirectory
from utils.report.tables import Column, csv_table, text_table

FLOAT_BITS = 32
MOST_LAYERS = 10
"""Convolutions that are printed, those with least SQNR; the files have all."""
TITLES = ("block", "name", "line", "activation", "bits", "activation_bits", "sqnr_db", "alone_db")


def layer_entries(
    model: Darknet, decibels: Mapping[int, float | None], alone: Mapping[int, float | None]
) -> list[dict[str, Any]]:
    """What is said of each convolution of a quantized network, in its order.

    Args:
        model: the network.
        decibels: of `sensitivity.block_noise`.
        alone: of `sensitivity.head_noise`; empty if it was not measured.
    """
    entries = []
    for index, layer in enumerate(model.layers):
        if isinstance(layer, ConvBlock):
            block, weights, output = model.blocks[index], layer.quantize_weight, layer.quantize_output
            bits = (FLOAT_BITS if module is None else module.grid.bits for module in (weights, output))
            values = (index, f"{index} convolutional", block.line, block.activation, *bits, decibels[index],
                      alone.get(index))  # fmt: skip
            entries.append(dict(zip(TITLES, values, strict=True)))
    return entries


def write(
    run: RunDirectory,
    model: Darknet,
    settings: QuantSettings,
    loaded: LoadedModel,
    names: Sequence[str],
    lineage: Sequence[Mapping[str, Any]],
    document: Mapping[str, Any],
) -> None:
    """The network and the files about it; model.cfg comes last, a cfg is never without its weights.

    Args:
        run: where.
        model: the quantized network.
        settings: how it is quantized.
        loaded: the network it was made from.
        names: of the classes.
        lineage: what it was made from, the command that made it in the last entry.
        document: of --json.
    """
    entries = document["layers"]
    run.write_json("quantize.json", document)
    run.write_text("layers.csv", csv_table(TITLES, [[entry[title] for title in TITLES] for entry in entries]))
    bars = [LayerNoise(str(entry["block"]), entry["sqnr_db"], entry["alone_db"], entry["bits"] == FLOAT_BITS)
            for entry in entries]  # fmt: skip
    plot_noise(bars, run.file("sqnr.png"))
    text = format_network(model.network)
    run.file("model.cfg").unlink(missing_ok=True)  # of an earlier quantization, with --exist-ok
    checkpoint = {
        "model": {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
        "ema": None,
        "cfg": text,
        "names": list(names),
        "lineage": [dict(entry) for entry in lineage],
        "kept": loaded.kept,
        "quantization": settings.document(),
        "calibration": dict(document["calibration"]),
    }
    write_checkpoint(run.file("model.pt"), checkpoint)
    run.write_text("model.cfg", text)


def lines(document: Mapping[str, Any]) -> Iterator[str]:
    """The document for people."""
    entries = document["layers"]
    worst = sorted((entry for entry in entries if entry["sqnr_db"] is not None), key=lambda entry: entry["sqnr_db"])
    ranked = any(entry["alone_db"] is not None for entry in entries)
    columns = [Column("worst layers"), Column("weights"), Column("outputs"), Column("SQNR, dB", ".1f")]
    columns += [Column("alone, dB", ".1f")] * ranked
    yield text_table(columns, [
        [entry["name"], *(_bits(entry[key]) for key in ("bits", "activation_bits")), entry["sqnr_db"],
         *[entry["alone_db"]] * ranked]
        for entry in worst[:MOST_LAYERS]
    ]) + "\n"  # fmt: skip
    before, after = document["before"], document["after"]
    if before is not None:
        rows = [(name, found["map50"], found["map50_95"]) for name, found in (("float", before), ("rounded", after))]
        yield text_table(("", "AP50", "AP50-95"), rows) + "\n"
    if document["kept"]:
        yield f"float: blocks {', '.join(map(str, document['kept']))}"
    yield f"written: {document['weights']}"


def _bits(bits: int) -> str:
    return "float" if bits == FLOAT_BITS else f"{bits} bits"
