"""The terms of a distillation: worked examples, references, and what must not change them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from models import Outputs, attended
from tests.nets import one_head, tiny, with_heads
from utils.boxes import similarity
from utils.darknet.blocks import Network, Yolo
from utils.darknet.network import adapt_classes
from utils.detection.decode import box_offsets, split_head
from utils.detection.losses import assign
from utils.detection.settings import ASSIGNMENTS
from utils.distillation.matching import HeadPair, Pairing, pair
from utils.distillation.strategies import AT, KD, QUANTITIES, distillation
from utils.distillation.terms import NEARNESS, TERMS, DistillationBatch, binary_kl, object_mask, project

NETWORK = tiny()
OTHER_ANCHORS = with_heads(
    NETWORK,
    anchors=tuple((1.1 * NETWORK.yolos[0].anchors[i][0], NETWORK.yolos[0].anchors[i][1]) for i in (2, 0, 1, 5, 4, 3)),
    scale_x_y=1.3,
)
"""Its anchors come in another order, and are a little wider."""
RULE = ASSIGNMENTS["darknet"]
OBJECTS = torch.tensor([[0, 1, 0.31, 0.42, 0.2, 0.25], [1, 0, 0.71, 0.66, 0.5, 0.4]])
CHANNELS = distillation("cwd", None)
SEVERAL = distillation("cwd", "3")
"""Heads, attention and channels."""
GRID_FREE = ("objectness", "classes", "class_softmax", "attention", "attention_deep", "attention_neck", "cwd", "pkd")
EPSILON = float(np.finfo(np.float32).eps)
STRATEGIES = [distillation(kd, at) for kd, at in (*((kd, None) for kd in KD), *((None, at) for at in AT), ("3", "2"))]


def outputs(seed: int = 0, network: Network = NETWORK, batch: int = 2, scale: float = 1.0) -> Outputs:
    """What the tiny network might put out for a picture of 64 × 64; the widths of all features are its own."""
    torch.manual_seed(seed)
    heads = (scale * torch.randn(batch, 21, 8, 8), scale * torch.randn(batch, 21, 16, 16))
    widths = {0: (8, 32), 5: (4, 16), 7: (12, 8), 11: (6, 8), 13: (10, 16)}
    return Outputs(heads, {block: scale * torch.randn(batch, c, side, side) for block, (c, side) in widths.items()})


def batch_of(
    student: Outputs,
    teacher: Outputs,
    targets: Tensor = OBJECTS,
    terms=SEVERAL,
    networks: tuple[Network, Network] = (NETWORK, NETWORK),
    pairing: Pairing | None = None,
    size: tuple[int, int] = (64, 64),
) -> DistillationBatch:
    pairing = pairing or pair(*networks, terms)
    yolos = tuple(network.yolos for network in networks)
    return DistillationBatch(with_maps(student), with_maps(teacher), yolos, pairing, targets, size, RULE)


@pytest.fixture
def student() -> Outputs:
    return outputs()


@pytest.fixture
def teacher() -> Outputs:
    return outputs(1)


def with_maps(given: Outputs) -> Outputs:
    """With the attention maps that a network puts out beside its features."""
    pairs = {block: attended(features) for block, features in given.features.items()}
    return Outputs(given.heads, *({block: pair[i] for block, pair in pairs.items()} for i in (0, 1)))


def values(student: Outputs, teacher: Outputs, names: Sequence[str] = tuple(TERMS), **more) -> dict[str, float]:
    batch = batch_of(student, teacher, **more)
    return {term: TERMS[term](batch).item() for term in names}


def changed(given: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Every tensor with the same change."""
    return with_features(Outputs(tuple(map(change, given.heads)), given.features), change)


def with_features(given: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Features with the same change, and the heads as they are."""
    return Outputs(given.heads, {block: change(value) for block, value in given.features.items()})


def leaves(given: Outputs) -> tuple[Outputs, list[Tensor]]:
    """The outputs as tensors that get a gradient, and those."""
    found = changed(given, lambda value: value.detach().clone().requires_grad_())
    return found, [*found.heads, *found.features.values()]


def finite(term: str, student: Outputs, *others, **more) -> Tensor:
    """A term of a batch, which is finite and in float32, and whose gradients are finite."""
    student, parts = leaves(student)
    value = TERMS[term](batch_of(student, *others, **more))
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    if value.requires_grad:
        value.backward()
    assert all(part.grad is None or torch.isfinite(part.grad).all() for part in parts)
    return value


def twice(objects: Tensor, pictures: int) -> Tensor:
    """The objects of a batch that is repeated."""
    again = objects.clone()
    again[:, 0] += pictures
    return torch.cat((objects, again))


def decoded(head: Tensor, yolo: Yolo, anchor: int, stride: int, picture: int, row: int, column: int) -> Tensor:
    """The box that an anchor predicts in a cell, relative to it, in cells."""
    values = split_head(head, yolo)[picture, anchor, row, column]
    return box_offsets(values, torch.tensor(yolo.head_anchors[anchor]) / stride, yolo)


def one_cell(classes: Sequence[float], objectness: float, shift: float = 0.0) -> Outputs:
    """A head of one anchor and one cell."""
    row = torch.tensor([shift, 0, 0, 0, objectness, *classes])
    return Outputs((row.view(1, -1, 1, 1),), {})


def single(classes: int) -> Network:
    """A network with one head of one anchor of 4 × 4 pixels at stride 1."""
    return adapt_classes(one_head(), classes)


def of_one_head(student: Outputs, teacher: Outputs, targets: Tensor = OBJECTS[:0], **more) -> DistillationBatch:
    network = single(student.heads[0].shape[1] - 5)
    pairing = Pairing((HeadPair(0, 0, ((0, 0),)),), (), ())
    return batch_of(student, teacher, targets, networks=(network, network), pairing=pairing, size=(8, 8), **more)


class TestOracle:
    """z^s = (1, 2, 3), z^t = (1.5, 2.5, 1), T = 3: KL = 0.0748498, T² KL = 0.6736482."""

    def test_softmax_over_the_classes_of_a_cell_that_the_teacher_is_sure_of(self):
        found = of_one_head(one_cell((1, 2, 3), 0.0), one_cell((1.5, 2.5, 1), 40.0))
        assert TERMS["class_softmax"](found).item() == pytest.approx(0.6736482, abs=1e-6)
        assert TERMS["class_softmax"](found).item() / 9 == pytest.approx(0.0748498, abs=1e-7)

    def test_the_same_classes_seven_times_count_once(self):
        once, often = (
            of_one_head(one_cell((1, 2, 3) * times, 0.0), one_cell((1.5, 2.5, 1) * times, 2.0)) for times in (1, 7)
        )
        assert TERMS["classes"](often).item() == pytest.approx(TERMS["classes"](once).item(), rel=1e-5)

    def test_binary_kl_by_hand(self):
        """σ(0) = 1/2 against σ(ln 3) = 3/4: KL = 3/4 ln 3/2 + 1/4 ln 1/2; a few numbers of about 1 are rounded."""
        teacher = one_cell((0.0,), float(np.log(3)))
        wanted = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
        found = TERMS["objectness"](of_one_head(one_cell((0.0,), 0.0), teacher)).item()
        assert found == pytest.approx(wanted, abs=2 * EPSILON)

    @pytest.mark.parametrize("t", [1.0, 3.0])
    def test_binary_kl_of_all_kinds_of_logits(self, t):
        """From certain to certain; beyond 100 no probability is left in float32. Rounding a σ costs a share of z."""
        logits = torch.tensor([-300.0, -40, -9, -1, 0, 0.5, 8, 30, 200])
        student, teacher = (values.flatten()[:, None] for values in torch.meshgrid(logits, logits, indexing="ij"))
        found = binary_kl(student, teacher, t)
        mine, theirs = student.double() / t, teacher.double() / t
        sure = [torch.nn.functional.softplus(values) for values in (mine, theirs)]
        wanted = (sure[0] - sure[1] - theirs.sigmoid() * (mine - theirs))[:, 0]
        assert bool(((found - wanted).abs() <= EPSILON * (1 + 2 * (mine - theirs).abs()[:, 0])).all())


@pytest.mark.parametrize("chosen", STRATEGIES, ids=lambda chosen: chosen.name)
def test_who_knows_what_the_teacher_knows_has_nothing_to_learn(chosen):
    given = outputs(scale=2.0)
    student, parts = leaves(given)
    batch = batch_of(student, given, terms=chosen)
    learnt = {term: weight * TERMS[term](batch) for term, weight in chosen.terms.items()}
    bounded = {term for term in learnt if term.startswith("box_bounded")}
    assert all(abs(value.item()) < 1e-5 * max(1.0, chosen.terms[term]) for term, value in learnt.items()), learnt
    assert all(learnt[term].item() == 0 for term in bounded)
    other = batch_of(outputs(1), given, terms=chosen)
    assert all(TERMS[term](other).item() > 0 for term in learnt if term not in bounded)
    sum(learnt.values()).backward()
    assert all(part.grad is None or part.grad.abs().max() < 1e-3 * max(chosen.terms.values()) for part in parts)


class TestAttention:
    """Zagoruyko & Komodakis' maps."""

    TERMS = ("attention", "attention_masked", "attention_backbone", "attention_neck", "attention_deep")

    @pytest.mark.parametrize(
        "change",
        [
            lambda f: 3.7 * f,
            lambda f: -0.2 * f,
            lambda f: f.flip(1),
            lambda f: f * (-1.0) ** torch.arange(f.shape[1])[:, None, None],
            lambda f: f.repeat(1, 2, 1, 1),
        ],
        ids=["scaled", "negative", "permuted", "signs", "every channel twice"],
    )
    def test_scale_order_sign_and_number_of_the_channels_do_not_matter(self, change, student, teacher):
        before = values(student, teacher, self.TERMS)
        assert values(with_features(student, change), teacher, self.TERMS) == pytest.approx(before, rel=1e-4)
        assert min(before.values()) > 0

    def test_it_is_between_zero_and_two(self, student, teacher):
        """2 for maps that have no cell in common."""
        for block in student.features:
            student.features[block][..., ::2] = 0
            teacher.features[block][..., 1::2] = 0
        assert values(student, teacher, ("attention",))["attention"] == pytest.approx(2, rel=1e-5)
        for seed in range(4):
            assert 0 <= values(outputs(seed), outputs(9), ("attention",))["attention"] <= 2

    def test_a_plain_reference(self, student, teacher):
        wanted = []
        for block in student.features:
            maps = [given.features[block].double().square().mean(1).flatten(1) for given in (student, teacher)]
            mine, theirs = (m / m.norm(dim=1, keepdim=True) for m in maps)
            wanted.append((mine - theirs).square().sum(1).mean().item())
        found = values(student, teacher, ("attention", "attention_backbone"))
        assert found["attention"] == pytest.approx(np.mean(wanted), rel=1e-5)
        assert found["attention_backbone"] == pytest.approx(np.mean(wanted[:2]), rel=1e-5)

    def test_what_is_far_from_objects_is_not_looked_at_with_the_mask(self, student, teacher):
        batch = batch_of(student, teacher)
        for features in student.features.values():
            near = project(batch.masks, tuple(features.shape[2:]))
            assert near.any()
            features += 5 * ~near[:, None]
        found, clean = (values(given, teacher, ("attention_masked", "attention")) for given in (student, outputs()))
        assert found["attention_masked"] == pytest.approx(clean["attention_masked"], rel=1e-5)
        assert found["attention"] != pytest.approx(clean["attention"], rel=1e-2)


class TestChannels:
    """CWD and PKD."""

    BLOCKS = (7, 11, 13)
    """Features whose channels are compared."""

    def test_pkd_is_one_less_pearsons_correlation(self, student, teacher):
        wanted = []
        for block in self.BLOCKS:
            mine, theirs = (given.features[block].transpose(0, 1).flatten(1).numpy() for given in (student, teacher))
            wanted.append(np.mean([1 - np.corrcoef(*pair_)[0, 1] for pair_ in zip(mine, theirs, strict=True)]))
        assert values(student, teacher, ("pkd",), terms=CHANNELS)["pkd"] == pytest.approx(np.mean(wanted), abs=1e-5)

    def test_pkd_does_not_see_scale_and_shift_of_a_channel_and_is_two_for_its_opposite(self, student, teacher):
        before = values(student, teacher, ("pkd",))["pkd"]
        gain, shift = torch.rand(2, 12, 1, 1) + 0.5
        other = with_features(student, lambda f: f * gain[: f.shape[1]] + shift[: f.shape[1]])
        assert values(other, teacher, ("pkd",))["pkd"] == pytest.approx(before, abs=1e-5)
        opposite = with_features(teacher, torch.neg)
        assert values(opposite, teacher, ("pkd",))["pkd"] == pytest.approx(2, abs=1e-5)

    @pytest.mark.parametrize("constant", [0.0, 0.3, 777.7, -6e4])
    def test_a_constant_channel_has_no_correlation_and_gets_no_gradient(self, constant):
        """A channel whose γ is 0, on either side; its standard deviation would divide by next to nothing."""
        for dead, other in ((outputs(), outputs(1)), (outputs(1), outputs())):
            for feature in dead.features.values():
                feature[:, 0] = constant
            student, parts = leaves(dead)
            apart = TERMS["pkd"](batch_of(student, other, terms=CHANNELS))
            apart.backward()
            assert max(part.grad.abs().max().item() for part in parts if part.grad is not None) < 1
            assert all(
                feature.grad[:, 0].abs().max() == 0 for b, feature in student.features.items() if b in self.BLOCKS
            )
            wanted = values(other, dead, ("pkd",), terms=CHANNELS)["pkd"]
            assert apart.item() == pytest.approx(wanted, rel=1e-4)

    def test_cwd_against_a_plain_loop(self, student, teacher):
        features = []
        for block in self.BLOCKS:
            mine, theirs = (given.features[block].double().numpy() for given in (student, teacher))
            apart = []
            for picture, channel in np.ndindex(*mine.shape[:2]):
                s, t = (np.exp(given[picture, channel]) for given in (mine, theirs))
                s, t = s / s.sum(), t / t.sum()
                apart.append((t * np.log(t / s)).sum())
            features.append(np.mean(apart))
        assert values(student, teacher, ("cwd",), terms=CHANNELS)["cwd"] == pytest.approx(np.mean(features), rel=1e-5)

    def test_attention_beside_them_does_not_change_what_is_compared(self, student, teacher):
        """The backbone is looked at for attention only, also where the channels that were kept are known."""
        kept = {str(b): {"block": b, "channels": list(range(c))} for b, c in ((0, 8), (1, 8), (7, 12), (11, 6))}
        both, alone = (
            values(student, teacher, ("cwd", "pkd"), pairing=pair(NETWORK, NETWORK, chosen, kept))
            for chosen in (SEVERAL, CHANNELS)
        )
        assert both == pytest.approx(alone)

    def test_kept_channels_are_those_of_the_teacher_in_the_students_order(self):
        teacher = outputs()
        pairing = pair(NETWORK, NETWORK, CHANNELS)
        features = [dataclasses.replace(f, channels=(4, 0, 2)) for f in pairing.features]
        student = Outputs(teacher.heads, {b: teacher.features[b][:, [4, 0, 2]] for b in self.BLOCKS})
        pruned = dataclasses.replace(pairing, features=tuple(features))
        assert values(student, teacher, ("cwd", "pkd"), pairing=pruned) == pytest.approx({"cwd": 0, "pkd": 0}, abs=1e-6)


class TestSizes:
    """Normalised terms are means: how much there is of everything does not change them."""

    def test_the_same_pictures_twice(self, student, teacher):
        before = values(student, teacher)
        double = [changed(given, lambda value: torch.cat((value, value))) for given in (student, teacher)]
        assert values(*double, targets=twice(OBJECTS, 2)) == pytest.approx(before, rel=1e-4)
        assert min(before.values()) > 0

    def test_a_grid_of_the_same_over_and_over(self, student, teacher):
        tiles = [changed(given, lambda value: value.repeat(1, 1, 3, 2)) for given in (student, teacher)]
        before = values(student, teacher, GRID_FREE)
        assert values(*tiles, GRID_FREE, size=(192, 128)) == pytest.approx(before, rel=1e-4)

    def test_the_same_objects_twice(self, student, teacher):
        again = values(student, teacher, targets=torch.cat((OBJECTS, OBJECTS)))
        assert again == pytest.approx(values(student, teacher), rel=1e-5)


def test_objects_of_all_processes_count(student, teacher):
    """The mean over two processes with a picture each is what one with both has, also where one has all the objects."""
    teacher = changed(teacher, lambda value: value * torch.tensor([1.0, 0.1]).view(-1, *[1] * (value.dim() - 1)))
    targets = OBJECTS.clone()
    targets[:, 0] = 0
    terms = ("objectness", "classes", "class_softmax", "box", "box_bounded", "attention")
    whole, wanted = batch_of(student, teacher, targets), values(student, teacher, terms, targets=targets)
    totals = [whole.attended, len(whole.boxes.objects), len(whole.boxes.objects)] * 2
    found = []
    for picture in (0, 1):
        parts = [changed(given, lambda value, i=picture: value[i : i + 1]) for given in (student, teacher)]
        own = batch_of(*parts, targets[targets[:, 0] == picture])
        own.divisor = lambda _: totals.pop(0) / 2
        found.append({term: TERMS[term](own).item() for term in terms})
    assert {term: sum(one[term] for one in found) / 2 for term in terms} == pytest.approx(wanted, rel=1e-4)


class TestBoxes:
    """Terms over the positives."""

    ROW = torch.tensor([[0, 0, 0.5625, 0.5625, 0.5, 0.5]])
    """An object in the middle of cell (4, 4) of 8 × 8, as large as the anchor."""

    def given(self, *moves: float) -> Outputs:
        """Heads of 8 × 8 cells whose box in that cell is wider than the object by e to the power of a number."""
        heads = torch.zeros(1, 6, 8, 8)
        heads[0, 2, 4, 4] = moves[0]
        return Outputs((heads,), {})

    def test_a_box_is_pulled_to_its_object_where_the_teachers_is_nearer_only(self):
        """The student's box is e^0.5 times too wide: 1 − IoU = 1 − e^−0.5, the shape term aside; or a quarter e^0.1."""
        far, near = self.given(0.5), self.given(0.1)
        assert TERMS["box_bounded"](of_one_head(near, far, self.ROW)).item() == 0
        assert TERMS["box_bounded"](of_one_head(far, far, self.ROW)).item() == 0
        worse = TERMS["box_bounded"](of_one_head(far, near, self.ROW)).item()
        box, item = torch.tensor([0.5, 0.5, 4 * np.exp(0.5), 4]), torch.tensor([0.5, 0.5, 4, 4])
        assert worse == pytest.approx(1 - similarity(box.float(), item.float(), "ciou").item(), rel=1e-5)

    def test_the_others_count_nothing_in_the_mean(self):
        """One picture where the teacher is nearer and one where the student is: half of the first one's."""
        far, near = self.given(0.5), self.given(0.1)
        alone = TERMS["box_bounded"](of_one_head(far, near, self.ROW)).item()
        both = [Outputs((torch.cat((a.heads[0], b.heads[0])),), {}) for a, b in ((far, near), (near, far))]
        found = of_one_head(*both, twice(self.ROW, 1))
        assert TERMS["box_bounded"](found).item() == pytest.approx(alone / 2, rel=1e-5)

    @pytest.mark.parametrize("other", [NETWORK, OTHER_ANCHORS], ids=["the same network", "other anchors and scale"])
    def test_boxes_are_those_of_the_positives_of_the_loss_each_decoded_by_its_network(self, other, student, teacher):
        batch = batch_of(student, teacher, networks=(NETWORK, other))
        mine, theirs = [], []
        for i, positives in enumerate(assign(OBJECTS, NETWORK.yolos, [(8, 8), (16, 16)], (64, 64), RULE)):
            match = dict(batch.pairing.heads[i].anchors)
            assert len(match) == 3 and any(a != b for a, b in match.items()) == (other is not NETWORK)
            for picture, anchor, row, column in zip(*positives[:4], strict=True):
                cell, anchor = (picture, row, column), int(anchor)
                mine.append(decoded(student.heads[i], NETWORK.yolos[i], anchor, (8, 4)[i], *cell))
                theirs.append(decoded(teacher.heads[i], other.yolos[i], match[anchor], (8, 4)[i], *cell))
        assert len(mine) == len(batch.boxes.objects) > 0
        torch.testing.assert_close(batch.boxes.student, torch.stack(mine))
        torch.testing.assert_close(batch.boxes.teacher, torch.stack(theirs))

    def test_heads_may_come_in_another_order(self, student, teacher):
        """As those of YOLOv4 do, for which YOLOv3 has the coarsest first."""
        first, second = NETWORK.heads
        blocks = list(NETWORK.blocks)
        blocks[first], blocks[second] = blocks[second], blocks[first]
        other = dataclasses.replace(NETWORK, blocks=tuple(blocks))
        pairing = pair(NETWORK, NETWORK, SEVERAL)
        crossed = tuple(dataclasses.replace(p, teacher=1 - p.teacher) for p in pairing.heads)
        turned = Outputs(teacher.heads[::-1], teacher.features)
        pairing = dataclasses.replace(pairing, heads=crossed)
        found = values(student, turned, networks=(NETWORK, other), pairing=pairing)
        assert found == pytest.approx(values(student, teacher))

    @pytest.mark.parametrize("term", sorted(TERMS))
    def test_no_objects_no_boxes_and_all_else_is_finite(self, term, student, teacher):
        value = finite(term, student, teacher, OBJECTS[:0]).item()
        assert value == 0 if term.startswith("box") or "masked" in term else value > 0


class TestGradients:
    """What the student is told to do."""

    def test_of_the_binary_kl_is_the_difference_of_the_probabilities(self):
        student, _ = leaves(outputs(scale=3.0))
        teacher = outputs(1, scale=3.0)
        found = batch_of(student, teacher)
        TERMS["objectness"](found).backward()
        for mine, theirs, yolo in zip(student.heads, teacher.heads, NETWORK.yolos, strict=True):
            got, s, t = (split_head(value, yolo)[..., 4] for value in (mine.grad, mine.detach(), theirs))
            torch.testing.assert_close(got, (s.sigmoid() - t.sigmoid()) / found.attended, atol=1e-7, rtol=1e-4)

    def test_of_the_classes_is_weighted_with_the_teachers_objectness(self):
        student, _ = leaves(outputs())
        teacher = outputs(1)
        found = batch_of(student, teacher)
        TERMS["classes"](found).backward()
        for mine, theirs, yolo in zip(student.heads, teacher.heads, NETWORK.yolos, strict=True):
            got, s, t = (split_head(value, yolo) for value in (mine.grad, mine.detach(), theirs))
            apart = (s[..., 5:] / 3).sigmoid() - (t[..., 5:] / 3).sigmoid()
            wanted = 3 * t[..., 4:5].sigmoid() * apart / (found.attended * NETWORK.classes)
            torch.testing.assert_close(got[..., 5:], wanted, atol=1e-7, rtol=1e-4)

    @pytest.mark.parametrize("term", ["objectness", "classes", "class_softmax", "cwd", "pkd"])
    def test_a_divergence_is_never_negative(self, term):
        for seed, scale in itertools.product(range(3), (0.01, 1.0, 30.0)):
            assert values(outputs(seed, scale=scale), outputs(7, scale=scale), (term,))[term] >= -1e-6

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("sign", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
    @pytest.mark.parametrize("term", sorted(TERMS))
    def test_halves_are_compared_in_float32_and_stay_finite_however_large(self, term, sign, kind, student, teacher):
        """±6e4 is next to the end of float16; the rows of the positives are such, too."""
        large = [
            changed(given, lambda value, s=s: (s * 6e4 * torch.sign(value.abs() - 0.1)).to(kind))
            for given, s in zip((student, teacher), sign, strict=True)
        ]
        finite(term, *large)


@pytest.mark.parametrize("term", sorted(TERMS))
def test_a_batch_of_one_picture(term):
    value = finite(term, outputs(batch=1), outputs(1, batch=1), OBJECTS[:1])
    assert value.requires_grad
    assert value.item() > 0 or "bounded" in term


class TestNewCoords:
    """Heads that end in a sigmoid: scores are probabilities."""

    NETWORK = with_heads(NETWORK, new_coords=True)

    def test_scores_are_compared_as_those_of_plain_heads(self, student, teacher):
        terms = ("objectness", "classes", "class_softmax")
        before = values(student, teacher, terms)
        networks = (self.NETWORK, self.NETWORK)
        pairing = pair(NETWORK, NETWORK, SEVERAL)
        activated = [
            Outputs(tuple(head.sigmoid() for head in given.heads), given.features) for given in (student, teacher)
        ]
        assert values(*activated, terms, networks=networks, pairing=pairing) == pytest.approx(before, rel=1e-4)
        mixed = values(student, activated[1], terms, networks=(NETWORK, self.NETWORK), pairing=pairing)
        assert mixed == pytest.approx(before, rel=1e-4)

    @pytest.mark.parametrize("term", sorted(TERMS))
    def test_scores_at_and_beyond_the_ends_have_a_finite_gradient(self, term, student, teacher):
        student = changed(student, lambda value: (5 * value).round().clamp(-1, 2))
        teacher = changed(teacher, lambda value: value.round().clamp(0, 1))
        assert finite(term, student, teacher, networks=(self.NETWORK, self.NETWORK)).requires_grad


def test_anchors_and_heads_without_a_partner_are_not_looked_at(student, teacher):
    pairing = Pairing((HeadPair(1, 1, ((0, 2), (2, 1))),), (), ())
    given, parts = leaves(student)
    found = batch_of(given, teacher, pairing=pairing)
    terms = ("objectness", "classes", "class_softmax", "box")
    sum(TERMS[term](found) for term in terms).backward()
    assert parts[0].grad is None
    gradient = split_head(parts[1].grad, NETWORK.yolos[1])
    assert gradient[:, 1].abs().max() == 0
    assert min(gradient[:, i].abs().max() for i in (0, 2)) > 0
    mine, theirs = (split_head(outputs_.heads[1], NETWORK.yolos[1]) for outputs_ in (student, teacher))
    for columns, rows in zip(found.columns[0], (mine[:, [0, 2]], theirs[:, [2, 1]]), strict=True):
        torch.testing.assert_close(torch.cat(columns, dim=-1).detach(), rows)
    small = torch.tensor(
        [[0, 0, 0.3, 0.3, 4 / 64, 4 / 64], [1, 1, 0.6, 0.7, 8 / 64, 8 / 64], [1, 1, 0.2, 0.7, 12 / 64, 10 / 64]]
    )
    only_best = dataclasses.replace(RULE, threshold=0.99)
    boxes = dataclasses.replace(batch_of(student, teacher, small, pairing=pairing), rule=only_best).boxes
    at = [(0, 0, 4, 4, 2), (1, 2, 11, 3, 1)]
    for number, (picture, anchor, row, column, other) in enumerate(at):
        wanted = [
            decoded(given.heads[1], NETWORK.yolos[1], one, 4, picture, row, column)
            for given, one in ((student, anchor), (teacher, other))
        ]
        torch.testing.assert_close(boxes.student[number], wanted[0])
        torch.testing.assert_close(boxes.teacher[number], wanted[1])
    assert len(boxes.objects) == 2


class TestFocus:
    """The fine-grained mask."""

    GRIDS = ((8, 8), (16, 16))
    SIZE = (64, 64)

    def slow(self, targets: Tensor, pictures: int) -> list[np.ndarray]:
        """The mask as the paper words it, one anchor at a time."""
        masks = [np.zeros((pictures, *cells), bool) for cells in self.GRIDS]
        for picture, _, cx, cy, w, h in targets.double().tolist():
            cx, cy, w, h = 64 * cx, 64 * cy, 64 * w, 64 * h
            best = [np.zeros(cells) for cells in self.GRIDS]
            for head, cells in enumerate(self.GRIDS):
                stride = 64 / cells[0]
                for (row, column), (aw, ah) in itertools.product(np.ndindex(*cells), NETWORK.yolos[head].head_anchors):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    across = min(cx + w / 2, x + aw / 2) - max(cx - w / 2, x - aw / 2)
                    down = min(cy + h / 2, y + ah / 2) - max(cy - h / 2, y - ah / 2)
                    shared = max(0, across) * max(0, down)
                    best[head][row, column] = max(best[head][row, column], shared / (w * h + aw * ah - shared))
            for mask, overlap in zip(masks, best, strict=True):
                mask[int(picture)] |= overlap > NEARNESS * max(o.max() for o in best)
        return masks

    def masks(self, targets: Tensor, pictures: int = 3) -> list[Tensor]:
        heads = [torch.zeros(pictures, 1, *cells) for cells in self.GRIDS]
        return object_mask(targets, NETWORK.yolos, heads, self.SIZE)

    def test_a_plain_loop(self):
        objects = torch.cat((OBJECTS, torch.tensor([[1, 0, 0.08, 0.91, 0.11, 0.07], [1, 1, 0.99, 0.02, 0.4, 0.6]])))
        wanted = self.slow(objects, 3)
        for mine, theirs in zip(self.masks(objects), wanted, strict=True):
            assert (mine.numpy() == theirs).all()
        assert all(0 < mask.sum() < mask.size for mask in wanted)

    def test_cells_near_an_object_only_and_in_its_picture_only(self):
        """An object of 6 × 6 pixels at (20, 40)."""
        masks = self.masks(torch.tensor([[1, 0, 20 / 64, 40 / 64, 6 / 64, 6 / 64]]))
        for mask, stride in zip(masks, (8, 4), strict=True):
            picture, row, column = mask.nonzero(as_tuple=True)
            assert (picture == 1).all()
            assert (((row + 0.5) * stride - 40).abs() < 12).all()
            assert (((column + 0.5) * stride - 20).abs() < 12).all()
        assert masks[1][1].any() and not masks[0][1].any()  # the anchors of the first head are too large

    def test_no_objects(self):
        assert not any(mask.any() for mask in self.masks(OBJECTS[:0]))

    def test_several_masks_in_a_finer_and_a_coarser_grid(self):
        coarse, fine = torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(1, 4, 4, dtype=torch.bool)
        coarse[0, 0, 1] = fine[0, 3, 0] = True
        up = project((coarse, fine), (8, 8))
        assert up[0, :4, 4:].all() and up[0, 6:, :2].all() and up.sum() == 16 + 4
        assert project((coarse, fine), (4, 4)).sum() == 4 + 1
        assert project((coarse, fine), (2, 2)).tolist() == [[[False, True], [True, False]]]
        assert project((coarse, fine), (1, 1)).all()
        assert not project((~coarse & False,), (1, 1)).any()


def test_how_much_is_attended_is_at_least_one():
    """A teacher that sees nothing does not blow its whispers up."""
    teacher = changed(outputs(1), lambda value: value - 30)
    found = batch_of(outputs(), teacher)
    assert found.attended == 1
    assert TERMS["classes"](found).item() < 1e-3


def test_shared_terms_of_two_strategies_are_added():
    assert distillation("4", "1").terms["attention"] == KD["4"].terms["attention"] + AT["1"].terms["attention"]
    assert distillation("3", "3", weight=0.5).terms["box"] == pytest.approx(KD["3"].terms["box"])


def test_every_strategy_is_made_of_terms_whose_quantities_are_known():
    assert TERMS.keys() == QUANTITIES.keys()
    for chosen in STRATEGIES:
        assert set(chosen.terms) <= set(TERMS)
        assert min(chosen.terms.values()) > 0
