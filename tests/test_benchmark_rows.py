"""Rows of docs/results.md: what they run, what they wait for, and the page that is written of them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from benchmarks import criteria, goals, peers, results, rewrites, runtimes, suite, trainings
from utils.errors import InputError

FIGURES = {
    "map50_95": 0.1,
    "map50_95_interval": [0, 1],
    "map50_interval": [0, 1],
    "parameters": 9,
    "macs": 5,
    "bytes": 1,
}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Rows are run beside an empty folder of results."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / suite.RUNS


@pytest.fixture
def commands(runs, monkeypatch):
    """Commands of the suite's scripts, which are stand-ins that leave the files they are asked for."""
    called = []

    def python(*command):
        called.append(list(command))
        flags = dict(itertools.pairwise(command))
        if command[0] == "export.py":
            (runs.parent.parent / flags["--output"]).touch()
        elif command[0] == "quantize.py":
            make(runs.parent.parent / flags["--project"] / flags["--name"] / "model.pt")
        elif command[0] == "slim_prune.py":
            return json.dumps({"cfg": "p.cfg", "weights": "p.weights"})
        files = [word for word in command if "=" in word]
        networks = [{"network": file, "map50": 0.9 - 0.1 * number, **FIGURES} for number, file in enumerate(files)]
        place = {"images": 3, "machine": "M", "threads": 1, "torch": "2", "commit": None}
        return json.dumps({**place, "networks": networks})

    monkeypatch.setattr(suite, "python", python)
    monkeypatch.setattr(suite, "train", lambda folder, *command: called.append(list(command)))
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


def test_commands_name_the_folder_of_the_real_data(monkeypatch):
    monkeypatch.setenv("DARKNET_SHARED", "elsewhere")
    command = results.ROWS["chess-yolov3-tiny-seed1"].command("chess-yolov3-tiny-seed1")
    assert suite.shared(value(command, "--data")) == "elsewhere/data/chess/chess.data"
    shown = json.loads((suite.STORED / "chess-yolov3-tiny-seed1.json").read_text())["command"]
    assert suite.shown(command) == shown


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
    labels = [network["network"].partition("=")[0] for network in document["networks"]]
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


def test_a_compression_runs_a_recipe_and_compares_what_its_stages_left(runs, commands):
    make(runs / "bccd-yolov4-tiny/weights/best.pt")
    for file in ("original/model.pt", "sparse/weights/best.pt", "pruned/model.pt"):
        make(runs / "bccd-yolov4-tiny-constant" / file)
    results.ROWS["bccd-yolov4-tiny-constant"].finish("bccd-yolov4-tiny-constant")
    compressed, compared = commands
    assert value(compressed, "--recipe") == "benchmarks/recipes/constant.yaml"
    assert [word.partition("=")[0] for word in compared if "=" in word] == ["original", "sparse", "pruned"]


def test_recipes_of_rows_can_be_run(root):
    import compress
    from utils.compress.recipe import read_recipe

    for path in (root / "benchmarks/recipes").glob("*.yaml"):
        assert read_recipe(path, compress.knows).stages


def test_means_are_over_seeds_and_of_both_sets_where_all_seeds_are_there():
    """bccd 0.8, 0.82, 0.84 and roadsigns 0.9 three times: means of both 0.85, 0.86, 0.87."""
    bccd = {trainings.seeded("bccd-kd4", seed): {"map50": 0.8 + 0.02 * seed, "map50_95": 0.5} for seed in range(3)}
    roadsigns = {trainings.seeded("roadsigns-kd4", seed): {"map50": 0.9, "map50_95": 0.7} for seed in range(3)}
    line = trainings._strategy("kd4", bccd | roadsigns)
    assert line[2:4] + line[-2:] == [3, "0.820 ± 0.020", "0.860 ± 0.010", "0.600 ± 0.000"]
    assert trainings._strategy("kd4", bccd)[-5:] == [None] * 5


def test_an_activation_is_swapped_and_both_networks_train_on_for_as_long(runs, commands):
    document = results.ROWS["bccd-yolov4-quarter-leaky"].finish("quarter").document
    rewrite = next(command for command in commands if "utils.darknet.rewrite" in command)
    assert value(rewrite, "--activation") == "mish=leaky" and value(rewrite, "--output").endswith("quarter/leaky.cfg")
    original, on, recovered = [command for command in commands if command[0] == "train.py"]
    best = "runs/results/quarter/original/weights/best.pt"
    assert value(on, "--weights") == value(recovered, "--t_weights") == value(rewrite, "--weights") == best
    assert value(recovered, "--weights") == "runs/results/quarter/leaky.pt"
    assert [value(command, "--epochs") for command in (original, on, recovered)] == ["60", "20", "20"]
    exports = [command for command in commands if command[0] == "export.py"]
    assert [value(command, "--format") for command in exports] == ["onnx", "tflite"] * 2
    row = dict.fromkeys(("ms", "p90", "faster", "macs", "bytes", "rounds", "height", "width", "threads"), 1)
    document["speeds"] = {"machine": "M", "rows": [row | {"network": "mish", "runtime": "litert", "engine": "LiteRT"}]}
    accuracy, speeds = rewrites.sections({"bccd-yolov4-quarter-leaky": document})
    assert len(accuracy.lines) == 6 and speeds.lines[0][:2] == ("mish", "litert")


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
        network |= {
            "network": network["network"].split("=")[0] + ", R",
            "runtime": "R 1",
            "map50_difference": [0, -1, 1],
        }
    (section,) = runtimes.sections({"runtimes-bccd": document})
    assert [line[0] for line in section.lines] == list(runtimes.FILES) and section.lines[0][3] is None
