"""A pruning from checked flags to the written network: choose, cut, prove, measure, write."""

from __future__ import annotations

import dataclasses
from typing import Any

from utils.checkpoint import LoadedModel, load_model
from utils.cli import input_size, log, print_json
from utils.darknet.shapes import max_stride
from utils.device import select_device
from utils.errors import InputError
from utils.graph import ChannelGraph, channel_graph
from utils.pruning import record, report
from utils.pruning.certificate import certify
from utils.pruning.constants import absorb
from utils.pruning.measure import Comparison, compare
from utils.pruning.plan import Plan, arrays_of, figures, grid, group_figures, make_plan, plan_of_rounds
from utils.pruning.policy import Importance
from utils.pruning.request import PruneRequest
from utils.pruning.savings import ranked
from utils.pruning.settlement import settle
from utils.pruning.surgery import Compacted, compact
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
        NumericsError: an importance is not finite.
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
    graph = channel_graph(network)
    asked = ranked_by(asked, loaded)
    hyp = loaded.hyp or ({"flip_lr": 0.0, "flip_ud": 0.0} if loaded.no_flip else {})
    trials = Trials(asked, graph, arrays, size, device, hyp)
    importance = trials.importance(network, arrays)
    order = ranked(asked, graph, importance, size)
    asked, target, chosen = settle(trials, order)
    if asked.dry_run:
        document = preview(asked, graph, order, size) | {"target": target}
        print_json(document) if asked.as_json else print(report.grid_text(document))
        return
    plan = (make_plan(graph, order, asked.channels, asked.amounts[0]) if chosen is None
            else plan_of_rounds(graph, order, asked.channels, chosen, asked.amounts[0]))  # fmt: skip
    document = {"strategy": asked.strategy, **plan.amount._asdict(), "target": target}
    document |= {"importance": asked.importance, "rounds": asked.rounds}
    document["before"] = figures(network, size)
    document |= {
        "max_percent": plan.max_percent,
        "advised_percent": advised(asked, plan),
        "groups": group_figures(plan, size),
    }
    written, comparison, found = carry_out(trials, plan)
    document = measured(document | {"after": figures(written.network, size), **found}, comparison, size)
    with RunDirectory.create(asked.project, asked.name, exist_ok=asked.exist_ok).until("model.cfg") as run:
        document["run_dir"] = str(run.path)
        document |= {key: str(run.file(f"model.{key}")) for key in ("cfg", "weights")}
        document["data"] = str(asked.data.path) if asked.data else None
        names = loaded.names or (asked.data.names if asked.data else tuple(map(str, range(network.classes))))
        write(run, asked, plan, importance, comparison, document)
        record.write_network(run, written, names, lineage, record.kept(plan, loaded.kept))
    print_json(document) if asked.as_json else print(report.text(document))


def ranked_by(asked: PruneRequest, loaded: LoadedModel) -> PruneRequest:
    """A request that says what ranks channels: γ where they were pressed on, or where there are no pictures.

    With taylor all convolutions are candidates: the classic rules leave out what sparse training did not press on.
    """
    kind = asked.importance
    if kind is None:
        if loaded.args.get("sr"):
            kind, why = "gamma", "sparse training has pressed on γ"
        elif asked.trains:
            kind, why = "taylor", "what silencing a channel does to the loss; γ was not trained sparse"
        else:
            kind, why = "gamma", "there are no training pictures to compute taylor from; give --data"
        log(f"--importance {kind}: {why}")
    channels = asked.channels and dataclasses.replace(
        asked.channels, all_convs=asked.channels.all_convs or kind == "taylor"
    )
    return dataclasses.replace(asked, importance=kind, channels=channels)


def advised(asked: PruneRequest, plan: Plan) -> float | None:
    """The percentage that costs little; None where not γ rank the channels."""
    return plan.advised if asked.importance == "gamma" else None


def preview(asked: PruneRequest, graph: ChannelGraph, importance: Importance, size: Size) -> dict[str, Any]:
    """The document of a dry run: what is left of the network, for one amount or for several.

    Raises:
        InfeasibleError: the only amount cannot be carried out.
    """
    least = asked.amounts[0]._replace(percent=None if asked.channels is None else 0.0, shortcut=None)
    plan = make_plan(graph, importance, asked.channels, least)
    units = None if asked.amounts[0].shortcut is None else len(residual_units(graph.network))
    document = {"strategy": asked.strategy, "before": figures(graph.network, size), "residual_units": units}
    document |= {"max_percent": plan.max_percent, "advised_percent": advised(asked, plan)}
    if len(asked.amounts) == 1:
        make_plan(graph, importance, asked.channels, asked.amounts[0])
    document["grid"] = list(grid(graph, importance, asked.channels, asked.amounts, size))
    only = document["grid"][0] if len(asked.amounts) == 1 else {}
    return document | {key: only[key] for key in ("after", "groups") if only}


def carry_out(trials: Trials, plan: Plan) -> tuple[Compacted, Comparison | None, dict[str, Any]]:
    """Cut a network, prove that it was cut right, and measure it.

    Returns:
        The network that is left, what was measured, and the parts of the document that say so.

    Raises:
        InfeasibleError: the certificate fails.
    """
    asked, graph, arrays, removal = trials.asked, trials.graph, trials.arrays, plan.removal
    whole = trials.compensated(removal)
    written, bare = compact(graph, whole, removal), compact(graph, arrays, removal)
    folded = absorb(graph, arrays, removal) if asked.absorb else None
    fitted = bool(asked.reconstruct) and not removal.nothing
    certificate = certify(graph, arrays, whole, removal, bare, written, fitted=fitted)
    del bare, whole
    certificate.check()
    comparison = None
    if asked.test:
        comparison = compare(trials.bench, graph, arrays, folded, removal, written)
    pictures = sum(map(len, trials.fitted)) if fitted else 0
    return written, comparison, {"certificate": dataclasses.asdict(certificate), "reconstructed": pictures}


def write(
    run: RunDirectory,
    asked: PruneRequest,
    plan: Plan,
    importance: Importance,
    comparison: Comparison | None,
    document: dict[str, Any],
) -> None:
    """What the run says of itself."""
    run.describe(args=asked.flags)
    bars = report.layer_bars(plan, importance)
    run.write_json("plan.json", record.plan_document(asked, plan, importance, document))
    run.write_text("channels.csv", record.channel_table(plan, bars, importance))
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
