"""A pruning from checked settings to the written network: rank, choose, remove, prove, measure, write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import Darknet, fuse, network_input
from utils.checkpoint import LoadedModel, load_model
from utils.cli import ProgressBar, command_of, input_size, log, print_json
from utils.darknet.blocks import Network, Shortcut
from utils.darknet.data_file import DataConfig, Source
from utils.darknet.network import max_stride, picture_channels
from utils.device import select_device
from utils.errors import InfeasibleError, InputError
from utils.pruning import report
from utils.pruning.channel_graph import ChannelGraph, Importance, Keep, Removal, channel_graph, residual_units
from utils.pruning.surgery import (
    Arrays,
    PrunedNetwork,
    arrays_of,
    certify,
    fold_constants,
    gammas_of,
    masked,
    model_of,
    most_pictures,
    prune_network,
    reconstruct,
)
from utils.pruning.target import Amount, Plan, PruneTarget, make_plan, plan_for_target, plan_in_rounds
from utils.report.run_dir import RunDirectory
from utils.report.tables import Cost, Latency, interleaved, network_cost

if TYPE_CHECKING:
    from utils.data.augment import Augmentation
    from utils.data.datasets import Batch, Loader
    from utils.detection.evaluate import Accuracy
    from utils.pruning.command import PruneSettings

DRAWN_CONFIDENCE = 0.25
DRAWN_PICTURES = 4
Size = tuple[int, int]
Drawn = list[tuple[NDArray[np.uint8], NDArray[np.floating]]]
"""Pictures [C, H, W] and their detections [k, 6]: x1, y1, x2, y2 in pixels, confidence, class."""


@dataclass(frozen=True, eq=False)
class Pruner:
    """A network that is to be pruned, and the device and pictures that its channels are ranked and measured with."""

    settings: PruneSettings
    device: torch.device
    size: Size
    """Of the network input."""
    graph: ChannelGraph
    arrays: Arrays
    loaded: LoadedModel
    """The network before and what its file says of it."""
    lineage: Sequence[Mapping[str, Any]]
    """Files that it was made from."""

    @property
    def network(self) -> Network:
        """The network before."""
        return self.graph.network

    @property
    def data(self) -> DataConfig:
        """The data set of what is computed from pictures."""
        assert self.settings.data is not None  # PruneSettings refuses flags whose pictures are not given
        return self.settings.data

    @cached_property
    def cost(self) -> Cost:
        """Cost of the network before."""
        return network_cost(self.network, *self.size)

    @cached_property
    def original(self) -> Darknet:
        """The network before, to be run."""
        return self.model(self.network, self.arrays)

    @cached_property
    def pictures(self) -> Loader:
        """The validation pictures."""
        assert self.data.valid is not None  # as above
        return self.loader(self.data.valid, self.network)

    @cached_property
    def fitting_pictures(self) -> list[Tensor]:
        """The training pictures of --reconstruct, in batches [B, C, H, W]."""
        wanted, at_once = self.settings.fitted, self.settings.batch_size
        most = min(wanted, most_pictures(self.network, self.size))
        batches = self.training_batches(self.network, None, math.ceil(most / at_once))
        images = torch.cat([network_input(batch.images, self.device) for batch in batches])[:most]
        if len(images) < wanted:
            why = "more would not fit into memory" if len(images) == most else "there are no more"
            log(f"--reconstruct {wanted}: {len(images)} images are used; {why}")
        return [batch.contiguous(memory_format=torch.channels_last) for batch in images.split(at_once)]

    @cached_property
    def map50(self) -> float:
        """AP50 of the network before.

        Raises:
            InputError: it finds nothing, so that nothing can be lost.
        """
        map50 = self.accuracy("original", self.original)[0].map50
        if map50 == 0:
            raise InputError(f"{self.settings.files.weights}: finds nothing in {self.data.valid}; its AP50 is 0")
        return map50

    def model(self, network: Network, arrays: Arrays) -> Darknet:
        """A network on the device, with its batch normalisations folded."""
        return fuse(model_of(network, arrays)).to(self.device).to(memory_format=torch.channels_last)

    def latency(self, models: Mapping[str, Darknet]) -> dict[str, Latency]:
        """Time of a forward pass of one picture, the models in turn."""
        channels = next(iter(models.values())).network.net.channels
        image = torch.rand(1, channels, *self.size, generator=torch.Generator().manual_seed(0))
        image = image.to(self.device, memory_format=torch.channels_last)

        def forward(model: Darknet) -> None:
            model(image)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        with torch.inference_mode():
            return interleaved({name: partial(forward, model) for name, model in models.items()})

    def training_batches(self, network: Network, augment: Augmentation | None, most: int) -> Iterator[Batch]:
        """Batches of training pictures, in an order and with an augmentation that follow from the seed.

        Args:
            network: that reads the pictures.
            augment: how they vary; None: not at all.
            most: batches; fewer come if the pictures do not make so many.
        """
        assert self.data.train is not None  # as above
        return islice(self.loader(self.data.train, network, augment, shuffle=True), most)

    def loader(
        self, pictures: Source, network: Network, augment: Augmentation | None = None, *, shuffle: bool = False
    ) -> Loader:
        """Batches of the pictures that a file of --data lists, as a network reads them."""
        from utils.data.datasets import DetectionDataset, make_loader  # --no-test needs no pictures
        from utils.data.index import index

        settings, listed, channels = self.settings, index(pictures, self.data.names), picture_channels(network)
        dataset = DetectionDataset(
            listed, size=self.size, mode=settings.mode, augment=augment, seed=settings.seed, channels=channels
        )
        return make_loader(dataset, settings.batch_size, shuffle=shuffle, device=self.device)

    def importance(self, network: Network, arrays: Arrays) -> Importance:
        """Importance of a network's channels and residual units, as the settings compute it."""
        if self.settings.importance == "gamma":
            return {i: np.abs(gamma) for i, gamma in gammas_of(network, arrays).items()}
        from utils.data.augment import Augmentation
        from utils.detection.settings import LossSettings
        from utils.pruning.importance import taylor  # with the loss, which a ranking by γ need not import

        hyp = self.loaded.hyp or ({"flip_lr": 0.0, "flip_ud": 0.0} if self.loaded.no_flip else {})
        augment, loss = (_chosen(kind, hyp) for kind in (Augmentation, LossSettings))
        batches = self.training_batches(network, augment, self.settings.importance_batches)
        return taylor(network, arrays, batches, loss, self.device)

    def ranking(self, graph: ChannelGraph, importance: Importance) -> Importance:
        """Importance to rank by: with a target that of taylor per saved cost; γ stays, as it estimates no loss."""
        target = self.settings.target
        if target is None or self.settings.importance == "gamma":
            return importance
        from utils.pruning.importance import per_saving

        return per_saving(graph, importance, target.counted or "macs", self.size)

    def importance_after(self, keep: Keep) -> Importance:
        """The ranking of the cut network, by the channels of the network before; 0 for removed ones."""
        network, arrays = self.cut(Removal(keep))  # without units, so block numbers stay the same
        ranking = self.ranking(channel_graph(network), self.importance(network, arrays))
        whole = {}
        for i, labels in enumerate(self.graph.labels):
            if i in ranking and not isinstance(network.blocks[i], Shortcut):
                whole[i] = np.zeros(len(labels))
                whole[i][keep[labels]] = ranking[i]
        return whole

    def compensated(self, removal: Removal) -> Arrays:
        """The tensors of the network before, in which readers make up for what goes."""
        if self.settings.fitted and not removal.nothing:
            pictures, seed = self.fitting_pictures, self.settings.seed
            return reconstruct(self.graph, self.arrays, removal, pictures, self.device, seed)
        return fold_constants(self.graph, self.arrays, removal) if self.settings.absorb else self.arrays

    def cut(self, removal: Removal) -> PrunedNetwork:
        """The network that would be written."""
        return prune_network(self.graph, self.compensated(removal), removal)

    def figure(self, target: PruneTarget, plan: Plan) -> float:
        """What a target bounds: parameters, multiply-adds or time as shares of those before, or points of AP50 lost.

        A time is the median of a forward pass, run in turn with the network before.
        """
        if target.counted:
            after = network_cost(plan.after(), *self.size)
            return getattr(after, target.counted) / getattr(self.cost, target.counted)
        if target.kind == "drop":
            before = self.map50
            left = self.model(*self.cut(plan.removal))
            return 100 * (before - self.accuracy(str(plan.amount), left)[0].map50)
        left = self.model(*prune_network(self.graph, self.arrays, plan.removal))
        times = self.latency({"before": self.original, "after": left})
        share = times["after"].median / times["before"].median
        log(f"{plan.amount}: {share:.3f} of the time")
        return share

    def accuracy(self, name: str, model: Darknet) -> tuple[Accuracy, Drawn]:
        """AP over all pictures; some of those with objects, from first to last, with their confident detections."""
        from utils.detection.evaluate import measure_accuracy

        drawn: Drawn = []
        labels = self.pictures.dataset.index.labels
        filled = [number for number, boxes in enumerate(labels) if len(boxes)] or list(range(len(labels)))
        shown = {filled[place] for place in np.linspace(0, len(filled) - 1, DRAWN_PICTURES).round().astype(int)}

        def keep(number: int, batch: Batch, detections: list[Tensor]) -> None:
            for position, image, boxes in zip(batch.positions.tolist(), batch.images, detections, strict=True):
                if position in shown:
                    drawn.append((image.numpy(), boxes[boxes[:, 4] >= DRAWN_CONFIDENCE].numpy()))

        return measure_accuracy(name, model, self.pictures, self.data.names, self.device, keep), drawn


def _chosen(kind: type, hyp: Mapping[str, Any]) -> Any:
    """Settings with those values of a hyper-parameter file that are theirs."""
    return kind(**{field.name: hyp[field.name] for field in dataclasses.fields(kind) if field.name in hyp})


def prune(settings: PruneSettings) -> None:
    """Prune a network, write it and print the outcome.

    Raises:
        InputError: no such device, pictures of other classes or with these in another order, a quantized network, or
            one without residual units.
        InfeasibleError: a layer would be emptied, a target is out of reach, or the certificate fails; nothing is
            written.
        NumericsError: an importance, a fitted weight or a head is not finite.
    """
    device = select_device(settings.device)
    loaded = load_model(settings.files)
    if loaded.quantization is not None:
        raise InputError(
            f"{settings.files.weights}: is quantized, which comes after pruning; give the weights it was made from"
        )
    lineage = loaded.lineage(pruned=True)
    log(*loaded.notes)
    network = loaded.model.network
    settings.check_classes(network)
    if settings.data:
        settings.data.check_order(loaded.names, settings.files.weights)
    size = input_size(settings.img_size, max_stride(network), (network.net.height, network.net.width))
    settings = with_importance(settings, loaded)
    pruner = Pruner(settings, device, size, channel_graph(network), arrays_of(loaded.model), loaded, lineage)
    importance = pruner.importance(network, pruner.arrays)
    ranking = pruner.ranking(pruner.graph, importance)
    plan, target, amounts = None, None, settings.amounts
    if settings.cuts > 1:
        plan, target = plan_in_rounds(pruner, ranking)
    elif settings.target is not None:
        plan, target = plan_for_target(pruner, ranking)
        amounts = (plan.amount,)
    if settings.dry_run:
        document = preview(pruner, ranking, amounts) | {"target": target}
        print_json(document) if settings.json else print(report.grid_text(document))
        return
    plan = plan or make_plan(pruner.graph, ranking, settings.channels, amounts[0])
    document = write(pruner, plan, target, importance)
    print_json(document) if settings.json else print(report.text(document))


def with_importance(settings: PruneSettings, loaded: LoadedModel) -> PruneSettings:
    """Settings with what ranks channels: γ where sparse training penalised them or there are no pictures, else Taylor.

    With Taylor all convolutions are candidates: the classic rules leave out what sparse training did not penalise.
    """
    kind = settings.importance
    if kind is None:
        if loaded.args.get("sr"):
            kind, why = "gamma", "sparse training has penalised γ"
        elif settings.trains:
            kind, why = "taylor", "what masking a channel does to the loss; γ was not trained sparse"
        else:
            kind, why = "gamma", "there are no training images to compute taylor from; give --data"
        log(f"--importance {kind}: {why}")
    channels = settings.channels
    if channels is not None:
        channels = dataclasses.replace(channels, all_convs=channels.all_convs or kind == "taylor")
    return dataclasses.replace(settings, importance=kind, channels=channels)


def advised(settings: PruneSettings, plan: Plan) -> float | None:
    """The percentage that costs little; None unless γ ranks the channels."""
    return plan.choice.advised if settings.importance == "gamma" and plan.choice is not None else None


def groups_of(pruner: Pruner, plan: Plan) -> list[dict[str, Any]] | None:
    """The part of the document on the groups; None without groups."""
    return report.group_figures(plan, pruner.size, by_gamma=pruner.settings.importance == "gamma")


def preview(pruner: Pruner, ranking: Importance, amounts: Sequence[Amount]) -> dict[str, Any]:
    """The document of a dry run: figures of the network that is left, for one amount or for several.

    Raises:
        InfeasibleError: the only amount cannot be carried out.
    """
    settings, graph = pruner.settings, pruner.graph
    least = make_plan(graph, ranking, settings.channels, Amount(0.0, None))
    grid = []
    for amount in amounts:
        after = groups = infeasible = None
        try:
            plan = make_plan(graph, ranking, settings.channels, amount)
            after, groups = report.figures(plan.after(), pruner.size), groups_of(pruner, plan)
        except InfeasibleError as failure:
            if len(amounts) == 1:
                raise
            infeasible = str(failure)
        grid.append({**amount._asdict(), "after": after, "groups": groups, "infeasible": infeasible})
    document = {
        "strategy": settings.strategy.name,
        "before": report.figures(graph.network, pruner.size),
        "residual_units": None if amounts[0].shortcut is None else len(residual_units(graph.network)),
        "max_percent": least.max_percent,
        "advised_percent": advised(settings, least),
        "grid": grid,
    }
    return document | ({key: grid[0][key] for key in ("after", "groups")} if len(grid) == 1 else {})


def write(pruner: Pruner, plan: Plan, target: Mapping[str, Any] | None, importance: Importance) -> dict[str, Any]:
    """Carry out a plan and write all files of the run; returns the document of --json.

    Args:
        pruner: the network and its pictures.
        plan: what goes.
        target: the part of the document that says how it was found.
        importance: of the network before.

    Raises:
        InfeasibleError: the certificate fails.
    """
    settings, network, size = pruner.settings, pruner.network, pruner.size
    document = {"strategy": settings.strategy.name, **plan.amount._asdict(), "target": target}
    document |= {"importance": settings.importance, "rounds": settings.cuts}
    document |= {
        "before": report.figures(network, size),
        "max_percent": plan.max_percent,
        "advised_percent": advised(settings, plan),
        "groups": groups_of(pruner, plan),
        "after": report.figures(plan.after(), size),
    }
    pruned, figures = carry_out(pruner, plan.removal)
    document |= figures
    picture = None
    if settings.test:
        picture = measure(pruner, plan.removal, pruned, document)
    with RunDirectory.create(settings.project, settings.name, exist_ok=settings.exist_ok).until("model.cfg") as run:
        document["run_dir"] = str(run.path)
        document |= {key: str(run.file(f"model.{key}")) for key in ("cfg", "weights")}
        document["data"] = str(settings.data.path) if settings.data else None
        document["next"] = next_step(settings, document)
        run.describe(args=settings.flags)
        bars = report.layer_bars(plan)
        policy = settings.channels and dataclasses.asdict(settings.channels) | {"percent": plan.amount.percent}
        run.write_json("plan.json", report.plan_document(plan, policy, importance, document))
        run.write_text("channels.csv", report.channel_table(plan, bars, importance))
        run.write_text("report.md", report.markdown(document))
        report.draw(run, plan, bars)
        if picture is not None:
            from utils.data.images import write_image

            write_image(run.file("detections.jpg"), picture)
        names = pruner.loaded.names or (settings.data and settings.data.names)
        names = names or tuple(map(str, range(network.classes)))
        report.write_network(run, pruned, names, pruner.lineage)
    return document


def next_step(settings: PruneSettings, document: Mapping[str, Any]) -> str:
    """The training that comes next, in which the network before is the teacher.

    It starts from model.pt, as a .weights file says nothing of mirrored images. Two
    numbers of --img_size, H W, would be MIN MAX there: with different ones it takes the cfg's size.
    """
    files, sides = settings.files, set(settings.img_size or ())
    flags = {"weights": f"{document['run_dir']}/model.pt", "data": document["data"] or "DATA.data"}
    t_cfg = files.network.path if files.network else None  # a .pt of another suite does not say its network
    side = sides.pop() if len(sides) == 1 else None
    flags |= {"img_size": side, "t_cfg": t_cfg, "t_weights": files.weights, "epochs": 50}
    return command_of("train.py", **flags)


def carry_out(pruner: Pruner, removal: Removal) -> tuple[PrunedNetwork, dict[str, Any]]:
    """Prune a network and prove that it was pruned right; the parts of the document that say so.

    Raises:
        InfeasibleError: the certificate fails.
        NumericsError: a fitted weight or a head is not finite.
    """
    graph, arrays = pruner.graph, pruner.arrays
    whole = pruner.compensated(removal)
    pruned, bare = prune_network(graph, whole, removal), prune_network(graph, arrays, removal)
    fitted = bool(pruner.settings.fitted) and not removal.nothing
    with ProgressBar("certificate"):
        certificate = certify(graph, arrays, whole, removal, bare, pruned, fitted=fitted)
    certificate.check()
    pictures = sum(map(len, pruner.fitting_pictures)) if fitted else 0
    unmeasured = dict.fromkeys(("silenced", "absorbed", "latency", "efficiency"))
    return pruned, {"certificate": dataclasses.asdict(certificate), "reconstructed": pictures, **unmeasured}


def measure(pruner: Pruner, removal: Removal, pruned: PrunedNetwork, document: dict[str, Any]) -> NDArray[np.uint8]:
    """Write accuracies and times into the document; returns pictures with detections before and after.

    The networks are measured one after the other: the one before, the two of full size that explain the difference, and
    the one that is left. `efficiency` is the gain in time over the gain in multiply-adds: 1 where all of these that go
    save their time.
    """
    before = pruner.original
    accuracy, drawn_before = pruner.accuracy("original", before)
    document["before"] |= accuracy._asdict()
    with masked(before, pruner.graph, removal):
        document["silenced"] = pruner.accuracy("masked", before)[0]._asdict()
    if pruner.settings.absorb:
        folded = pruner.model(pruner.network, fold_constants(pruner.graph, pruner.arrays, removal))
        with masked(folded, pruner.graph, removal):
            document["absorbed"] = pruner.accuracy("constants folded", folded)[0]._asdict()
        del folded
    after = pruner.model(*pruned)
    accuracy, drawn_after = pruner.accuracy("pruned", after)
    document["after"] |= accuracy._asdict()
    times = pruner.latency({"original": before, "compact": after})
    document["before"]["ms"], document["after"]["ms"] = times["original"].median, times["compact"].median
    faster, less = (document["before"][key] / document["after"][key] for key in ("ms", "macs"))
    on_gpu = pruner.device.type == "cuda"
    runtime = torch.cuda.get_device_name(pruner.device) if on_gpu else f"CPU, threads: {torch.get_num_threads()}"
    sides = {"height": pruner.size[0], "width": pruner.size[1], "runtime": runtime}
    document["latency"] = {name: dataclasses.asdict(latency) for name, latency in times.items()} | sides
    document["efficiency"] = faster / less
    titles = [f"{name}: AP50 {document[key]['map50']:.3f}" for key, name in (("before", "before"), ("after", "pruned"))]
    return side_by_side(drawn_before, drawn_after, pruner.data.names, titles)


def side_by_side(before: Drawn, after: Drawn, names: Sequence[str], titles: Sequence[str]) -> NDArray[np.uint8]:
    """A row for each picture: left with detections before, right with those after; uint8 [H, W, 3], RGB.

    Boxes that the other network has not, as `detected` matches them, are marked.
    """
    from utils.data.draw import GAINED, LOST, draw_grid
    from utils.detection.average_precision import detected

    pictures, boxes, marks = [], [], []
    for (picture, old), (_, new) in zip(before, after, strict=True):
        pictures += [picture, picture]
        boxes += [old, new]
        marks += [[(old[~detected(old, new)], "lost", LOST)], [(new[~detected(new, old)], "new", GAINED)]]
    return draw_grid(np.stack(pictures), boxes, names, titles, marks)
