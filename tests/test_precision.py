"""What computes in 16 bits, what must not, and steps whose gradient is not finite; on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.step import TimedTraining
from models import ConvBlock, Darknet, reduced
from tests.nets import TINY, tiny
from utils.checkpoint import read_checkpoint
from utils.darknet.blocks import Convolutional
from utils.darknet.cfg import parse
from utils.detection.losses import detection_loss
from utils.detection.settings import LossSettings
from utils.device import training_type
from utils.errors import InputError, NumericsError
from utils.quantization.quantizers import Folding, WeightQuantizer
from utils.quantization.scheme import Grid, QuantSettings
from utils.training.checkpointing import Progress, State
from utils.training.settings import TrainSettings
from utils.training.sparsity import Sparsity

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF_TYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def training():
    """A trainer of the tiny network, with a scaler as a GPU has it."""
    made = TimedTraining(Darknet(parse(TINY)), 64, 2)
    made.trainer.state.scaler = torch.amp.GradScaler("cpu")
    return made


def spoiled(training):
    """Let the next gradient of the first weight be infinite."""
    weight = training.net.layers[0].conv.weight

    def infinite(gradient):
        handle.remove()
        return gradient * torch.inf

    handle = weight.register_hook(infinite)


def test_a_skipped_first_step_counts_in_the_log_and_leaves_nothing_behind(training, monkeypatch):
    """New memory is NaN here: momentum that is allocated by the skipped step and read by the next would show."""
    plain = torch.empty_like

    def garbage(like, **options):
        made = plain(like, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty_like", garbage)
    before, trainer = [parameter.clone() for parameter in training.net.parameters()], training.trainer
    spoiled(training)
    training.step()
    assert all(map(torch.equal, before, training.net.parameters()))
    assert (trainer.progress.step, trainer.state.average.updates, trainer.progress.sums) == (0, 0, {"skipped": 1})
    assert trainer.state.scaler.get_scale() == 2.0**15
    training.step()
    assert (trainer.progress.step, trainer.state.average.updates) == (1, 1)
    momenta = [state["momentum_buffer"] for state in trainer.state.optimizer.state.values()]
    assert momenta and all(torch.isfinite(momentum).all() for momentum in momenta)
    assert all(torch.isfinite(parameter).all() for parameter in training.net.parameters())
    assert not all(map(torch.equal, before, training.net.parameters()))


def test_a_skipped_step_leaves_the_scales_that_sparse_training_shrinks(training):
    trainer = training.trainer
    settings = TrainSettings(sr=True, s=0.1, prune=1, adam=True)
    trainer.sparsity = Sparsity(training.net, settings, trainer.schedule)
    before = [gamma.clone() for gamma in trainer.sparsity.gammas()]
    spoiled(training)
    training.step()
    assert all(map(torch.equal, before, trainer.sparsity.gammas()))
    training.step()
    assert not any(map(torch.equal, before, trainer.sparsity.gammas()))


def test_a_loss_that_is_not_finite_says_in_which_type_it_was_computed(training):
    trainer = training.trainer
    trainer.dtype = torch.bfloat16
    trainer.train_loader = SimpleNamespace(dataset=SimpleNamespace(index=SimpleNamespace(images=["a.jpg"])))
    message = r"computed in torch\.bfloat16 \(--amp off computes in float32\); images a\.jpg"
    with pytest.raises(NumericsError, match=message):
        trainer._fail({"total": torch.nan}, 0, [0])


def test_an_evaluation_that_overflows_is_done_in_float32(training, monkeypatch):
    """float16 ends at 65 504; the weights are as healthy as before."""
    dtypes = []

    def measured(model, *_, **__):
        dtypes.append(model.input_type)
        if model.input_type is torch.float16:
            raise NumericsError("the network returns NaN")
        return SimpleNamespace(metrics="scores")

    monkeypatch.setattr("utils.training.loop.evaluate", measured)
    training.trainer.val_loader = training.trainer.train_loader
    assert training.trainer._evaluate(torch.float16) == "scores"
    assert dtypes == [torch.float16, None]


def test_without_a_scaler_the_run_ends(training):
    training.trainer.state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    spoiled(training)
    with pytest.raises(NumericsError, match="step 1: the gradient is not finite; the last checkpoint"):
        training.step()


def test_the_state_of_a_scaler_survives_a_stretch_on_a_cpu(training):
    trained = training.trainer.state
    trained.scaler.load_state_dict({**trained.scaler.state_dict(), "scale": 1024.0})
    saved = trained.complete(training.trainer.source)

    def passed(checkpoint, *, scaled: bool):
        other = State(
            trained.model, trained.average, trained.optimizer, torch.amp.GradScaler("cpu", enabled=scaled), Progress()
        )
        other.restore(checkpoint)
        return other.complete(training.trainer.source)

    on_cpu = passed(saved, scaled=False)
    assert passed(on_cpu, scaled=True)["scaler"]["scale"] == 1024.0
    never = passed({**saved, "scaler": {}}, scaled=True)  # a run that began on a CPU
    assert never["scaler"]["scale"] == 2.0**16


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_heads_and_all_behind_them_are_float32_under_autocast(dtype):
    network, images = tiny(), torch.rand(2, 3, 64, 64)
    model = Darknet(network)
    before = {network.blocks[head].reads(head)[0] - 1 for head in network.heads}
    with torch.autocast("cpu", dtype):
        outputs = model(images, before)
    assert {head.dtype for head in outputs.heads} == {torch.float32}
    assert {feature.dtype for feature in outputs.features.values()} == {dtype}
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.2, 0.2]])
    assert detection_loss(outputs.heads, targets, network.yolos, (64, 64), LossSettings()).total.dtype is torch.float32


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_reduced_weights_compute_nearly_the_same(dtype):
    """The first convolution in front of a head is read by others, too."""
    curve = "[convolutional]\nfilters=14\nsize=1\nactivation=leaky\n"
    head = "[yolo]\nmask=0,1\nanchors=4,4,8,8\nclasses=2\nnum=2\n"
    text = f"[net]\nwidth=32\nheight=32\n{curve}{curve}{head}[route]\nlayers=-2\n{curve}{curve}{head}"
    network, images = parse(text, "n.cfg"), torch.rand(2, 3, 32, 32)
    plain = Darknet(network).eval()
    model = reduced(copy.deepcopy(plain), dtype)
    with torch.inference_mode():
        want, heads = plain(images).heads, model(images).heads
    before = network.blocks[network.heads[0]].reads(network.heads[0])[0]
    assert model.layers[0].conv.weight.dtype is dtype
    assert torch.equal(model.layers[before].conv.weight, plain.layers[before].conv.weight)
    for one, other in zip(want, heads, strict=True):
        assert other.dtype is torch.float32
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_a_weight_that_float16_cannot_hold_is_refused():
    model = Darknet(tiny())
    model.layers[0].conv.weight.data.view(-1)[3] = 1e5
    with pytest.raises(NumericsError, match=r"layers\.0\.conv\.weight has the value 1e\+05"):
        reduced(model, torch.float16)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_folding_finds_statistics_of_many_cells_under_autocast(dtype):
    """4 pictures of 128 × 128 cells with a variance of 4: variance · count is 262 144, above float16's 65 504."""
    layer = ConvBlock(Convolutional(filters=2, size=1, batch_normalize=True), 3).train()
    layer.quantize_weight, layer.fold = WeightQuantizer(Grid(8)), Folding()
    images = 2 * torch.randn(4, 3, 128, 128)
    with torch.autocast("cpu", dtype):
        layer(images)
    assert torch.isfinite(layer.bn.running_var).all()
    want = torch.nn.functional.conv2d(images, layer.conv.weight).var(dim=(0, 2, 3))
    torch.testing.assert_close((layer.bn.running_var - 0.97) / 0.03, want, rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("amp", "native", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float16),
        ("bf16", True, torch.bfloat16),
        ("fp16", True, torch.float16),
        ("off", True, None),
    ],
)
def test_amp_chooses_the_type(monkeypatch, amp, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    settings = TrainSettings(amp=amp)
    assert training_type(settings.precision, GPU) is expected
    assert training_type(settings.precision, CPU) is (torch.bfloat16 if amp == "bf16" else None)
    quantized = TrainSettings(amp=amp, quant=QuantSettings())
    assert training_type(quantized.precision, GPU) is None


def test_a_cpu_trains_in_bfloat16_where_it_is_asked_to(run, no_plots):
    """A whole run of the script: its weights are float32, and not the ones that float32 leaves."""
    left = [read_checkpoint(Path(run("--epochs", "1", "--amp", amp)["best"]))["model"] for amp in ("off", "bf16")]
    whole, brain = (torch.cat([value.flatten() for value in of.values() if value.is_floating_point()]) for of in left)
    assert brain.dtype is torch.float32
    assert not torch.equal(brain, whole)
    assert torch.allclose(brain, whole, atol=0.05)


def test_bfloat16_is_refused_where_the_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(InputError, match="--amp bf16: this GPU has no bfloat16; --amp fp16 and --amp off work"):
        training_type("bf16", GPU)


@pytest.mark.parametrize(("flags", "rounded"), [({"amp": "off"}, True), ({"amp": "bf16"}, False)])
def test_only_the_steps_of_a_float32_training_may_round_products(monkeypatch, flags, rounded):
    """TF32 of cuDNN; what is done between them needs all bits."""
    trainer, allowed = TimedTraining(Darknet(tiny()), 64, 2, **flags).trainer, []
    look = lambda *_: allowed.append(torch.backends.cudnn.allow_tf32)  # noqa: E731
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(trainer, "_train_epoch", look)
    monkeypatch.setattr(trainer, "_close_epoch", lambda row: look() or True)
    trainer._train_epochs()
    assert allowed == [rounded, False]


@pytest.mark.slow
def test_a_compiled_network_trains_what_the_network_trains():
    """The first loss; compiled sums are added in another order."""
    losses = [TimedTraining(Darknet(tiny()), 64, 2, compiled=flag).trainer for flag in (False, True)]
    batch = TimedTraining(Darknet(tiny()), 64, 2).batch
    losses[1].model.load_state_dict(losses[0].model.state_dict())
    plain, compiled = (trainer.train_batch(batch, 0)[0] for trainer in losses)
    assert losses[1].model._compiled_call_impl is not None
    assert compiled == pytest.approx(plain, rel=1e-4)
