"""A pruning from checked flags to the written network: choose, cut, prove, measure, write."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from utils.checkpoint import load_model
from utils.cli import input_size, log, print_json
from utils.darknet.shapes import max_stride
from utils.device import select_device
from utils.errors import InputError
from utils.graph import ChannelGraph, channel_graph
from utils.pruning import record, report
from utils.pruning.alignment import TorchTimer, align, words
from utils.pruning.certificate import certify
from utils.pruning.constants import absorb
from utils.pruning.measure import Clock, Comparison, compare, make_bench, training_batches
from utils.pruning.plan import Plan, arrays_of, figures, gammas_of, grid, group_figures, make_plan, searched_plan
from utils.pruning.policy import Gammas
from utils.pruning.recalibrate import recalibrate
from utils.pruning.request import PruneRequest
from utils.pruning.settlement import settle
from utils.pruning.surgery import Arrays, Compacted, compact
from utils.pruning.survey import survey
from utils.pruning.trials import Trials
from utils.pruning.units import residual_units
from utils.report.run_dir import RunDirectory

Size = tuple[int, int]


def prune(asked: PruneRequest) -> None:
    """Carry out a request and print what came of it.

    Raises:
        InputError: no such device, pictures of other classes, a quantized network, or one without the residual units
            asked for.
        InfeasibleError: a layer would be emptied, a target is out of reach, or the certificate fails; nothing is
            written.
        NumericsError: a γ is not finite.
    """
    device = select_device(asked.device)
    loaded = load_model(asked.files)
    if loaded.quantization is not None:
        raise InputError(f"{asked.files.weights}: is quantized, which comes after pruning; give the weights it was "
                         "made from")  # fmt: skip
    lineage = loaded.lineage()
    for note in loaded.notes:
        log(note)
    network = loaded.model.network
    asked.check_classes(network)
    size = input_size(asked.sides, max_stride(network), (network.net.height, network.net.width))
    arrays = arrays_of(loaded.model)
    graph, gammas = channel_graph(network), gammas_of(network, arrays)
    asked, alignment = aligned(asked, graph, size, device)
    trials = Trials(asked, graph, arrays, size, device)
    if asked.sensitivity:
        survey(trials, gammas)
        return
    asked, target, tables, chosen = settle(trials, gammas)
    if asked.dry_run:
        document = preview(asked, graph, gammas, size) | {"target": target, "alignment": alignment}
        print_json(document) if asked.as_json else print(report.grid_text(document))
        return
    plan = (make_plan(graph, gammas, asked.channels, asked.amounts[0]) if chosen is None
            else searched_plan(graph, gammas, asked.channels, chosen))  # fmt: skip
    document = {"strategy": asked.strategy, **plan.amount._asdict(), "target": target, "alignment": alignment}
    document["before"] = figures(network, size)
    document |= {"max_percent": plan.max_percent, "advised_percent": plan.advised, "groups": group_figures(plan, size)}
    written, comparison, found = carry_out(asked, plan, arrays, size, device)
    document = measured(document | {"after": figures(written.network, size), **found}, comparison, size)
    with RunDirectory.create(asked.project, asked.name, exist_ok=asked.exist_ok).until("model.cfg") as run:
        document["run_dir"] = str(run.path)
        document |= {key: str(run.file(f"model.{key}")) for key in ("cfg", "weights")}
        document["data"] = str(asked.data.path) if asked.data else None
        names = loaded.names or (asked.data.names if asked.data else tuple(map(str, range(network.classes))))
        write(run, asked, plan, gammas, comparison, document)
        for name, text in tables.items():
            run.write_text(name, text)
        record.write_network(run, written, names, lineage, record.kept(plan, loaded.kept))
    print_json(document) if asked.as_json else print(report.text(document))


def aligned(
    asked: PruneRequest, graph: ChannelGraph, size: Size, device: torch.device
) -> tuple[PruneRequest, dict[str, Any] | None]:
    """A request whose widths are multiples of a number, and the part of the document that says how it was chosen."""
    if not asked.align:
        return asked, None
    found = align(graph, asked.channels, size, TorchTimer(device))
    document = found.document(Clock(device, size).runtime())
    log(words(document))
    channels = dataclasses.replace(asked.channels, multiple_of=found.multiple_of)
    flags = {**asked.flags, "multiple_of_chosen": found.multiple_of}
    return dataclasses.replace(asked, channels=channels, flags=flags), document


def preview(asked: PruneRequest, graph: ChannelGraph, gammas: Gammas, size: Size) -> dict[str, Any]:
    """The document of a dry run: what is left of the network, for one amount or for several.

    Raises:
        InfeasibleError: the only amount cannot be carried out.
    """
    least = asked.amounts[0]._replace(percent=None if asked.channels is None else 0.0, shortcut=None)
    plan = make_plan(graph, gammas, asked.channels, least)
    units = None if asked.amounts[0].shortcut is None else len(residual_units(graph.network))
    document = {"strategy": asked.strategy, "before": figures(graph.network, size), "residual_units": units}
    document |= {"max_percent": plan.max_percent, "advised_percent": plan.advised}
    if len(asked.amounts) == 1:
        make_plan(graph, gammas, asked.channels, asked.amounts[0])
    document["grid"] = list(grid(graph, gammas, asked.channels, asked.amounts, size))
    only = document["grid"][0] if len(asked.amounts) == 1 else {}
    return document | {key: only[key] for key in ("after", "groups") if only}


def carry_out(
    asked: PruneRequest, plan: Plan, arrays: Arrays, size: Size, device: torch.device
) -> tuple[Compacted, Comparison | None, dict[str, Any]]:
    """Cut a network, prove that it was cut right, and measure it.

    Returns:
        The network that is left, what was measured, and the parts of the document that say so.

    Raises:
        InfeasibleError: the certificate fails.
    """
    graph, removal = plan.graph, plan.removal
    absorbed = absorb(graph, arrays, removal) if asked.absorb else arrays
    written = compact(graph, absorbed, removal)
    bare = compact(graph, arrays, removal) if asked.absorb else written
    certificate = certify(graph, arrays, absorbed, removal, bare, written)
    del bare
    certificate.check()
    batches = 0
    if asked.recalibrate:
        pictures, batches = training_batches(asked, graph.network, size, device)
        written = Compacted(written.network, recalibrate(*written, pictures, device))
    comparison = None
    if asked.test:
        bench = make_bench(asked, graph.network, size, device)
        comparison = compare(bench, graph, arrays, absorbed if asked.absorb else None, removal, written)
    return written, comparison, {"certificate": dataclasses.asdict(certificate), "recalibrated": batches}


def write(
    run: RunDirectory,
    asked: PruneRequest,
    plan: Plan,
    gammas: Gammas,
    comparison: Comparison | None,
    document: dict[str, Any],
) -> None:
    """What the run says of itself."""
    run.describe(args=asked.flags)
    bars = report.layer_bars(plan, gammas)
    run.write_json("plan.json", record.plan_document(asked, plan, gammas, document))
    run.write_text("channels.csv", record.channel_table(plan, bars, gammas))
    run.write_text("report.md", report.markdown(document))
    report.draw(run, plan, bars, comparison)


def measured(document: dict[str, Any], comparison: Comparison | None, size: Size) -> dict[str, Any]:
    """The document with accuracies and times, or with None where nothing was measured.

    `efficiency` is the gain in time over the gain in multiply-adds: 1 where all that go save their time.
    """
    if comparison is None:
        return document | {"silenced": None, "absorbed": None, "latency": None, "efficiency": None}
    latency = {name: dataclasses.asdict(times) for name, times in comparison.latency.items()}
    found = {name: accuracy._asdict() for name, accuracy in comparison.accuracy.items()}
    sides = {"height": size[0], "width": size[1], "runtime": comparison.runtime}
    faster = latency["original"]["median"] / latency["compact"]["median"]
    less = document["before"]["macs"] / document["after"]["macs"]
    return document | {
        "before": document["before"] | found["original"] | {"ms": latency["original"]["median"]},
        "after": document["after"] | found["compact"] | {"ms": latency["compact"]["median"]},
        "silenced": found["silenced"],
        "absorbed": found.get("absorbed"),
        "latency": latency | sides,
        "efficiency": faster / less,
    }
