"""Write a cfg in another form, with its weights: one that a piece of hardware runs, or runs faster.

Two rewrites are exact, which the certificate of a pruning proves. `--pools chained` replaces larger max pools, as in an
SPP, by chains of ones up to 5 x 5. `--upsample late` upsamples behind a 1 x 1 convolution, not before it. The others,
`--activation` and `--drop-se`, change what the network computes: it must be trained again.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.cli import Parser, command_of, log, print_json, run
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import Block, Convolutional, Maxpool, Network, Route, ScaleChannels, Se, Upsample
from utils.darknet.blocks.block import ACTIVATION, IMAGE
from utils.darknet.blocks.values import SectionError
from utils.darknet.network import tensors
from utils.darknet.targets import LINK, chainable
from utils.errors import InputError
from utils.files import atomic_write_text
from utils.flags import ModelFiles, choose_model, is_checkpoint

if TYPE_CHECKING:
    from utils.checkpoint import LoadedModel
    from utils.pruning.surgery import Certificate, PrunedNetwork

EXAMPLE = "python -m utils.darknet.rewrite cfg/yolov4.cfg --activation mish=leaky --pools chained -o leaky.cfg"


class Node(NamedTuple):
    """A block and the keys of the nodes that it reads, in the order of `Block.reads`."""

    block: Block
    reads: tuple[int, ...]


Graph = dict[int, Node]
"""Nodes in the order of the cfg by their keys: the number of the block at first, a larger one for a new node."""
Rewrite = Callable[[Graph], Graph]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the script."""
    parser = Parser(__doc__, EXAMPLE, "python -m utils.darknet.rewrite")
    add = parser.add_argument_group("network").add_argument
    add("cfg", metavar="CFG", help="Darknet network description")
    add("--weights", metavar="FILE", help="its .pt or .weights; one for the new cfg is written beside that")
    add("-o", "--output", type=Path, required=True, metavar="CFG", help="the cfg to write; it must not exist")
    add("--json", action="store_true", help="print one JSON document")
    add = parser.add_argument_group("exact").add_argument
    add("--pools", choices=("chained",), help=f"max pools of stride 1 and a side above {LINK} become chains")
    add("--upsample", choices=("late",), help="an upsampling comes behind the 1 x 1 convolution that alone reads it")
    add = parser.add_argument_group("to be trained").add_argument
    swaps = "activations to replace, but in heads: mish=leaky swish=relu6"
    add("--activation", type=swap_of, nargs="+", default=[], metavar="OLD=NEW", help=swaps)
    add("--drop-se", action="store_true", help="leave out [se], and [scale_channels] with the blocks that lead to it")
    args = parser.parse_args(argv)
    if not (args.pools or args.upsample or args.activation or args.drop_se):
        raise InputError("nothing to rewrite; give --activation, --pools, --upsample or --drop-se")
    olds = [old for old, _ in args.activation]
    if both := sorted({new for old, new in args.activation if new != old} & set(olds)):
        raise InputError(
            f"--activation: {both[0]} is replaced and takes another one's place; rewrite one after the other"
        )
    if args.output.suffix != ".cfg" or not args.output.parent.is_dir():
        raise InputError(f"--output {args.output}: give a name that ends in .cfg, in a folder that is there")
    return args


def swap_of(text: str) -> tuple[str, str]:
    """OLD=NEW, two activations; argparse type."""
    old, _, new = text.partition("=")
    try:
        return ACTIVATION.read(old), ACTIVATION.read(new)
    except SectionError as fault:
        raise argparse.ArgumentTypeError(f"{text!r} is not OLD=NEW, such as mish=leaky: {fault}") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite, prove what is exact, then write the files."""
    args = parse_args(argv)
    network = cfg_file.load(args.cfg)
    suffix = args.weights and (".pt" if is_checkpoint(Path(args.weights)) else ".weights")
    weights = args.output.with_suffix(suffix) if suffix else None
    for path in (args.output, weights):
        if path and os.path.lexists(path):
            raise InputError(f"--output {args.output}: {path} exists; choose another name")
    exact = {f"{name} {value}": EXACT[name] for name in EXACT if (value := getattr(args, name))}
    others: dict[str, Rewrite] = {"drop-se": drop_se} if args.drop_se else {}
    others |= {f"activation {'='.join(swap)}": partial(swap_activation, *swap) for swap in args.activation}
    rewritten(graph_of(network), exact | others, args.cfg)  # refuses what changes nothing before PyTorch is loaded
    loaded = loaded_model(network, args.weights)
    equal = rewritten(graph_of(loaded.model.network), exact, args.cfg)
    difference = certificate(loaded, equal).compact_vs_silenced_float64 if exact else None
    write(loaded, rewritten(equal, others, args.cfg), args.output, weights)
    document = {"cfg": str(args.output), "weights": weights and str(weights), "exact": not others}
    document |= {"difference": difference, "next": next_command(args, weights, exact=not others)}
    print_json(document) if args.json else print(text(document))


def rewritten(graph: Graph, rewrites: Mapping[str, Rewrite], path: str) -> Graph:
    """A graph after some rewrites, by their flags.

    Raises:
        InputError: one changes nothing.
    """
    for name, rewrite in rewrites.items():
        before, graph = graph, rewrite(graph)
        if graph == before:
            raise InputError(f"--{name}: changes nothing in {path}; leave it out")
    return graph


def graph_of(network: Network) -> Graph:
    """The blocks of a network as nodes."""
    return {index: Node(block, block.reads(index)) for index, block in enumerate(network.blocks)}


def lay_out(network: Network, graph: Graph) -> tuple[Network, dict[int, int]]:
    """A network of the nodes, with routes where a block does not stand behind the one it reads.

    Returns:
        It, and the key of the node by the number of its block there.
    """
    blocks: list[Block] = []
    numbers = {IMAGE: IMAGE}
    for key, (block, reads) in graph.items():
        sources = [numbers[source] for source in reads]
        if not isinstance(block, Route) and sources[0] != len(blocks) - 1:
            blocks.append(Route(layers=(sources[0],)))
        moved = dict(zip(block.reads(key), sources, strict=True))
        numbers[key] = len(blocks)
        blocks.append(block.pruned(getattr(block, "filters", 0), 0, moved.__getitem__))
    return replace(network, blocks=tuple(blocks)), {number: key for key, number in numbers.items()}


def renamed(graph: Graph, before: Graph, names: Mapping[int, int]) -> Graph:
    """The graph where all read other nodes, without the nodes that nobody reads any more.

    Args:
        graph: without the nodes whose keys are in `names`.
        before: what it was made of.
        names: keys, and the key that is read in place of each.
    """

    def target(key: int) -> int:
        return target(names[key]) if key in names else key

    once_read = {source for node in before.values() for source in node.reads}
    read: set[int] = set()
    result = []
    for key, (block, reads) in reversed(graph.items()):
        if key in read or key not in once_read:
            result.append((key, Node(block, tuple(map(target, reads)))))
            read.update(result[-1][1].reads)
    return dict(reversed(result))


def chain_pools(graph: Graph) -> Graph:
    """Pools of stride 1 as chains: a maximum over 9 x 9 cells is one of 5 x 5 over maxima of 5 x 5, also at a border.

    A chain begins with the largest pool of the same map that is there already.
    """
    result: Graph = {}
    names: dict[int, int] = {}
    chains: dict[int, dict[int, int]] = {}  # by the map: the node that has the maximum over so many cells
    fresh = itertools.count(max(graph) + 1)
    for key, node in graph.items():
        block, (source, *_) = node
        if not (isinstance(block, Maxpool) and chainable(block)):
            result[key] = node
            continue
        while isinstance(route := graph.get(source, node).block, Route) and (len(route.layers), route.groups) == (1, 1):
            (source,) = graph[source].reads
        chain = chains.setdefault(source, {1: source})
        side = max(side for side in chain if side <= block.size)
        while side < block.size:
            link = min(LINK, block.size - side + 1)
            whole = side + link - 1
            number = key if whole == block.size else next(fresh)
            pool = replace(block, size=link, padding=link - 1)
            result[number] = node if pool == block else Node(pool, (chain[side],))
            chain[whole], side = number, whole
        if chain[block.size] != key:
            names[key] = chain[block.size]
    return renamed(result, graph, names)


def late_upsampling(graph: Graph) -> Graph:
    """1 x 1 convolutions before the upsampling that they alone read: it copies cells, so they are fewer before."""
    readers = Counter(source for node in graph.values() for source in node.reads)
    heads = head_convolutions(graph)
    for key, (block, (source, *_)) in graph.items():
        before = graph.get(source)
        if not before or not isinstance(before.block, Upsample) or readers[source] > 1 or key in heads:
            continue
        if isinstance(block, Convolutional) and (block.size, *block.step(), block.padding) == (1, 1, 1, 0):
            swap = {key: source, source: key}
            nodes = {k: Node(n.block, tuple(source if r == key else r for r in n.reads)) for k, n in graph.items()}
            nodes |= {key: Node(block, before.reads), source: Node(before.block, (key,))}
            return late_upsampling({swap.get(k, k): nodes[swap.get(k, k)] for k in graph})
    return graph


def drop_se(graph: Graph) -> Graph:
    """The graph without squeeze-and-excite, as a block or as linear [scale_channels] and what leads to it."""
    names = {}
    for key, (block, reads) in graph.items():
        if isinstance(block, Se):
            names[key] = reads[0]
        elif isinstance(block, ScaleChannels) and block.activation == "linear":
            names[key] = reads[1]
    return renamed({key: node for key, node in graph.items() if key not in names}, graph, names)


def swap_activation(old: str, new: str, graph: Graph) -> Graph:
    """The graph with another activation wherever one is, but in front of a head, whose values have a meaning."""
    heads, changed = head_convolutions(graph), dict(graph)
    for key, (block, reads) in graph.items():
        kind: Any = block
        if getattr(kind, "activation", None) == old and key not in heads:
            changed[key] = Node(replace(kind, activation=new), reads)
    return changed


def head_convolutions(graph: Graph) -> set[int]:
    """Keys of the convolutions that heads read."""
    return {node.reads[0] for node in graph.values() if node.block.IS_HEAD}


EXACT: dict[str, Rewrite] = {"pools": chain_pools, "upsample": late_upsampling}
"""By their flags."""


def loaded_model(network: Network, weights: str | None) -> LoadedModel:
    """The model of the cfg, with the weights or with random ones.

    Raises:
        InputError: it is quantized.
    """
    import torch

    from utils.checkpoint import load_model

    torch.manual_seed(0)
    files = choose_model(network, weights) if weights else ModelFiles(network, None)
    loaded = load_model(files)
    log(*files.notes, *loaded.notes)
    if loaded.quantization is not None:
        raise InputError(f"--weights {weights}: is quantized; give the float weights it was made from")
    return loaded


def carried(loaded: LoadedModel, graph: Graph) -> PrunedNetwork:
    """The network of a graph, with the tensors that its blocks had."""
    from utils.pruning.surgery import PrunedNetwork, arrays_of

    network, keys = lay_out(loaded.model.network, graph)
    arrays = arrays_of(loaded.model)
    return PrunedNetwork(
        network, {spec.key: arrays[spec._replace(block=keys[spec.block]).key] for spec in tensors(network)}
    )


def certificate(loaded: LoadedModel, equal: Graph) -> Certificate:
    """The proof of a pruning that removes nothing: both networks compute the same on a random picture.

    Raises:
        InfeasibleError: they do not.
    """
    import numpy as np

    from utils.pruning.channel_graph import Removal, channel_graph
    from utils.pruning.surgery import arrays_of, certify

    graph, arrays, after = channel_graph(loaded.model.network), arrays_of(loaded.model), carried(loaded, equal)
    proof = certify(graph, arrays, arrays, Removal(np.ones(graph.count, np.bool_)), after, after, fitted=True)
    proof.check()
    return proof


def write(loaded: LoadedModel, final: Graph, cfg: Path, weights: Path | None) -> None:
    """Write the weights, and then the cfg."""
    from utils.checkpoint import model_document, write_checkpoint, write_darknet
    from utils.pruning.surgery import model_of

    network, arrays = carried(loaded, final)
    content = cfg_file.format_network(network)
    model = model_of(cfg_file.parse(content, str(cfg), warn=lambda _: None), arrays)
    if weights and weights.suffix == ".pt":
        names = loaded.names or tuple(map(str, range(network.classes)))
        write_checkpoint(weights, model_document(model.state_dict(), network, names, loaded.lineage()))
    elif weights:
        write_darknet(weights, model)
    atomic_write_text(cfg, content)


def next_command(args: argparse.Namespace, weights: Path | None, *, exact: bool) -> str:
    """The command that measures an exact rewrite, or trains the network, with the one before as its teacher."""
    darknet = weights is None or weights.suffix == ".weights"
    flags = {"data": "DATA.data", "cfg": args.output if darknet else None, "weights": weights}
    if weights and exact:
        return command_of("test.py", **flags)
    teacher = {"t_cfg": args.cfg, "t_weights": args.weights, "KDstr": 4} if weights else {}
    return command_of("train.py", **flags, **teacher)


def text(document: Mapping[str, Any]) -> str:
    """The document for people."""
    lines = [f"written: {path}" for path in (document["weights"], document["cfg"]) if path]
    if document["difference"] is not None:
        lines.append(f"exact rewrites: heads differ by {document['difference']:.1e} in float64")
    if not document["exact"]:
        lines.append("a rewrite that is not exact changes what the network computes: it must be trained again")
    return "\n".join([*lines, f"next: {document['next']}"])


if __name__ == "__main__":
    run(main)
