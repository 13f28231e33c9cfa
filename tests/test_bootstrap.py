"""Laws of the bootstrap of AP: weights are repeated pictures, and what is compared with itself does not differ."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import export
from benchmarks import compare
from models import Darknet
from tests.test_coco import arguments_of_images, case, crowd, with_crowds
from utils.checkpoint import write_darknet
from utils.darknet import cfg as cfg_file
from utils.detection import average_precision as coco
from utils.detection import bootstrap
from utils.detection.average_precision import Evaluator
from utils.errors import InputError
from utils.runtime.choice import named

IMAGES = 25


def measured(detections: coco.ImageBoxes, truth: coco.ImageBoxes, images: int) -> np.ndarray:
    """AP50 and AP50-95 of the evaluator."""
    ap = coco.precision_recall(detections, truth, images, True).precision.mean(axis=1)
    return np.array([coco.mean(ap[0, :, 0]), coco.mean(ap[:, :, 0])])


def no_ties(seed: int) -> tuple[coco.ImageBoxes, coco.ImageBoxes]:
    """As `case`, but scores are equal in different images only."""
    detections, truth = case(seed)
    rng = np.random.default_rng(seed)
    each = len(detections.image) // IMAGES
    score = np.concatenate([rng.permutation(each) / each for _ in range(IMAGES)])
    return detections._replace(score=score), truth


def repeated(boxes: coco.ImageBoxes, weights: np.ndarray) -> coco.ImageBoxes:
    """Boxes of a data set in which image i comes `weights[i]` times."""
    rows = [np.flatnonzero(boxes.image == image) for image, times in enumerate(weights) for _ in range(times)]
    which = np.concatenate([np.zeros(0, int), *rows])
    numbers = np.repeat(np.arange(len(rows)), list(map(len, rows)))
    return taken(boxes, which)._replace(image=numbers)


def taken(boxes: coco.ImageBoxes, which: np.ndarray) -> coco.ImageBoxes:
    return coco.ImageBoxes(*(values[which] if len(values) else values for values in boxes))


@pytest.mark.parametrize("boxes", [case, crowd, no_ties, with_crowds])
@pytest.mark.parametrize("seed", range(3))
def test_images_that_count_once_give_the_evaluators_ap_to_the_last_digit(boxes, seed):
    detections, truth = boxes(seed)
    images = 2 if boxes is crowd else IMAGES
    (found,) = bootstrap.average_precision(bootstrap.match(detections, truth, images), np.ones((1, images), int))
    assert found.tolist() == measured(detections, truth, images).tolist()
    assert 0 < found[1] <= found[0] < 1


@pytest.mark.parametrize("ignored", [0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_repeated_images(seed, ignored):
    detections, truth = no_ties(seed)
    truth = truth._replace(ignored=np.random.default_rng(seed).random(len(truth.image)) < ignored)
    weights = np.concatenate([bootstrap.draw(IMAGES, 6, seed), np.eye(IMAGES, dtype=int)[:3] * 4])
    found = bootstrap.average_precision(bootstrap.match(detections, truth, IMAGES), weights)
    wanted = [measured(repeated(detections, w), repeated(truth, w), int(w.sum())) for w in weights]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert len({round(ap, 6) for ap in found[:6, 0]}) == 6


def test_the_average_of_a_worked_example():
    """One class, two images of one object each; by confidence: a hit in 0, a miss in 1, a hit in 1.

    Weights 1, 1: precision 1 up to recall 1/2 (51 points), then 2/3 (50). Weights 2, 1: 1 up to recall 2/3 (67 points),
    then 3/4 (34). Weights 0, 2: two misses come before two hits, so precision is 2/4 everywhere. Weights 0, 0: nothing.
    """
    found = [[(0, 0, 0, 9, 9, 0.9)], [(0, 50, 50, 60, 60, 0.8), (0, 0, 0, 9, 9, 0.7)]]
    matches = bootstrap.matches([np.array(rows, float) for rows in found], [np.array([[0, 0, 0, 9, 9.0]])] * 2)
    weights = np.array([(1, 1), (2, 1), (0, 2), (0, 0)])
    wanted = [(51 + 50 * 2 / 3) / 101, (67 + 34 * 3 / 4) / 101, 1 / 2, 0]
    np.testing.assert_allclose(bootstrap.average_precision(matches, weights).T, [wanted, wanted], atol=1e-12)


def test_many_draws_at_a_time_change_nothing(monkeypatch):
    detections, truth = case(1)
    matches, weights = bootstrap.match(detections, truth, IMAGES), bootstrap.draw(IMAGES, 40, 0)
    whole = bootstrap.average_precision(matches, weights)
    monkeypatch.setattr(bootstrap, "MOST_VALUES", 2**13)
    assert np.array_equal(bootstrap.average_precision(matches, weights), whole)


def test_a_draw_has_as_many_images_as_there_are_and_follows_from_the_seed():
    drawn = bootstrap.draw(30, 500, 3)
    assert drawn.shape == (500, 30) and (drawn.sum(1) == 30).all()
    assert np.array_equal(drawn, bootstrap.draw(30, 500, 3)) and not np.array_equal(drawn, bootstrap.draw(30, 500, 4))
    assert drawn.mean(0) == pytest.approx(1, abs=0.25)
    assert (drawn == 0).mean() == pytest.approx((1 - 1 / 30) ** 30, abs=0.02)


def without(detections: coco.ImageBoxes, share: float) -> coco.ImageBoxes:
    """Detections of which some are lost, any of them."""
    kept = np.random.default_rng(0).random(len(detections.score)) >= share
    return taken(detections, kept)


def test_a_network_that_overlooks_objects_in_every_image_is_worse_in_nearly_all_draws():
    _, truth = case(2)
    seen = truth._replace(score=np.random.default_rng(1).random(len(truth.image)))
    networks = [bootstrap.match(found, truth, IMAGES) for found in (seen, without(seen, 0.3))]
    _, spread = bootstrap.bootstrap(networks, 200)
    for gain in (spread.gain50, spread.gain50_95):
        assert -0.45 < gain.low < gain.value < gain.high < -0.1
        assert gain.value == pytest.approx(-0.3, abs=0.1)


def test_rows_of_images_give_what_the_evaluator_measures_of_them():
    evaluator, rows, objects = Evaluator([str(k) for k in range(5)]), [], []
    for boxes, score, category, truth in arguments_of_images(*case(4)):
        evaluator.add(boxes, score, category, truth)
        rows.append(np.column_stack([category, boxes, score]))
        objects.append(truth)
    metrics = evaluator.result()
    found = bootstrap.average_precision(bootstrap.matches(rows, objects), np.ones((1, IMAGES)))
    assert found.tolist() == [[metrics.map50, metrics.map50_95]]


def test_the_interval_mirrors_the_middle_of_the_draws():
    """0.3 was measured, draws are spread evenly over 0.2 … 1: 2.5 % lie below 0.22, 2.5 % above 0.98."""
    draws = np.arange(1001) / 5000
    rows = np.array([[0.3, 0.1], *np.column_stack([0.2 + 4 * draws, draws])])
    wide, narrow = bootstrap._intervals(rows, -1)
    assert wide == pytest.approx((0.3, 0.6 - 0.98, 0.6 - 0.22))
    assert narrow == pytest.approx((0.1, 0.2 - 0.195, 0.2 - 0.005))
    assert bootstrap._intervals(rows, 0)[0].low == 0


def test_networks_measured_on_other_objects_are_refused():
    detections, truth = case(0)
    one = bootstrap.match(detections, truth, IMAGES)
    moved = bootstrap.match(detections, truth._replace(image=np.sort((truth.image + 1) % IMAGES)), IMAGES)
    with pytest.raises(ValueError, match="networks 0 and 1 were measured on different objects"):
        bootstrap.bootstrap([one, moved])


def test_without_objects_everything_is_zero():
    matches = bootstrap.matches([np.array([[0, 0, 0, 9, 9, 0.5]])] * 3, [np.zeros((0, 5))] * 3)
    (spread,) = bootstrap.bootstrap([matches], draws=5)
    assert spread.ap50 == spread.gain50_95 == (0, 0, 0)


@pytest.fixture(scope="module")
def networks(folder):
    """Three networks as `compare` takes them, of which the last is the first once more."""
    torch.manual_seed(0)
    cfg = folder / "n.cfg"
    for name in "ab":
        write_darknet(folder / f"{name}.weights", Darknet(cfg_file.load(cfg)))
    (folder / "all.data").write_text("classes=2\nvalid=train.txt\nnames=d.names\n")
    return [f"{cfg}:{folder / name}.weights" for name in "aba"]


def compared(folder, networks, capsys, *flags):
    capsys.readouterr()
    compare.main([*networks, "--data", str(folder / "all.data"), "--draws", "20", "--device", "cpu", *flags])
    return capsys.readouterr().out


def test_the_script_measures_each_network_and_its_difference_to_the_first(folder, networks, capsys):
    document = json.loads(compared(folder, networks, capsys, "--json"))
    first, second, again = document["networks"]
    assert (document["images"], document["draws"], document["seed"], second["size"]) == (9, 20, 0, [64, 64])
    assert {**again, "network": ""} == {**first, "network": ""}
    assert first["map50_difference"] == first["map50_95_difference"] == [0, 0, 0]
    assert 0 < first["map50"] != second["map50"]
    for key in ("map50", "map50_95"):
        value, low, high = second[f"{key}_difference"]
        assert value == second[key] - first[key]
        assert -1 <= low < high <= 1


def test_a_file_of_export_runs_in_each_runtime_that_reads_it(folder, networks, capsys):
    cfg, weights = networks[0].rsplit(":", 1)
    export.main(["--cfg", cfg, "--weights", weights, "--output", str(folder / "a.onnx")])
    flags = ("--runtimes", "onnxruntime", "opencv", "--json")
    first, second = json.loads(compared(folder, [f"a={folder / 'a.onnx'}"], capsys, *flags))["networks"]
    assert [line["network"] for line in (first, second)] == ["a, onnxruntime", "a, opencv"]
    assert second["runtime"].startswith("OpenCV") and abs(first["map50"] - second["map50"]) < 1e-6


def test_the_table_names_what_it_was_measured_on(folder, networks, capsys):
    table = compared(folder, networks[:2], capsys, "--img_size", "96").splitlines()
    assert table[0].count("|") == 9 and [line.split()[1] for line in table[2:4]] == networks[:2]
    assert "[" not in table[2] and table[3].count("[") == 2
    assert table[4].startswith("9 images of ") and table[4].endswith("96 × 96; 95 % intervals of 20 draws, seed 0")
    assert f"{torch.get_num_threads()} threads" in table[5]


def test_a_network_may_have_a_name_and_a_size_and_a_file_any_name(tmp_path):
    assert named("a.pt") == ("a.pt", "a.pt", None)
    assert named("slim 0.5=n.cfg:a.pt@160") == ("slim 0.5", "n.cfg:a.pt", 160)
    path = tmp_path / "a=b@32.pt"
    path.touch()
    assert named(str(path)) == (str(path), str(path), None)
    assert named(f"small @64={path}@64") == ("small @64", str(path), 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}"], "compared with nothing"),
        (["{0}", "--runtimes", "onnxruntime", "opencv"], "compared with nothing"),
        (["{0}", "{0}", "--img_size", "50"], "not a multiple of 8"),
        (["{0}", "{folder}/a.weights"], "does not say its network; give --cfg"),
        (["{0}", "{0}", "--data", "{folder}/three.data"], "three.data: has 3 classes, but .* is a network of 2"),
        (["{0}", "{0}", "--data", "{folder}/blind.data"], "no valid = "),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, networks, arguments, message):
    (folder / "three.data").write_text("classes=3\nvalid=val.txt\nnames=three.names\n")
    (folder / "three.names").write_text("a\nb\nc\n")
    (folder / "blind.data").write_text("classes=2\ntrain=train.txt\nnames=d.names\n")
    given = [argument.format(networks[0], folder=folder) for argument in arguments]
    with pytest.raises((InputError, OSError), match=message):
        compare.main(["--data", str(folder / "d.data"), *given])
