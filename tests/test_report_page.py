"""The report of a compression: one file, escaped, the same figures everywhere, no word of what is not there."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

import export
from models import Darknet
from tests.nets import TINY, printed, refused
from utils.checkpoint import load_model, model_document, origin, write_checkpoint, write_darknet
from utils.compress import page as page_module
from utils.compress.measure import LoadedNetwork, compare_picture, forward, panels
from utils.compress.page import (
    MeasureSettings,
    deployment,
    gather,
    parent_of,
    render,
    slower,
    with_time_of,
    write_report,
)
from utils.darknet.cfg import format_network, parse
from utils.data.draw import GAINED, GAP, LOST, STRIP
from utils.detection.average_precision import detected
from utils.errors import InputError
from utils.export.settings import usage
from utils.flags import ModelFiles
from utils.report import __main__ as script
from utils.report.tables import network_cost
from utils.runtime.choice import RuntimeFiles
from utils.runtime.engines import Engine, ForeignModel, Loaded

VOID = {"meta", "img", "br", "link", "path", "use", "rect", "image"}
EVIL = '<script>alert("&")</script>'
BASE = f"base {EVIL.replace('/', '')}"
EPOCH = "epoch,map50,map50_95\n1,0.5,0.25\n"
PROOFS = ("compact_vs_silenced", "compact_vs_silenced_float64", "compact_vs_keep_size", "border", "side")
CERTIFICATE = dict(zip(PROOFS, (3e-7, 1e-14, 2e-7, 0.017, 64), strict=True))


class Page(HTMLParser):
    """What a page holds: its elements, its words, and whether every element is closed by its own tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


NETWORK = parse(TINY, "n.cfg")


def checkpoint(path, lineage=()):
    """A .pt file of the network; what it was made from."""
    torch.manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, model_document(Darknet(NETWORK).state_dict(), NETWORK, [EVIL, "b"], lineage))


def training(folder, lineage=(), values=(0.25, 0.5, 0.4375), **args):
    """A run of train.py."""
    checkpoint(folder / "weights" / "best.pt", lineage)
    (folder / "model.cfg").write_text(format_network(NETWORK))
    rows = [f"{epoch},{value},{value / 2}" for epoch, value in enumerate(values, 1)]
    (folder / "results.csv").write_text("\n".join(["epoch,map50,map50_95", *rows]) + "\n")
    (folder / "args.yaml").write_text(yaml.safe_dump({"data": "d.data", "epochs": len(values), **args}))
    (folder / "env.json").write_text(json.dumps({"time": "2026-01-02T03:04:05", "cpu": "Z80", "git_commit": "abc"}))
    return folder


def drawn(path):
    """A picture that a run has drawn."""
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), np.zeros((4, 4, 3), np.uint8))


def pruning(folder, lineage):
    """A run of slim_prune.py, in which block 1 loses 5 of its 8 channels."""
    checkpoint(folder / "model.pt", lineage)
    drawn(folder / "channels.png")
    row = {"map50": 0.375, "map50_95": 0.125, "parameters": 1234, "macs": 56789, "weights_bytes": 4000, "ms": 2.5}
    plan = {
        "strategy": "slim",
        "before": {**row, "parameters": 2345, "ms": 5.0},
        "after": row,
        "certificate": CERTIFICATE,
        "latency": {"height": 64, "width": 64, "runtime": "CPU, threads: 1"},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "args.yaml").write_text(yaml.safe_dump({"percent": [0.5], "weights": "best.pt"}))
    header = "block,new_block,line,before,after,candidate,chain,unit,mean_importance"
    (folder / "channels.csv").write_text(f"{header}\n0,0,5,8,8,1,,,0.5\n1,1,9,8,3,1,0,,0.25\n")
    return folder


def stages(folder):
    """Base, sparse, pruned, tuned, made one from the other; the base has a name that wants to be code."""
    base = training(folder / BASE)
    lineage = [origin(base / "weights" / "best.pt")]
    sparse = training(folder / "sparse", lineage, sr=True, prune=0)
    drawn(sparse / "gamma" / "histogram.png")
    lineage = [*lineage, origin(sparse / "weights" / "best.pt")]
    pruned = pruning(folder / "pruned", lineage)
    lineage = [*lineage, origin(pruned / "model.pt")]
    return base, sparse, pruned, training(folder / "tuned", lineage, values=(0.5, 0.5625))


@pytest.fixture
def chain(tmp_path):
    return stages(tmp_path / "runs")


def read(out) -> tuple[Page, str, dict]:
    """The three files."""
    page, text = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return Page(page), text, json.loads((out / "report.json").read_text(encoding="utf-8"))


def written(tmp_path, runs, *data, **more) -> tuple[Page, str, dict]:
    """The three files of runs."""
    write_report(runs, tmp_path / "out", *data, **more)
    return read(tmp_path / "out")


def run_with(tmp_path, **files: object) -> Path:
    """A run directory with these files of JSON or text only."""
    run = tmp_path / "run"
    run.mkdir()
    for stem, content in files.items():
        name = {"results": "results.csv", "args": "args.yaml"}.get(stem, f"{stem}.json")
        (run / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a chain as it is parsed, its Markdown, its JSON, and the page as text."""
    folder = tmp_path_factory.mktemp("report")
    page = write_report(stages(folder / "runs"), folder / "out")
    text = page.read_text(encoding="utf-8")
    return *read(folder / "out"), re.sub('base64,[^"]*', "base64,", text)


def test_the_page_needs_nothing_but_itself(report):
    page, _, _, text = report
    assert not page.open
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|xmlns", text)
    assert not page.all("script")
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href"):
            if attributes.get(name) is not None:
                assert attributes[name].startswith(("#", "data:image/")), attributes
    assert "default-src 'none'" in page.all("meta")[-1]["content"]


def test_what_a_run_is_called_is_text_and_never_code(report):
    page, markdown, document, text = report
    assert BASE in page.text and "&lt;" not in page.text and "\\\\" not in markdown
    assert "training → sparse training → slim pruning → fine-tuning; data set d; 2026-01-02" in page.text
    assert document["runs"][0]["name"] == BASE
    assert "<script" not in markdown.replace("\\<", "") + text
    assert all("alert" not in str(attributes) or tag in ("div", "img") for tag, attributes in page.tags)


def test_everything_seen_has_words_and_ids_are_unique(report):
    page = report[0]
    plots = [plot for plot in page.all("img") if plot.get("class") == "plot"]
    assert len(plots) == 3  # the course, channels, scales
    assert all(len(plot["alt"]) > 20 for plot in plots)
    assert {cell["scope"] for cell in page.all("th")} == {"col", "row"}
    assert len(page.all("h1")) == 1
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    used = {attributes["href"][1:] for _, attributes in page.tags if (attributes.get("href") or "").startswith("#")}
    assert used <= set(identities)


def test_page_markdown_and_json_tell_the_same(report):
    page, text, document, _ = report
    cost = network_cost(NETWORK)
    figures = [run["figures"] for run in document["runs"]]
    assert [row["map50"] for row in figures] == [0.5, 0.4375, 0.375, 0.5625]
    assert [row["parameters"] for row in figures] == [cost.parameters, cost.parameters, 1234, cost.parameters]
    rows = [line for line in text.splitlines() if re.match(r"\| [1-4] ", line)]
    for number, (row, line) in enumerate(zip(figures, rows, strict=False), 1):
        for shown in (f"{row['map50']:.3f}", f"{row['map50_95']:.3f}", f"{row['parameters']:,}".replace(",", " ")):
            assert shown in line and shown in page.text
        assert line.startswith(f"| {number} ")
    assert document["runs"][2]["certificate"] == CERTIFICATE
    assert document["runs"][2]["channels"][1] == {"block": 1, "before": 8, "after": 3}
    assert document["runs"][3]["epochs"]["map50"] == [0.5, 0.5625]
    keys = ("median_epochs", "median_map50", "median_map50_95")
    assert [[run[key] for key in keys] for run in document["runs"]] == [
        [3, 0.4375, 0.21875],
        [3, 0.4375, 0.21875],
        [0, None, None],
        [2, 0.53125, 0.265625],
    ]
    phrases = ("is chosen on the images that its accuracy is", "the last 20% of the epochs, at least 3")
    for shown in ("3.0e-07", "1.0e-14", "2.0e-07", "1.7e-02", *phrases):
        assert shown in text and shown in page.text
    kept = [line.split("|")[1:-1] for line in text.partition("their median AP50")[2].splitlines()[2:5]]
    assert [[cell.strip() for cell in row[1:]] for row in kept] == [
        ["2", "0.500", "0.250", "3", "0.438", "0.219"],
        ["3", "0.438", "0.219", "3", "0.438", "0.219"],
        ["2", "0.562", "0.281", "2", "0.531", "0.266"],
    ]
    assert "+6.2 points 0.562 from 0.500" in page.text and "* AP50: +6.2 points (0.562 from 0.500)" in text
    assert "AP50 0.500 → 0.562: +6.2 points, each figure from its own run, so without an interval." in page.text


def parents(runs) -> list[str | None]:
    """Names of the runs whose networks these began with."""
    return [(parent_of(run) or {}).get("run") for run in runs]


def test_no_figure_has_an_exponent(tmp_path):
    """A large network takes seconds on a CPU."""
    base = training(tmp_path / "base")
    pruned = pruning(tmp_path / "pruned", [origin(base / "weights" / "best.pt")])
    plan = json.loads((pruned / "plan.json").read_text())
    plan["before"] |= {"ms": 2500.4}
    (pruned / "plan.json").write_text(json.dumps(plan | {"after": plan["after"] | {"ms": 999.7}}))
    text = written(tmp_path, [base, pruned])[1]
    assert "* Time: ÷ 2.5 (1000 ms from 2500 ms)" in text


def test_stages_are_ordered_and_proved_by_their_digests(chain):
    base, sparse, pruned, tuned = chain
    journey = gather([tuned, pruned, base, sparse])
    runs = journey["runs"]
    assert [run["run_dir"] for run in runs] == list(map(str, chain))
    assert [run["kind"] for run in runs] == ["train", "sparse", "prune", "tune"]
    assert parents(runs) == [None, *(run["name"] for run in runs[:3])]
    assert journey["goal"] == "tuned"
    assert [run["best_epoch"] for run in runs[:2]] == [2, 3]  # of a sparse training the last
    assert runs[1]["figures"]["ms"] == {"PyTorch, CPU, threads: 1": 5.0}


def test_the_epoch_kept_is_that_of_the_file_and_not_the_fittest_row(tmp_path):
    """As in a training with --quantized, whose first epochs are not rounded."""
    run, document = training(tmp_path / "qat", values=(0.5, 0.25, 0.375), quantized=1), Darknet(NETWORK).state_dict()
    document = model_document(document, NETWORK, ["a", "b"], (), progress={"epoch": 3})
    write_checkpoint(run / "weights" / "best.pt", document)
    (told,) = gather([run])["runs"]
    assert (told["kind"], told["best_epoch"], told["figures"]["map50"]) == ("qat", 3, 0.375)


def test_a_file_that_was_changed_since_is_named(chain, tmp_path):
    (chain[0] / "weights" / "best.pt").unlink()
    checkpoint(chain[0] / "weights" / "best.pt", [{"path": "other", "sha256": "1"}])
    page, text, document = written(tmp_path, chain)
    assert [entry["changed"] for entry in document["runs"][1]["lineage"]] == [True]
    assert "which was changed since" in page.text and "which was changed since" in text


def test_what_is_not_there_is_left_out(tmp_path):
    """A run with nothing but its epochs: no certificate, no channels, no commands, and no plot but the course."""
    page, text, document = written(tmp_path, [run_with(tmp_path, results=EPOCH)])
    assert len(page.all("section")) == 3
    assert document["runs"][0]["certificate"] is None
    for word in ("None", "nan", "ertificate", "Channels", "ms,"):
        assert word not in page.text + text


def test_a_column_that_no_certificate_has_is_not_told_of(report):
    """A pruning whose readers were fitted measures no border."""
    _, text, document, _ = report
    pruned = {**document["runs"][2], "certificate": {**CERTIFICATE, "border": None}}
    fitted = render({**document, "goal": "pruned", "runs": [pruned]}, (), (), markdown=True)
    for told, last in ((text, "| border |"), (fitted, "| pruned and full size |")):
        titles = told.partition("Largest relative differences:\n\n")[2].partition("\n")[0]
        assert titles.endswith(last) and ("The last column is" in told) == ("border" in last)


def test_noise_of_a_quantization_is_drawn_and_listed(tmp_path):
    layers = [
        {"block": n, "name": f"{n} convolutional", "bits": bits, "activation_bits": bits, "sqnr_db": noise}
        for n, bits, noise in ((0, 8, 31.25), (1, 32, None))
    ]
    quantization = {"layers": layers, "map50": {"before": 0.5, "after": 0.4375}}
    page, text, document = written(tmp_path, [run_with(tmp_path, quantize=quantization)])
    (run,) = document["runs"]
    assert (run["kind"], run["figures"]["map50"]) == ("quantize", 0.4375)
    assert [row["decibels"] for row in run["sqnr"]] == [31.25, None]
    assert "31.2" in page.text and "31.2" in text


@pytest.mark.parametrize("sides", [[32], [64, 32]])
def test_a_run_that_worked_on_other_pictures_than_those_of_its_cfg_is_told_at_their_size(tmp_path, sides):
    """Its cfg says 64 × 64; of a pruning without a test only the flag says more."""
    for name in ("quantize", "plan"):
        run = tmp_path / name
        run.mkdir()
        (run / "model.cfg").write_text(format_network(NETWORK))
        (run / "args.yaml").write_text(yaml.safe_dump({"img_size": sides}))
        (run / f"{name}.json").write_text(json.dumps({"layers": []} if name == "quantize" else {"strategy": "slim"}))
    quantized, pruned = (row["figures"] for row in gather([tmp_path / "quantize", tmp_path / "plan"])["runs"])
    assert quantized["size"] == pruned["size"] == [sides[0], 32]
    assert quantized["macs"] == network_cost(NETWORK, sides[0], 32).macs


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({}, "no run directory of train.py"),
        ({"plan": "[1]"}, "plan.json: names and their values were expected"),
        ({"plan": "{"}, "plan.json:1: not valid JSON"),
        ({"args": "- 1"}, "args.yaml: names and their values were expected"),
        ({"results": "epoch,map50\n1\n"}, "results.csv:2: 1 cells"),
    ],
)
def test_what_is_no_run_directory_is_one_line_and_nothing_is_written(tmp_path, files, match):
    with refused(InputError, match, 2):
        script.main([str(run_with(tmp_path, **files)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("tuned tuned", "is given twice"),
        ("tuned --baselines x.pt", r"x.pt: no such file"),
        ("tuned --baselines a=b.json", r"a=b.json: no such file"),
        ("tuned --data none.data", "none.data: no such file"),
        ("tuned --baselines pruned/model.pt@0", "outside 1..8192"),
        ("tuned --baselines pruned/model.pt", "measured with --data only"),
        ("tuned --baselines lone.weights", r"does not say its network; .*lone\.cfg is not there"),
        ("none", "no folder"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(tmp_path, chain, monkeypatch, flags, match):
    monkeypatch.chdir(chain[0].parent)
    Path("lone.weights").touch()
    with pytest.raises(InputError, match=match):
        script.main([*flags.split(), "--out", "out"])
    assert not Path("out").exists()


def test_a_report_that_is_there_is_kept_unless_told_otherwise(tmp_path, chain, capsys):
    out = tmp_path / "out"
    flags = [str(chain[0]), "--out", str(out)]
    script.main(flags)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="--exist-ok"):
        script.main(flags)
    report = printed(capsys, script.main, *flags, "--exist-ok", "--title", "Another")["report"]
    assert report == str(out / "report.html")
    assert "Another" in read(out)[0].text
    assert (out / "mine.txt").read_text() == "mine"


def test_baselines_of_a_file_are_drawn_beside_the_journey(tmp_path, chain):
    accuracy = {"map50": 0.25, "map50_interval": [0.125, 0.375], "map50_95": 0.0625}
    row = {"network": "small", "size": [32, 32], "parameters": 999, "macs": 888, "ms": 1.25, **accuracy}
    (tmp_path / "b.json").write_text(json.dumps({"networks": [row]}))
    page, text, document = written(tmp_path, chain, baselines=[str(tmp_path / "b.json")])
    assert document["baselines"][0]["name"] == "small"
    assert any("small: AP50 0.250" in plot["alt"] for plot in page.all("img"))
    assert "| small" in text
    (tmp_path / "b.json").write_text(json.dumps({"networks": [{**row, "ms": None}]}))
    with pytest.raises(InputError, match="benchmarks"):
        write_report(chain, tmp_path / "out", baselines=[str(tmp_path / "b.json")])


def test_everything_is_measured_on_the_same_pictures(folder, tmp_path, short_timings):
    """Two equal networks differ by nothing, whatever pictures are drawn; the JPEGs can be read."""
    base = training(tmp_path / "base")
    tuned = training(tmp_path / "tuned", [origin(base / "weights" / "best.pt")])
    pair = tmp_path / "low.weights"
    write_darknet(pair, load_model(ModelFiles(None, base / "weights" / "best.pt", True)).model)
    pair.with_suffix(".cfg").write_text(format_network(NETWORK))
    settings = MeasureSettings(draws=20, pictures=1)
    flags = {"baselines": [f"low={pair}@32"], "settings": settings}
    page, text, document = written(tmp_path, [base, tuned], folder / "d.data", **flags)
    measured = [run["measured"] for run in document["runs"]]
    assert measured[0]["map50"] == measured[1]["map50"]
    assert measured[1]["map50_difference"] == [0, 0, 0]
    assert document["measurement"]["images"] == 3
    assert [baseline["name"] for baseline in document["baselines"]] == ["low"]
    assert document["baselines"][0]["size"] == [32, 32]
    assert "+0.0 [+0.0, +0.0]" in text and "timed as the file" not in text
    assert "Shown are the images" in page.text and "Shown are" not in text
    assert "no loss that 3 images can show" in page.text
    first = dict(document["runs"][0], measured=None)  # its file has gone, and differences are to another network
    text = render({**document, "runs": [first, document["runs"][1]]}, (), (), markdown=True)
    assert "can show" not in text and "points, each figure from its own run" in text
    (image,) = [image for image in page.all("img") if image.get("class") != "plot"]
    kind, _, data = image["src"].partition(",")
    assert kind == "data:image/jpeg;base64" and "ground truth: " in image["alt"]
    assert cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR).shape[2] == 3


def test_an_object_is_found_by_one_box_of_its_class():
    truth = np.array([[0, 0, 10, 10, np.nan, 0], [0, 0, 10, 8, np.nan, 0], [50, 50, 60, 60, np.nan, 1]])
    one = np.array([[0, 0, 10, 10, 0.9, 0]])
    assert detected(truth, one).tolist() == [True, False, False]
    assert detected(truth, np.vstack([one, [[0, 0, 10, 10, 0.5, 0]]])).tolist() == [True, True, False]
    assert detected(truth, np.array([[50, 50, 60, 60, 0.9, 0]])).tolist() == [False, False, False]
    assert detected(truth[:0], one).tolist() == []
    assert detected(truth, one[:0]).tolist() == [False, False, False]


def test_lost_and_gained_boxes_are_marked_in_the_last_panel_only(tmp_path):
    from utils.data.images import write_image

    write_image(tmp_path / "a.png", np.full((400, 400, 3), 120, np.uint8))
    truth = np.array([[0, 20, 20, 120, 120, 0], [0, 220, 220, 380, 380, 0], [0, 20, 220, 120, 380, 1]], float)
    first, second, ignored = (np.array([[*row[1:5], 0.9, 0.0]]) for row in truth)
    first = np.concatenate([first, ignored])
    picture = compare_picture(str(tmp_path / "a.png"), truth, first, second)
    assert (len(picture.lost), len(picture.gained)) == (1, 1)
    shown = panels(picture, ["a"], ["truth", "before", "after"])[STRIP:]
    side = shown.shape[0]
    lost, gained = (np.all(shown == colour, 2) for colour in (LOST, GAINED))
    assert shown.shape[1] == 3 * side + 2 * GAP and not (lost | gained)[:, : 2 * side].any()
    assert lost[: side // 2].any() and not lost[side // 2 :].any()
    assert gained[side // 2 :].any() and not gained[: side // 2].any()


def test_what_the_scripts_leave_is_told_for_what_it_is(run, folder, tmp_path, no_plots, short_timings):
    """A plain training, and files of it for two runtimes and with NMS, which has thresholds of its own."""
    base = run("--epochs", "1")
    flags = ["--weights", base["best"], "--project", str(tmp_path / "export")]
    for name, more in (("ncnn", ["--format", "ncnn"]), ("onnx", []), ("nms", ["--nms"])):
        export.main([*flags, "--name", name, *more])
    runs = [base["run_dir"], *(tmp_path / "export" / name for name in ("ncnn", "onnx", "nms"))]
    _, text, document = written(tmp_path, runs, folder / "d.data", settings=MeasureSettings(draws=10))
    assert "A float network was timed as the file that export.py makes of it." in text
    assert [told["kind"] for told in document["runs"]] == ["train", "export", "export", "export"]
    figures = [told["figures"] for told in document["runs"]]
    assert len({row["parameters"] for row in figures}) == 1
    assert figures[1]["bytes"] == sum(path.stat().st_size for path in (tmp_path / "export/ncnn").glob("model.ncnn.*"))
    assert [len(row["ms"]) for row in figures] == [2, 1, 1, 0]
    assert figures[0]["ms"] == figures[1]["ms"] | figures[2]["ms"]  # a float network is timed as its files
    assert parents(gather(runs)["runs"]) == [None, *[document["runs"][0]["name"]] * 3]


def test_a_program_on_the_cpu_is_timed_without_a_copy_from_another_device():
    heads, seen = [np.zeros((1, 1), np.float32)] * len(NETWORK.heads), []
    model = ForeignModel(NETWORK, Engine(lambda images: seen.append(images.shape) or heads, 1, "onnxruntime 1"))
    loaded = Loaded(model, NETWORK, None, "onnxruntime 1")
    network = LoadedNetwork("int8", loaded, (64, 64), RuntimeFiles(NETWORK, Path("int8.onnx")))
    forward(network, torch.device("meta"))()  # what is on this device cannot be copied
    assert seen == [(1, 3, 64, 64)]


@pytest.mark.parametrize(
    ("runtime", "ms"),
    [(None, 2.0), ("onnxruntime 1", 2.0), ("onnxruntime 1, CPU, threads: 2", 2.0), ("PyTorch 2", None), ("onnx", None)],
)
def test_a_time_of_another_program_stands_in_no_column(runtime, ms):
    assert with_time_of({"runtime": runtime, "ms": 2.0}, "onnxruntime 1, CPU, threads: 2")["ms"] == ms


def stage(name, kind, parent, ms, size=1, lost=0.0, precision=None):
    """A run of a document; its network was made from that of the run before, and took `ms` in one program."""
    return {
        "name": name,
        "kind": kind,
        "weights": f"{name}/model.torchscript",
        "lineage": [{"path": "x", "sha256": "1", "teacher": None, "run": parent, "changed": False}] if parent else [],
        "figures": {"bytes": size, "ms": {"onnxruntime 1": ms} if ms else {}},
        "measured": {"map50_difference": [-lost, -lost - 0.01, -lost + 0.01]} if ms else None,
        "precision": precision,
    }


@pytest.mark.parametrize(
    ("ms", "lost", "chosen", "words"),
    [
        ((10, 9.5), (0, 0), "int8", "Of 2 files that lose no AP50 that can be seen and are as fast as any here"),
        ((10, 5), (0, 0), "int8", "It is the fastest of 2 files that lose no AP50 that can be seen."),
        ((10, 5), (0, 0.05), "float", "It is the only file that loses no AP50 that can be seen."),
        ((10, 10.5), (0, 0), "int8", "int8 is slower than float here: 10.50 ms, tune in float 10.00 ms (onnxrun"),
        ((10, 12), (0, 0), "float", "int8 is slower than float here: 12.00 ms"),
        ((10, 5), (0, 0.05), "float", "int8 loses AP50."),
        ((10, 5), (0.05, 0.05), "int8", "float loses AP50. int8 loses AP50."),
        ((None, None), (0, 0), "int8", "It is the smallest of 2 files, which were not measured."),
    ],
)
def test_the_file_to_deploy_is_small_fast_and_loses_nothing(ms, lost, chosen, words):
    """Of an original of 40 bytes, a float file of 8 and one of 2 with integers."""
    runs = [stage("original", "original", None, 20), stage("first", "export", "original", ms[0] and 20, 40)]
    runs += [stage("tune", "tune", "original", ms[0]), stage("float", "export", "tune", ms[0], 8, lost[0], "float32")]
    quantized = stage("int8", "export", "tune", ms[1], 2, lost[1], "int8")
    deploy = deployment({"runs": [*runs, quantized]})
    assert deploy["run"] == chosen and deploy["file"] == f"{chosen}/model.torchscript"
    assert words in " ".join(deploy["why"])
    assert deployment({"runs": runs[:1]}) is None
    assert deployment({"runs": runs[:2]})["run"] == "first"
    assert deployment({"runs": runs[:2]})["why"] == ["It is the only .torchscript file."]
    suppressed = dict(stage("nms", "export", "tune", None, 1, precision="int8"), measured=None)
    if ms[0]:  # what ends in NMS is not measured
        assert deployment({"runs": [*runs, quantized, suppressed]}) == deploy
        alone = deployment({"runs": [*runs[:3], quantized, suppressed]})
        assert alone["why"][0] == "It is the only .torchscript file of a compressed network that was measured."
    lite = dict(quantized, weights="int8/model.tflite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "exported", lambda weights: None)
        assert deployment({"runs": [*runs, lite]})["why"][0] == "It is the only .tflite file of a compressed network."


def test_a_time_that_reads_like_another_is_not_called_slower():
    runs = [stage("tune", "tune", None, 1.001), stage("int8", "export", "tune", 1.004, precision="int8")]
    assert slower(runs[1], runs) is None
    assert slower(dict(runs[1], figures={"ms": {"onnxruntime 1": 1.006}}), runs).startswith("int8 is slower")


@pytest.mark.parametrize(
    ("path", "beside", "command", "client"),
    [
        ("a b/model.onnx", None, "detect.py --weights 'a b/model.onnx' ", "onnxruntime_client.py 'a b/model.onnx' "),
        ("m.ncnn.param", "m.ncnn.bin, m.ncnn.json", "detect.py --weights m.ncnn", "ncnn_client.py m.nc"),
        ("model.xml", "model.bin", "detect.py --weights model.xml ", "openvino_client.py model.xml "),
        ("m.weights", "m.cfg", "detect.py --cfg m.cfg --weights m.weights ", "opencv_client.py m.cfg "),
        ("model.torchscript", None, None, None),
    ],
)
def test_commands_and_companions_go_with_the_file(path, beside, command, client, root):
    told = usage(path, None)
    assert told["beside"] == beside
    for key, words in (("command", command), ("client", client)):
        assert (told[key] is None) if words is None else (words in told[key])
    assert client is None or (root / "examples" / client.split()[0]).is_file()
