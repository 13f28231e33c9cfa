"""A pruning from checked flags to the written network: choose, cut, prove, measure, write."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from models import fuse, load_arrays
from utils.checkpoint import load_model, write_checkpoint
from utils.cli import input_size, log, print_json
from utils.darknet import weights as weights_file
from utils.darknet.blocks import Network
from utils.darknet.cfg import format_network
from utils.darknet.layout import file_bytes
from utils.darknet.opencv import opencv_warning
from utils.darknet.shapes import max_stride
from utils.data.datasets import DetectionDataset, make_loader
from utils.data.index import index
from utils.device import select_device
from utils.evaluation import evaluate
from utils.graph import ChannelGraph, channel_graph
from utils.pruning.certificate import Certificate, certify
from utils.pruning.constants import absorb
from utils.pruning.policy import ChannelChoice, Gammas, choose, kept_channels
from utils.pruning.removal import Removal
from utils.pruning.request import PruneRequest
from utils.pruning.surgery import Arrays, Compacted, compact, compact_network
from utils.report.cost import network_cost
from utils.report.run_dir import RunDirectory
from utils.report.tables import Column, text_table

Size = tuple[int, int]


def prune(asked: PruneRequest) -> None:
    """Carry out a request and print what came of it.

    Raises:
        InfeasibleError: a layer would be emptied, or the certificate fails; nothing is written.
        NumericsError: a γ is not finite.
    """
    loaded = load_model(asked.files)
    network = loaded.model.network
    size = input_size(asked.args.img_size, max_stride(network), (network.net.height, network.net.width))
    arrays = {name: value.numpy() for name, value in loaded.model.state_dict().items() if "num_batches" not in name}
    graph = channel_graph(network)
    choice = choose(graph, gammas(network, arrays), asked.policy)
    document = {"strategy": asked.strategy, "max_percent": choice.max_percent}
    removal = Removal(choice.keep)
    after = compact_network(graph, removal)
    document |= {"before": figures(network, size), "after": figures(after, size)}
    if asked.args.dry_run:
        _print(asked, document)
        return
    absorbed = absorb(graph, arrays, removal) if asked.args.absorb else arrays
    written = compact(graph, absorbed, removal)
    certificate = certify(graph, arrays, absorbed, removal, compact(graph, arrays, removal), written)
    certificate.check()
    if asked.args.test:
        for name, net, tensors in (("before", network, arrays), ("after", *written)):
            document[name] |= accuracy(asked, net, tensors, size)
    run = RunDirectory.create(asked.project, asked.args.name, exist_ok=asked.args.exist_ok)
    names = loaded.names or (asked.data.names if asked.data else tuple(map(str, range(network.classes))))
    document |= {"certificate": dataclasses.asdict(certificate), "run_dir": str(run.path)}
    document |= {"cfg": str(run.file("model.cfg")), "weights": str(run.file("model.weights"))}
    write(run, asked, graph, choice, written, names, [dict(entry) for entry in loaded.lineage()], document)
    _print(asked, document, certificate)


def gammas(network: Network, arrays: Arrays) -> Gammas:
    """γ of every batch normalisation, by block number."""
    names = ((i, f"layers.{i}.bn.weight") for i in range(len(network.blocks)))
    return {i: arrays[name] for i, name in names if name in arrays}


def figures(network: Network, size: Size) -> dict[str, Any]:
    """What a network costs, by the keys of --json; accuracy and time are filled in when measured."""
    cost = network_cost(network, *size)
    return {"map50": None, "map50_95": None, "parameters": cost.parameters, "macs": cost.macs,
            "weights_bytes": file_bytes(network), "ms": None}  # fmt: skip


def accuracy(asked: PruneRequest, network: Network, arrays: Arrays, size: Size) -> dict[str, float]:
    """AP on the validation pictures, and milliseconds of a forward pass an image."""
    device = select_device(asked.args.device)
    pictures = index(asked.data.valid, asked.data.names)
    dataset = DetectionDataset(pictures, size=size, mode=asked.args.mode, channels=network.net.channels)
    loader = make_loader(dataset, asked.args.batch_size)
    model = load_arrays(network, {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()})
    model = fuse(model).to(device, memory_format=torch.channels_last)
    found = evaluate(model, loader, asked.data.names, device=device, by_size=False)
    return {"map50": found.metrics.map50, "map50_95": found.metrics.map50_95, "ms": found.times.inference}


def write(
    run: RunDirectory,
    asked: PruneRequest,
    graph: ChannelGraph,
    choice: ChannelChoice,
    written: Compacted,
    names: tuple[str, ...],
    lineage: list[dict[str, Any]],
    document: Mapping[str, Any],
) -> None:
    """The files of the run; model.cfg comes last, so that a cfg is never without its weights."""
    network, arrays = written
    text = format_network(network)
    run.write_yaml("args.yaml", vars(asked.args))
    kept = {str(i): kept_channels(graph, choice.keep, i).tolist() for i in graph.makers()}
    plan = {"policy": dataclasses.asdict(asked.policy), "candidates": choice.ranked, "removed": choice.removed,
            "threshold": choice.threshold, "limiting": choice.limiting, "kept": kept, **document}  # fmt: skip
    run.write_json("plan.json", plan)
    run.write_text("channels.csv", channel_table(graph, choice))
    weights_file.write(run.file("model.weights"), network, arrays)
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    write_checkpoint(
        run.file("model.pt"),
        {"model": tensors, "ema": None, "cfg": text, "names": list(names), "lineage": lineage, "kept": kept},
    )
    run.write_text("model.cfg", text)
    if warning := opencv_warning(network):
        log(f"{run.path}: {warning}")


def channel_table(graph: ChannelGraph, choice: ChannelChoice) -> str:
    """CSV, a row for each convolution that makes channels: how many there were and are, and their |γ|."""
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["block", "line", "before", "after", "candidate", "chain", "mean_gamma"])
    chains = {i: number for number, chain in enumerate(graph.chains()) for i in chain}
    for i in graph.makers():
        scores = choice.scores.get(i)
        mean = "" if scores is None else f"{scores.mean():.6g}"
        after = int(choice.keep[graph.labels[i]].sum())
        line = graph.network.blocks[i].line
        table.writerow([i, line, len(graph.labels[i]), after, int(i in choice.scores), chains.get(i, ""), mean])
    return out.getvalue()


def _print(asked: PruneRequest, document: Mapping[str, Any], certificate: Certificate | None = None) -> None:
    if asked.args.json:
        print_json(document)
        return
    keys = {"AP50": "map50", "AP50-95": "map50_95", "parameters": "parameters", "MACs": "macs",
            ".weights bytes": "weights_bytes", "ms": "ms"}  # fmt: skip
    rows = [(title, document["before"][key], document["after"][key]) for title, key in keys.items()]
    print(text_table((Column(asked.strategy), Column("before"), Column("after")), rows))
    if certificate is not None:
        print(f"certificate: compact = silenced to {certificate.compact_vs_silenced:.0e}, = keep-size to "
              f"{certificate.compact_vs_keep_size:.0e}; border {certificate.border:.2g}")  # fmt: skip
        print(document["cfg"])
        print(document["weights"])
