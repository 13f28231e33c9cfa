"""The files that a pruning leaves in its run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from utils.checkpoint import write_checkpoint
from utils.cli import log
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Convolutional
from utils.darknet.cfg import format_network
from utils.darknet.opencv import opencv_warning
from utils.pruning.plan import Plan
from utils.pruning.policy import Importance, kept_channels
from utils.pruning.request import PruneRequest
from utils.pruning.surgery import Compacted, numbers
from utils.pruning.units import unit_scores
from utils.report.pruning_plots import LayerBar
from utils.report.run_dir import RunDirectory
from utils.report.tables import csv_table


def kept(plan: Plan, before: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """For every convolution of the pruned network, by its block number: where it and its channels come from.

    Args:
        plan: what goes.
        before: the same of the network that is pruned; None if that was not pruned.

    Returns:
        `block`, its number in the network that was never pruned, and `channels`, the numbers its channels had there.
    """
    graph, removal = plan.graph, plan.removal
    found = {}
    for old, new in numbers(graph.network, removal).items():
        if isinstance(graph.network.blocks[old], Convolutional):
            channels = kept_channels(graph, removal.keep, old).tolist()
            origin = {"block": old, "channels": range(len(graph.labels[old]))} if before is None else before[str(old)]
            found[str(new)] = {"block": origin["block"], "channels": [origin["channels"][i] for i in channels]}
    return found


def plan_document(
    asked: PruneRequest, plan: Plan, importance: Importance, document: Mapping[str, Any]
) -> dict[str, Any]:
    """plan.json: the policy and how it was decided, what goes, and the figures of --json."""
    choice, graph, removal = plan.choice, plan.graph, plan.removal
    policy = None if asked.channels is None else dataclasses.replace(asked.channels, percent=plan.amount.percent)
    scores = unit_scores(graph, importance, removal.keep, removal.units)
    units = [
        {"source": unit.source, "blocks": list(unit.blocks), "mean_importance": float(score)}
        for unit, score in zip(removal.units, scores, strict=True)
    ]
    decided = None if choice is None else {
        "candidates": choice.ranked, "removed": choice.removed, "threshold": choice.threshold,
        "limiting": choice.limiting}  # fmt: skip
    if plan.in_rounds:
        decided |= {"removed": int((~removal.keep).sum()), "threshold": None, "limiting": None}
    return {"policy": policy, "channels": decided, "units": units, **document}


def channel_table(plan: Plan, bars: Sequence[LayerBar], importance: Importance) -> str:
    """CSV, a row for each convolution that makes channels: how many there were and are, and their mean importance.

    `new_block` is empty for what goes, `unit` is the shortcut of the residual unit with which it goes.
    """
    network = plan.graph.network
    number = numbers(network, plan.removal)
    unit_of = {block: unit.shortcut for unit in plan.removal.units for block in unit.blocks}
    rows = []
    for bar in bars:
        i = bar.block
        mean = f"{np.abs(importance[i]).mean():.6g}" if i in importance else ""
        rows.append([i, number.get(i), network.blocks[i].line, bar.before, bar.after, int(bar.candidate), bar.chain,
                     unit_of.get(i), mean])  # fmt: skip
    titles = "block new_block line before after candidate chain unit mean_importance"
    return csv_table(titles.split(), rows)


def write_network(
    run: RunDirectory,
    written: Compacted,
    names: Sequence[str],
    lineage: Sequence[Mapping[str, Any]],
    origins: Mapping[str, Any],
) -> None:
    """The pruned network for Darknet and for this suite; model.cfg comes last, a cfg is never without its weights.

    Args:
        run: where.
        written: the network.
        names: of the classes.
        lineage: what it was made from.
        origins: of `kept`.
    """
    network, arrays = written
    text = format_network(network)
    run.file("model.cfg").unlink(missing_ok=True)  # of an earlier pruning, with --exist-ok
    weights_file.write(run.file("model.weights"), network, arrays)
    checkpoint = {
        "model": {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()},
        "ema": None,
        "cfg": text,
        "names": list(names),
        "lineage": [dict(entry) for entry in lineage],
        "kept": origins,
    }
    write_checkpoint(run.file("model.pt"), checkpoint)
    run.write_text("model.cfg", text)
    if warning := opencv_warning(network):
        log(f"{run.path}: {warning}")
