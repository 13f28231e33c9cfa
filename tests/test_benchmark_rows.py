"""Rows of docs/results.md, the page that is written of them, and the peers that they compare with."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export
from benchmarks import criteria, goals, peers, results, runtimes, suite, trainings
from models import Darknet
from tests.nets import tiny
from tests.test_checkpoint import contents
from utils.checkpoint import write_checkpoint
from utils.data.datasets import Batch
from utils.data.images import read_image
from utils.errors import InfeasibleError, InputError
from utils.report.tables import network_cost
from utils.runtime.engines import onnxruntime_engine
from utils.runtime.exported import read_onnx

FIGURES = {"map50_95": 0.1, "map50_95_interval": [0, 1], "map50_interval": [0, 1]}
FIGURES |= {"parameters": 9, "macs": 5, "bytes": 1}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Rows are run beside an empty folder of results."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / suite.RUNS


@pytest.fixture
def commands(runs, monkeypatch):
    """Commands of the suite's scripts, which are stand-ins that leave the files they are asked for."""
    called = []

    def python(*words):
        command = [str(word) for word in words]
        called.append(command)
        flags = dict(itertools.pairwise(command))
        if command[0] == "export.py":
            (runs.parent.parent / flags["--output"]).touch()
        elif command[0] == "quantize.py":
            make(runs.parent.parent / flags["--project"] / flags["--name"] / "model.pt")
        elif command[0] == "slim_prune.py":
            return json.dumps({"cfg": "p.cfg", "weights": "p.weights"})
        files = [word for word in command if "=" in word]
        names = [file.partition("=")[0] for file in files]
        networks = [{"network": name, "map50": 0.9 - 0.1 * number, **FIGURES} for number, name in enumerate(names)]
        place = {"images": 3, "machine": "M", "threads": 1, "torch": "2", "commit": None}
        return json.dumps({**place, "networks": networks})

    monkeypatch.setattr(suite, "python", python)
    monkeypatch.setattr(suite, "train", lambda folder, *command: called.append([str(word) for word in command]))
    return called


def make(path):
    """An empty file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def value(command, flag):
    """The word behind a flag."""
    return command[command.index(flag) + 1]


def test_the_page_is_what_the_stored_rows_give():
    assert results.page() == results.PAGE.read_text(encoding="utf-8")


def test_a_section_of_several_rows_tells_where_each_was_run():
    """Some trainings ran with 1 thread, others with 2, and at different commits."""
    one = {"machine": "M", "gpus": [], "threads": 2, "torch": "2", "commit": "a" * 40}
    other = {**one, "threads": 1, "commit": None}
    assert suite.place(one) == "M, threads: 2, PyTorch 2, commit aaaaaaaaa."
    assert suite.place(one, other, one) == "M, threads: 2 or 1, PyTorch 2, commit aaaaaaaaa or unknown."
    text = results.PAGE.read_text(encoding="utf-8")
    for name in trainings.ALONE:
        document = json.loads(results.stored_file(name).read_text())
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} ")]
        assert line.split()[-2] == str(document["threads"]) and document["commit"][:9] in text
        assert document["command"] in text or document["seed"]


SOURCES = {
    "criteria-chess": "chess-yolov3-tiny",
    "criteria-bccd-tuned-50": "bccd-yolov4-tiny",
    "goal-roadsigns-seed2": "roadsigns-yolov3-tiny-33-seed2",
    "bccd-int8": "goal-bccd",
    "speeds-yolov3-tiny": "roadsigns-yolov3-tiny-33",
    "bccd-yolov4-tiny-constant": "bccd-yolov4-tiny",
    "roadsigns-yolov4-quarter-dynamic": "roadsigns-yolov4-quarter",
}


@pytest.mark.parametrize(("name", "source"), SOURCES.items())
def test_a_row_waits_for_its_network(name, source, runs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(InputError, match=f"run the row {source} first"):
        results.ROWS[name].finish(name)


@pytest.mark.parametrize(("name", "package"), [("chess-int8", "nncf"), ("criteria-chess", "torch_pruning")])
def test_without_a_peer_the_way_to_it_is_said(name, package, runs, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    with pytest.raises(InputError, match=f"{name}: needs the package {package}; pip install -r requirements-dev"):
        results.ROWS[name].finish(name)


def test_a_finished_row_is_not_run_and_a_name_that_is_none_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # main goes to the root of the project, and monkeypatch goes back
    monkeypatch.setattr(results, "PAGE", tmp_path / "docs/results.md")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "python", lambda *command: pytest.fail(f"{command} was run"))
    results.main(["--rows", "chess-int8", "--list"])
    assert "chess-int8: finished\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="--rows: invalid choice: 'chess-in8'"):
        results.main(["--rows", "chess-in8"])


@pytest.fixture
def cut(runs, commands):
    """Cut a network by slim_prune.py alone, and distil it with the seeds; returns the document."""
    pytest.importorskip("torch_pruning")
    make(runs / "chess-yolov3-tiny/weights/best.pt")

    def finish(name):
        commands.clear()
        row = replace(criteria.ROWS[name], criteria=("slim_prune.py --importance taylor --rounds 2",))
        return row.finish(name).document

    return finish


def test_a_finished_cut_is_not_made_again_for_another_row(cut, runs, commands):
    document = cut("criteria-chess")
    assert [value(command, "--target-macs") for command in commands[:3]] == ["0.5", "0.33", "0.25"]
    assert " --importance taylor --rounds 2 --project runs/results/criteria-chess " in " ".join(commands[0])
    assert [network["map50"] for network in document["networks"]] == pytest.approx([0.8, 0.7, 0.6])
    cut("criteria-chess-tuned-33")
    assert [command[0] for command in commands] == ["train.py"] * 3 + ["-m"]
    (runs / "chess-yolov3-tiny/weights/best.pt").write_bytes(b"other")
    with pytest.raises(InputError, match="of another network, data set or size; move runs/results/criteria-chess away"):
        cut("criteria-chess")


def test_all_are_distilled_alike_and_the_table_has_the_mean_over_seeds(cut, commands):
    """Figures fall by 0.1 from network to network: 0.9 before, 0.8 as cut, 0.7, 0.6 and 0.5 distilled."""
    name = "criteria-chess-tuned-33"
    document = cut(name)
    _, *distillations, compared = commands
    for seed, command in enumerate(distillations):
        assert command[:5] == ["train.py", "--cfg", "p.cfg", "--weights", "p.weights"]
        assert [value(command, flag) for flag in ("--KDstr", "--epochs", "--seed")] == ["4", "25", str(seed)]
    assert [word.partition("=")[0][-8:] for word in compared if "-25-seed" in word] == [
        f"25-seed{seed}" for seed in range(3)
    ]
    (section,) = criteria.sections({name: document})
    assert section.lines[1][2] == pytest.approx(0.8) and section.lines[1][-2:] == ["0.600 ± 0.100", "0.100 ± 0.000"]


def test_all_ways_to_8_bits_begin_with_the_float_file_and_are_not_taken_twice(runs, commands, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    make(runs / "goal-chess/balanced/tune/weights/best.pt")
    make(runs / "chess-yolov3-tiny/weights/best.pt")
    stand_ins = {label: lambda source, images: (source.name, images) for label in peers.QUANTIZERS}
    monkeypatch.setattr(peers, "QUANTIZERS", stand_ins)
    monkeypatch.setattr(peers, "calibration_images", lambda *_: "pictures")
    monkeypatch.setattr(peers, "with_metadata", lambda made, source: f"{made}".encode())
    monkeypatch.setattr(goals, "version", lambda package: "1")
    document = results.ROWS["chess-int8"].finish("chess-int8").document
    labels = [network["network"] for network in document["networks"]]
    assert labels == ["float", *goals.CALIBRATED, goals.TRAINED, *peers.QUANTIZERS]
    starts = [command for command in commands if command[0] in ("quantize.py", "train.py")]
    assert len(starts) == 4
    assert {value(command, "--weights") for command in starts} == {
        "runs/results/goal-chess/balanced/tune/weights/best.pt"
    }
    assert value(starts[-1], "--t_weights") == "runs/results/chess-yolov3-tiny/weights/best.pt"
    assert [("--int8" in command) for command in commands if command[0] == "export.py"] == [False] + [True] * 4
    assert (runs / "chess-int8/nncf.quantize.onnx").read_text() == "('float.onnx', 'pictures')"
    commands.clear()
    results.ROWS["chess-int8"].finish("chess-int8")
    assert [command[0] for command in commands] == ["train.py", "-m"]


def test_a_stage_that_was_killed_before_its_first_result_makes_it_where_it_is_looked_for(runs, monkeypatch):
    called = []
    monkeypatch.setattr(suite, "python", lambda *command: called.append([str(word) for word in command]))
    suite.once(runs / "a/model.pt", "quantize.py", "--name", "a")
    suite.once(runs / "a.onnx", "export.py", "--output", "a.onnx")
    suite.train(runs / "b", "train.py", "--epochs", "3", "--name", "b")
    make(runs / "b/weights/last.pt")
    suite.train(runs / "b", "train.py", "--epochs", "3", "--name", "b")
    assert [command[-1] for command in called] == ["--exist-ok", "a.onnx", "--exist-ok", str(runs / "b")]


def test_recipes_of_rows_can_be_run(root):
    import compress
    from utils.compress.recipe import read_recipe

    for path in (root / "benchmarks/recipes").glob("*.yaml"):
        assert read_recipe(path, compress.first_spelling).stages


def test_runtimes_are_given_files_of_the_network_that_each_is_made_from(runs, commands):
    best = make(runs / "goal-bccd" / "balanced" / "tune" / "weights" / "best.pt")
    document = results.ROWS["runtimes-bccd"].finish("runtimes-bccd").document
    *_, compared = commands
    exports = [dict(itertools.pairwise(command)) for command in commands if command[0] == "export.py"]
    sources = {flags["--output"].rpartition("/")[2]: flags["--weights"] for flags in exports}
    assert len(sources) == len(runtimes.FILES)
    assert sources["float.onnx"] == str(best.relative_to(runs.parent.parent))
    assert sources["arm.tflite"].endswith("arm/model.pt") and sources["cpu.onnx"].endswith("cpu/model.pt")
    assert compared[compared.index("--runtimes") + 1 :][: len(runtimes.RUNTIMES)] == list(runtimes.RUNTIMES)
    for network in document["networks"]:
        network |= {"network": f"{network['network']}, R", "runtime": "R 1", "map50_difference": [0, -1, 1]}
    (section,) = runtimes.sections({"runtimes-bccd": document})
    assert [line[0] for line in section.lines] == list(runtimes.FILES) and section.lines[0][3] is None


SIZE = (64, 64)


def model_of_new() -> Darknet:
    """A network whose γ differ, with gradients."""
    torch.manual_seed(0)
    model = Darknet(tiny())
    for name, parameter in model.named_parameters():
        if name.endswith("bn.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.grad = torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("criterion", criteria.PEERS)
def test_a_peer_cuts_to_the_share_and_leaves_heads_and_the_model(criterion):
    """Outputs are proved by `prune` itself, the halves of the grouped route included."""
    pytest.importorskip("torch_pruning")
    model = model_of_new()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = peers.prune(model, criterion, 0.6, SIZE, multiple=2)
    most = 0.6 * network_cost(model.network, *SIZE).macs
    assert 0.4 * most < network_cost(pruned.network, *SIZE).macs <= most
    assert [pruned.blocks[head - 1].filters for head in pruned.network.heads] == [21, 21]
    assert all(block.filters % 2 == 0 for block in pruned.blocks[:-1] if getattr(block, "filters", 21) != 21)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_share_that_no_cut_reaches_is_said():
    pytest.importorskip("torch_pruning")
    with pytest.raises(InfeasibleError, match=r"torch-pruning LAMP: no pruning ratio leaves 0\.001 of"):
        peers.prune(model_of_new(), "LAMP", 0.001, SIZE)


def test_a_module_that_computes_something_else_is_refused(monkeypatch):
    model = model_of_new()
    monkeypatch.setattr(peers, "_network", lambda module: replace(module.network, blocks=module.blocks))
    handle = model.layers[0].register_forward_hook(lambda _, __, output: output + 1)
    with pytest.raises(InfeasibleError, match="outputs differ by"):
        peers._rebuilt(model.eval(), SIZE)
    handle.remove()
    assert peers._rebuilt(model, SIZE).network == model.network


def test_gradients_add_up_over_batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 2, 3, *SIZE), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 0.4, 0.4, 0.2, 0.3], [1, 1, 0.6, 0.5, 0.4, 0.2]])
    batches = [Batch(pictures, boxes, boxes[:0], torch.arange(2), ()) for pictures in images]
    model, sums = model_of_new(), []
    for part in (batches[:1], batches[1:], batches):
        peers.gradients(model, part)
        sums.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other, both in zip(*sums, strict=True):
        torch.testing.assert_close(one + other, both)
    assert any(both.any() for both in sums[2])


@pytest.fixture
def source(files, tmp_path):
    """The float file of a small network."""
    export.main([*files, "--output", str(tmp_path / "float.onnx")])
    return tmp_path / "float.onnx"


@pytest.mark.parametrize(("vnni", "bits"), [(True, 8), (False, 7)], ids=["vnni", "no-vnni"])
@pytest.mark.parametrize("peer", peers.QUANTIZERS)
def test_a_peers_file_opens_as_one_of_export_and_is_near_the_float_one(peer, vnni, bits, source, tmp_path, monkeypatch):
    if "nncf" in peer:
        pytest.importorskip("nncf")
    monkeypatch.setattr(peers, "has_vnni", lambda: vnni)
    images = np.random.default_rng(0).random((4, 1, 3, 64, 64), dtype=np.float32)
    path = tmp_path / "peer.onnx"
    path.write_bytes(peers.with_metadata(peers.QUANTIZERS[peer](source, images), source))
    file, float_file = read_onnx(path), read_onnx(source)
    assert not file.notes and file.metadata.precision == "int8" and file.metadata.reference is None
    assert file.metadata.network == float_file.metadata.network
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4]
    assert {weight.dtype for weight in weights} == {np.dtype(np.int8)}
    largest = max(np.abs(weight.astype(int)).max() for weight in weights)
    assert 2 ** (bits - 2) < largest <= 2 ** (bits - 1)
    heads, wanted = (
        onnxruntime_engine(one.path, one.metadata.tensors, one.batch)(images[0]) for one in (file, float_file)
    )
    for head, other in zip(heads, wanted, strict=True):
        assert 0 < np.linalg.norm(head - other) < 0.1 * np.linalg.norm(other)


def test_peers_get_the_pictures_of_quantize(folder, tmp_path):
    """quantize.py calibrates with train pictures: all nine, once each, as there are fewer than 128."""
    write_checkpoint(tmp_path / "n.pt", contents(Darknet(tiny())))
    found = peers.calibration_images(str(folder / "d.data"), tmp_path / "n.pt", 64)
    assert found.shape == (9, 1, 3, 64, 64) and len({image.tobytes() for image in found}) == 9
    images = [read_image(folder / "images" / f"{number}.png") for number in range(9)]
    assert found.mean() == pytest.approx(np.mean(images) / 255)
