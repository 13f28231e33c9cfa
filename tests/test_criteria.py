"""benchmarks.criteria: one network cut by slim_prune.py and by torch-pruning, at equal multiply-adds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import criteria, peers, results
from models import Darknet
from tests.nets import tiny
from utils.data.datasets import Batch
from utils.errors import InfeasibleError, InputError
from utils.report.cost import network_cost

SIZE = (64, 64)
FIGURES = {"map50_interval": [0, 1], "map50_95": 0.1, "map50_95_interval": [0, 1], "parameters": 9, "macs": 5}


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
def call(folder, tmp_path, monkeypatch, capsys):
    """Call the script while the suite's scripts are stand-ins; returns its output and what was run."""
    commands = []

    def python(*command):
        commands.append(list(command))
        if command[0] == "slim_prune.py":
            return json.dumps({"cfg": "p.cfg", "weights": "p.weights"})
        files = [word for word in command if "=" in word]
        networks = [{"network": "n", "map50": 0.9 - 0.1 * number, **FIGURES} for number in range(len(files))]
        found = {"images": 3, "machine": "M", "threads": 1, "torch": "2", "commit": None}
        return json.dumps({**found, "networks": networks})

    monkeypatch.setattr(criteria, "python", python)
    monkeypatch.setattr(criteria, "train", lambda run_dir, command: commands.append(command))
    (tmp_path / "base.pt").write_bytes(b"one")

    def run(*flags):
        commands.clear()
        files = ["--weights", str(tmp_path / "base.pt"), "--data", str(folder / "d.data"), "--img_size", "64"]
        criteria.main([*files, "--project", str(tmp_path / "runs"), "--peers", *flags])
        return capsys.readouterr().out, list(commands)

    return run


def test_flags_reach_slim_prune_and_a_finished_cut_is_not_made_again(call, tmp_path):
    flags = ("--macs", "0.5", "--ours=--importance taylor --rounds 2", "--ours=", "--json")
    _, (first, second, compared) = call(*flags)
    assert first[first.index("--target-macs") + 1] == second[second.index("--target-macs") + 1] == "0.5"
    assert first[first.index("--importance") : first.index("--project")] == ["--importance", "taylor", "--rounds", "2"]
    assert compared[:2] == ["-m", "benchmarks.compare"] and compared[-2] == "slim_prune.py-0.5=p.cfg:p.weights"
    out, commands = call(*flags)
    assert [command[:2] for command in commands] == [["-m", "benchmarks.compare"]]
    found = [(network["criterion"], network["map50"]) for network in json.loads(out)["networks"]]
    assert found == [("slim_prune.py --importance taylor --rounds 2", pytest.approx(0.8)), ("slim_prune.py", 0.7)]
    (tmp_path / "base.pt").write_bytes(b"other")
    with pytest.raises(InputError, match="of another network, data set or size; give another --project"):
        call(*flags)


def test_all_are_trained_alike_and_the_table_has_the_mean_over_seeds(call):
    """Figures fall by 0.1 from network to network: 0.9 before, 0.8 as cut, 0.7 and 0.6 trained."""
    flags = ("--macs", "0.5", "--ours=", "--epochs", "3", "--seeds", "0", "1", "--train=--no-flip")
    out, (_, *trainings, compared) = call(*flags)
    for seed, command in enumerate(trainings):
        assert command[:5] == ["train.py", "--cfg", "p.cfg", "--weights", "p.weights"] and "--no-flip" in command
        assert command[command.index("--KDstr") + 1 :][:5] == ["4", "--epochs", "3", "--seed", str(seed)]
    assert [word.partition("=")[0] for word in compared if word.startswith("slim_prune.py-0.5-3")] == [
        "slim_prune.py-0.5-3-seed0", "slim_prune.py-0.5-3-seed1"
    ]  # fmt: skip
    line = next(line for line in out.splitlines() if line.startswith("| slim_prune.py"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2] == "0.800" and cells[7:] == ["0.650", "0.071", "0.100", "0.000"]


def test_rows_have_a_section_each_and_wait_for_their_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, row in criteria.ROWS.items():
        assert results.EVERY[name] is row
        with pytest.raises(InputError, match=f"run the row {row.source} first"):
            results.finish(name)


def test_a_row_that_trains_says_so_to_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/results/chess-yolov3-tiny/weights").mkdir(parents=True)
    (tmp_path / "runs/results/chess-yolov3-tiny/weights/best.pt").touch()
    monkeypatch.setattr(criteria, "python", lambda *command: json.dumps({"flags": command}))
    plain, tuned = (results.finish(f"criteria-chess{name}").document["flags"] for name in ("", "-tuned-33"))
    assert "--epochs" not in plain and plain[-3:-1] == ["--project", "runs/results/criteria-chess"]
    assert tuned[tuned.index("--macs") + 1 :][:3] == ["0.33", "--project", "runs/results/criteria-chess"]
    assert tuned[-6:-1] == ["--seeds", "0", "1", "2", "--train=--amp bf16"]


def test_without_torch_pruning_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--peers: needs the package torch_pruning; pip install -r requirements-dev"):
        criteria.parse_args(["--weights", "a.pt", "--data", "d.data"])
