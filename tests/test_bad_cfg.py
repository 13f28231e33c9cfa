"""Whatever is wrong in a cfg is told in one line with file and line; nothing else comes out of the parser."""

from __future__ import annotations

import random
import re

import pytest

from benchmarks.mutations import mutated
from tests.bad_cfgs import EVERY, NANO, ODDITIES, RICH, Bad
from utils.darknet.cfg import format_network, load, parse
from utils.errors import CfgError


def quiet(text: str) -> None:
    """Takes warnings."""


@pytest.mark.parametrize("bad", EVERY, ids=lambda bad: re.sub(r"[^\x20-\x7e]", "?", bad.name))
def test_a_bad_cfg_is_refused_in_one_line_that_names_file_and_line(bad: Bad, tmp_path):
    path = tmp_path / "bad.cfg"
    bad.make(path)
    with pytest.raises(CfgError) as caught:
        load(path, warn=quiet)
    place, _, what = str(caught.value).partition(": ")
    assert place == f"{path}:{bad.line}", what
    assert re.search(bad.says, what)
    assert what.isprintable() and len(what) < 330
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.cfg"]


def test_distinct_causes_have_distinct_messages(tmp_path):
    messages = set()
    for number, bad in enumerate(EVERY):
        path = tmp_path / str(number)
        bad.make(path)
        with pytest.raises(CfgError) as caught:
            load(path, warn=quiet)
        messages.add(str(caught.value).partition(": ")[2])
    assert len(messages) >= len(EVERY) - 8
    assert len({re.sub(r"=[^:]*:|\d+", "", message) for message in messages}) >= 60


@pytest.mark.parametrize("text", ODDITIES.values(), ids=ODDITIES)
def test_an_unusual_text_is_the_same_network(text, tmp_path):
    assert parse(text, warn=quiet) == parse(NANO)
    path = tmp_path / "odd.cfg"
    path.write_bytes(text.encode())
    assert load(path, warn=quiet) == parse(NANO)


def test_control_characters_of_the_file_name_are_escaped(tmp_path):
    path = tmp_path / "a\nb\x1b[31m.cfg"
    path.write_text(NANO.replace("filters=12", "filters=x"))
    with pytest.raises(CfgError, match=r"a\\nb\\x1b\[31m\.cfg:46: \[convolutional\] filters=x") as caught:
        load(path)
    assert str(caught.value).isprintable()


def test_a_missing_file_has_no_line(tmp_path):
    with pytest.raises(CfgError, match=r"no\.cfg: no such file"):
        load(tmp_path / "no.cfg")


@pytest.mark.parametrize("text", ["\ud800", "[net]\nwidth=\udcff", "[net]\x85"])
def test_surrogates_and_control_characters_are_refused_in_texts_too(text):
    with pytest.raises(CfgError, match=r"<text>:\d: control character"):
        parse(text)


WARNED = {
    "learn_rate_decay=1": (r"unknown keys are kept, but not used: learn_rate_decay of \[net\] in line 2", 1),
    "width=64": (r"<text>:3: \[net\] width is repeated \(line 2 says the same\)", 1),
    "burn_in=1000\nmosaic=1\nletter_box=1\nclip=3": ("", 0),
}


@pytest.mark.parametrize(("text", "expected"), WARNED.items(), ids=[text[:10] for text in WARNED])
def test_keys_of_no_use_are_kept_and_told_once_if_nobody_knows_them(text, expected):
    says, count = expected
    notes: list[str] = []
    network = parse(NANO.replace("[net]\n", f"[net]\n{text}\n"), warn=notes.append)
    assert len(notes) == count
    assert all(re.fullmatch(f"warning: .*{says}.*", note) for note in notes)
    if "width" not in text:
        assert network.net.extra == tuple(tuple(line.split("=")) for line in text.split())


def test_readings_that_may_surprise_are_told():
    text = NANO.replace("batch_normalize=1", "batch_normalize=2", 1).replace("activation=leaky\n", "", 1)
    text = text.replace("num=6", "num=6\nnms_kind=grpeedynms", 1)
    notes: list[str] = []
    network = parse(text, "a.cfg", notes.append)
    assert network.blocks[0].batch_normalize and network.blocks[0].activation == "logistic"
    assert network.yolos[0].nms_kind == "default"
    assert [re.match(r"warning: a\.cfg:(\d+): ", note)[1] for note in notes] == ["7", "6", "65"]
    assert "read as 1" in notes[0] and "default is logistic" in notes[1] and "did you mean greedynms" in notes[2]


def test_only_cfg_errors_come_out_and_what_is_accepted_survives_writing():
    rng = random.Random(7)
    accepted = 0
    for _ in range(1500):
        text = mutated(rng.choice((NANO, RICH)), rng)
        try:
            network = parse(text, warn=quiet)
        except CfgError as error:
            assert re.match(r"<text>:\d+: ", str(error)) and str(error).isprintable()
            continue
        accepted += 1
        assert parse(format_network(network), warn=quiet) == network
    assert 150 < accepted < 1350  # both ways are tried
