"""A training step, its memory and its distillation, for `benchmarks.ratios`."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import suite
from benchmarks.ratios import Laps, Settings, paired
from models import Darknet, network_input
from utils.checkpoint import load_model, write_darknet
from utils.darknet import cfg as cfg_file
from utils.darknet.blocks import BN_EPSILON, Convolutional, Maxpool, Route, Upsample, Yolo
from utils.data.datasets import Batch
from utils.detection.settings import ASSIGNMENTS, LossSettings
from utils.device import keep_freed_memory, training_type
from utils.distillation.strategies import AT, KD, distillation
from utils.distillation.terms import Distiller, Teacher
from utils.flags import choose_model
from utils.report.run_dir import RunDirectory
from utils.training.checkpointing import Source
from utils.training.distributed import Team
from utils.training.hyperparameters import Hyperparameters
from utils.training.loop import Objective, Trainer
from utils.training.settings import TrainSettings

OBJECTS = 3
"""Boxes in a picture."""
CHILD = "import sys; from benchmarks.step import measure; measure(sys.argv[1], *map(int, sys.argv[2:]))"
"""A process that measures itself."""


class TimedTraining:
    """A model, random pictures with boxes, and a trainer.

    Args:
        model: it is trained.
        side: of a picture, in pixels.
        count: pictures in a batch.
        device: where it is trained.
        options: flags of train.py; with `teaches_itself` it learns by --KDstr 4 from a copy, too.
    """

    def __init__(self, model: Darknet, side: int, count: int, device: str = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        teaches_itself, team, distiller = options.pop("teaches_itself", False), Team(torch.device(device)), None
        self.net = model.train().to(device).to(memory_format=torch.channels_last)
        self.targets = torch.rand(count * OBJECTS, 6)
        self.targets[:, 0] = torch.arange(count).repeat_interleave(OBJECTS)
        self.targets[:, 1] = (self.targets[:, 1] * model.network.classes).floor()
        self.targets[:, 4:] = 0.05 + 0.4 * self.targets[:, 4:]
        pictures = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        if device != "cpu":
            pictures = pictures.pin_memory()
        self.batch = Batch(pictures, self.targets, self.targets[:0], torch.arange(count), ())
        self.images = network_input(pictures, device)
        settings = TrainSettings(epochs=100, size=(side, side), test_size=(side, side), **options)
        if teaches_itself:
            teacher = Teacher(model, team.device, training_type(settings.precision, team.device))
            distiller = Distiller(model, teacher, distillation("4", None), ASSIGNMENTS["darknet"], team.positives)
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory(Path(folder))
            how = Hyperparameters(), settings, run, Source((), (), {}, {}, {}), team, distiller
            self.trainer = Trainer(self.net, range(100), None, *how)

    def stack(self) -> None:
        """Forward and backward of the bare stack with the model's parameters."""
        drop_gradients(self.net, sum(head.sum() for head in stack(self.net, self.images)))

    def model_and_loss(self, objective: Objective | None = None) -> None:
        """Forward and backward of the model with its loss."""
        drop_gradients(self.net, (objective or self.trainer.objective)(self.images, self.targets)["total"])

    def apart(self, teacher: Teacher) -> None:
        """The same, and the forward pass of a teacher."""
        self.model_and_loss()
        teacher(self.images)

    def step(self) -> None:
        """What train.py does with a batch."""
        self.trainer.train_batch(self.batch, 0)


def drop_gradients(model: Darknet, loss: Tensor) -> None:
    """Backward pass of a loss whose gradients nobody wants."""
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def stack(model: Darknet, x: Tensor) -> list[Tensor]:
    """Heads of a network made of convolutions, routes, pools and upsampling only."""
    outputs: list[Tensor] = []
    heads = []
    for block, layer in zip(model.network.blocks, model.layers, strict=True):
        if isinstance(block, Convolutional):
            conv = layer.conv
            x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            if block.batch_normalize:
                bn = layer.bn
                x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.03, BN_EPSILON)
            x = F.leaky_relu(x, 0.1, inplace=True) if block.activation == "leaky" else x
        elif isinstance(block, Route):
            parts = [outputs[source] for source in block.layers]
            x = (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).chunk(block.groups, 1)[block.group_id]
        elif isinstance(block, Maxpool):
            before, after = block.padding // 2, block.padding - block.padding // 2
            x = F.pad(x, (before, after, before, after), value=-torch.inf) if after else x
            x = F.max_pool2d(x, block.size, (block.stride_y, block.stride_x))
        elif isinstance(block, Upsample):
            x = F.interpolate(x, scale_factor=block.stride)
        elif isinstance(block, Yolo):
            heads.append(x)
        outputs.append(x)
    return heads


def step(settings: Settings) -> Iterator[tuple[str, Laps]]:
    """A whole training step, and the model with its loss, beside the bare convolutions, routes and pools.

    The step normalises, clips, optimizes and averages weights, too. The stack goes backward from the sum of the heads.
    """
    for path in settings.cfg:
        training = TimedTraining(Darknet(cfg_file.load(path)), settings.img_size, settings.batch_size)
        works = {"bare stack": training.stack, "model + loss": training.model_and_loss, "step": training.step}
        yield f"{path} at {settings.img_size}, batch {settings.batch_size}", paired(works, settings.rounds)


def memory(settings: Settings) -> Iterator[tuple[str, Laps]]:
    """A step and the peak of a process where freed memory is kept, beside one with glibc's ways."""
    # A variable of glibc's allocator, even one that changes nothing, keeps `utils.device` from doing anything.
    environments = {"given back": {"MALLOC_PERTURB_": "0"}, "kept": {}}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    for path in settings.cfg:
        numbers = map(str, (settings.img_size, settings.batch_size, settings.rounds))
        command = [sys.executable, "-c", CHILD, path, *numbers]
        figures: dict[str, list[list[float]]] = {name: [] for name in environments}
        for _ in range(3):
            for name, variables in environments.items():
                text = subprocess.run(command, env=inherited | variables, check=True, stdout=subprocess.PIPE).stdout
                figures[name].append(json.loads(text))
        measured = f"{path} at {settings.img_size}, batch {settings.batch_size}, a step", f"{path}, peak in MiB"
        for number, what in enumerate(measured):
            yield what, {name: [pair[number] for pair in pairs] for name, pairs in figures.items()}


def measure(path: str, side: int, count: int, rounds: int) -> None:
    """Print the median milliseconds of a step, and the most memory that this process had, in MiB."""
    keep_freed_memory()
    laps = paired({"step": TimedTraining(Darknet(cfg_file.load(path)), side, count).step}, rounds)
    print(json.dumps([statistics.median(laps["step"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def distil(settings: Settings) -> Iterator[tuple[str, Laps]]:
    """Forward and backward with distillation, beside the same without and the teacher's forward pass.

    The student is what slim pruning leaves of a network with random γ when half of the channels go.
    """
    cpu = torch.device("cpu")
    for path in settings.cfg:
        model = Darknet(cfg_file.load(path))
        for name, value in model.state_dict().items():
            if name.endswith("bn.weight"):
                value.uniform_()
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder, "teacher.weights")
            write_darknet(weights, model)
            amount = ("--percent", "0.5", "--importance", "gamma", "--no-test")
            files = ("--cfg", path, "--weights", weights, "--project", folder, "--name", "student")
            suite.python("slim_prune.py", *files, *amount)
            student = load_model(choose_model(None, f"{folder}/student/model.pt"))
        training, teacher = TimedTraining(student.model, settings.img_size, settings.batch_size), Teacher(model, cpu)
        loss = LossSettings()
        for strategy in [distillation(key, None) for key in KD] + [distillation(None, key) for key in AT]:
            distiller = Distiller(training.net, teacher, strategy, ASSIGNMENTS[loss.assignment])
            distilled = partial(training.model_and_loss, Objective(training.net, loss, None, Team(cpu), distiller))
            works = {"step + teacher": partial(training.apart, teacher), strategy.name: distilled}
            yield f"half of {path} at {settings.img_size}, batch {settings.batch_size}", paired(works, settings.rounds)


STEPS = {"step": step, "memory": memory, "distil": distil}
