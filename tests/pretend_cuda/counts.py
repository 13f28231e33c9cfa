"""Counts what training steps, losses and evaluations do on a simulated GPU, and prints it as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks import step
from benchmarks.step import TimedTraining
from models import Darknet, fuse, reduced
from tests.nets import tiny
from utils.cli import processes
from utils.darknet import cfg as cfg_file
from utils.darknet.network import trace
from utils.detection.evaluate import decoded_rows, suppressed
from utils.detection.losses import detection_loss
from utils.detection.settings import EvaluationSettings, LossSettings
from utils.training.distributed import joined

GPU, COUNTS = torch.device("cuda", 0), {}


def count(name: str, work: Callable[[], object]) -> None:
    """Count a second call; the first one makes constants and the optimizer's state."""
    work()
    before = torch.cuda.pretend.counts()
    work()
    COUNTS[name] = {key: value - before[key] for key, value in torch.cuda.pretend.counts().items()}


def load(name: str) -> Darknet:
    """A new network."""
    return Darknet(tiny() if name == "tiny" else cfg_file.load(f"cfg/{name}.cfg"))


def loss(name: str, pictures: int, boxes: int) -> None:
    """Count the loss of a batch at 416."""
    network = cfg_file.load(f"cfg/{name}.cfg")
    strides = [network.net.height // trace(network)[head].height for head in network.heads]
    heads = [
        torch.randn(pictures, len(yolo.mask) * (5 + yolo.classes), 416 // stride, 416 // stride, device=GPU)
        for yolo, stride in zip(network.yolos, strides, strict=True)
    ]
    targets = 0.1 + 0.8 * torch.rand(boxes, 6)
    targets[:, 0] = torch.arange(boxes) % pictures
    count(f"loss {name}", lambda: detection_loss(heads, targets, network.yolos, (416, 416), LossSettings()))


KINDS = {"plain": {}, "sparse": {"sr": True, "prune": 1}, "proximal": {"sr": True, "prune": 1, "adam": True}}


def together() -> None:
    """Count a step of each of the processes that torchrun started, and what they exchange beside the gradient."""
    exchanged, exchange = [], dist.all_reduce
    dist.all_reduce = lambda values: exchanged.append(values.numel()) or exchange(values)
    with joined("") as team:
        step.Team = lambda _: team
        work = TimedTraining(load("yolov4-tiny"), 64, 4, str(team.device)).step
        work()  # in the second step, once, DistributedDataParallel settles the order of the gradients
        count("step", work)
        counts = team.gather({**COUNTS["step"], "exchanged": exchanged[len(exchanged) // 3 * 2 :]})
    if team.leads:
        print(json.dumps(counts))


def alone() -> None:
    """Count all."""
    for name in ("tiny", "yolov4-tiny"):
        for kind, flags in KINDS.items():
            training = TimedTraining(load(name), 64, 4, "cuda:0", **flags)
            count(f"{kind} {name}", training.step)
        count(f"average {name}", training.trainer.state.average.update)
    count("distilled", TimedTraining(load("yolov4-tiny"), 64, 4, "cuda:0", teaches_itself=True).step)
    loss("yolov4-tiny", 16, 48)
    loss("yolov4", 64, 1000)
    settings, images = EvaluationSettings(), torch.rand(4, 3, 64, 64).to(GPU)
    whole, half = fuse(load("yolov4-tiny")).to(GPU), reduced(fuse(load("yolov4-tiny")), torch.float16).to(GPU)
    with torch.inference_mode():
        count("forward", lambda: whole(images))
        count("forward --half", lambda: half(images))
        count("evaluation", lambda: suppressed(decoded_rows(whole, images, settings), settings))
    print(json.dumps(COUNTS))


if __name__ == "__main__":
    together() if processes() > 1 else alone()
