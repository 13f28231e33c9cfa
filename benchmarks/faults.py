"""Stopped scripts, full disks, damaged and hostile files, random input of all readers: how often all ends well.

A trial is good if the script ends in time with an exit status of docs/architecture.md and one line, writes nothing
outside its run directory and leaves no process; if what it wrote can be read; and if the next run gives what an
undisturbed one gives, bit for bit. Input that failed is kept in runs/faults/. The rules are in faults.yaml. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.mutations import damaged, hostile_bytes, random_bytes, rules
from utils.checkpoint import read_checkpoint
from utils.cli import Parser, log, number, random_seed, run
from utils.darknet.cfg import format_network, load
from utils.errors import InputError, SuiteError
from utils.files import atomic_write_bytes, atomic_write_text, read_json, sha256
from utils.report import plots
from utils.report.tables import markdown_table
from utils.runtime.exported import read_onnx

EXAMPLE = "python -m benchmarks.faults --hours 2 --seed 1 --json runs/faults/faults.json"
KEPT, MOST = Path("runs/faults"), 20
"""Folder of the input that failed, and how much is kept of one kind and seed."""
PATIENCE, LONG = 120.0, 600.0
"""Seconds after which a script hangs: one that reads a damaged file, and one that nothing hinders."""
LEFT = 7.0
"""Seconds until the processes that a script has started end after it."""
MOST_MEMORY = 1 << 34
"""Bytes of addresses that a script may take."""
SLICE = 10.0
"""Seconds of random input at a time."""
FRESH = 0.03
"""Share of scripts that run in a new interpreter. Others are forked from this one, which has imported all they need."""
STATUSES = (0, 2, 3, 4, 5, 6)
"""Of scripts that nobody stopped."""
FREE = ("runs", "new", "tmp", "cache", "output")
"""Where a script may write."""


class Outcome(NamedTuple):
    """The end of one trial, or of many that ended well."""

    kind: str
    """Row of the table."""
    problem: str = ""
    """What is wrong; empty: nothing."""
    evidence: Mapping[str, bytes] = {}
    """Content of files to keep, by name."""
    count: int = 1


def work(words: Sequence[str], folder: Path) -> None:
    """Run a script in a folder, in a session of its own, with its output in the file `output` there.

    The script is imported inside `run`: the hook that answers a stop during imports is not called in a child process.
    """
    os.setsid()
    os.chdir(folder)
    home = f"{folder}/cache"
    os.environ.update(TRIAL=str(folder), TMPDIR=f"{folder}/tmp", HOME=home, XDG_CACHE_HOME=home)
    tempfile.tempdir = None
    sys.stdout = sys.stderr = open("output", "a", buffering=1)  # noqa: SIM115 - until the process ends
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    sys.argv[:] = words[words[0] == "-m" :]
    if words[0] == "-m":
        run(lambda: named(f"{words[1]}:main")())
    run(lambda: named("compress:script_module")(words[0].removesuffix(".py")).main())


class Script:
    """A script at work in a folder: its name or -m and its module, and its flags."""

    def __init__(self, command: str, folder: Path, method: str = "fork") -> None:
        self.command, self.output, self.mark = command, folder / "output", f"TRIAL={folder}".encode()
        self.process: Any = multiprocessing.get_context(method).Process(target=work, args=(command.split(), folder))
        self.process.start()

    def problem(self, *allowed: int, seconds: float = LONG) -> str:
        """Wait for the end, and return what is wrong with it."""
        self.process.join(seconds)
        status, end = self.process.exitcode, time.monotonic() + LEFT
        while (left := self.alive()) and status is not None and time.monotonic() < end:
            time.sleep(0.1)
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        output = self.output.read_text(errors="replace") if self.output.exists() else ""
        errors = sum(line.startswith("error: ") for line in output.splitlines())
        stages = self.command.startswith("compress.py")  # it names the stage that has failed with a line of its own
        lines = range(1, 2 + stages) if status in STATUSES[1:] else range(1)
        sound = "Traceback" not in output and status in allowed and errors in lines
        end = "hangs" if status is None else f"status {status}, {errors} errors, {len(left)} processes are left"
        return "" if sound and not left else f"{self.command}: {end}: {output[-3000:]}"

    def alive(self) -> list[int]:
        """Processes of its session, and those that it has started with its environment."""
        alive = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                if session == str(self.process.pid) or self.mark in (path / "environ").read_bytes():
                    alive += [int(path.name)] * (state not in "ZX")
        return alive


class Bench:
    """A folder with small files of every kind, of which each trial gets a copy."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.base, self.rng, self.seed = folder, folder / "base", Random(seed), seed
        self.undisturbed: dict[str, tuple[float, dict[str, str]]] = {}
        for name in rules()["imported"].split():
            with suppress(ImportError):
                import_module(name)
        plots.save = lambda _, path: atomic_write_bytes(path, b"")  # drawing would take half of the time
        for name, text in rules()["texts"].items():
            (self.base / name).parent.mkdir(parents=True, exist_ok=True)
            (self.base / name).write_text(text)
        for command in rules()["made"]:
            check(command, self.base)
        for command in {command: file for file in rules()["read"].values() for command in file["by"]}:
            with self.trial() as folder:  # what ends badly anyway would hide what damage does
                check(command, folder)

    @contextmanager
    def trial(self) -> Iterator[Path]:
        """A copy of the files."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            ignored = shutil.ignore_patterns("output", "random")
            yield Path(shutil.copytree(self.base, folder, dirs_exist_ok=True, ignore=ignored))

    def start(self, command: str, folder: Path) -> Script:
        """A script at work in a folder."""
        return Script(command, folder, "spawn" if self.rng.random() < FRESH else "fork")


def check(command: str, folder: Path) -> None:
    """Run a script that nothing disturbs."""
    if problem := Script(command, folder).problem(0):
        raise InputError(problem)


# Scripts that are stopped


def stop(bench: Bench, full: bool) -> list[Outcome]:
    """Stop a script by a signal or a full disk, and run it again to its end."""
    scripts, rng = rules()["stopped"], bench.rng
    name = rng.choice([*scripts, *["train.py"] * 8])
    command = f"{name} {rng.choice(scripts[name])} --project new --name a"
    if command not in bench.undisturbed:
        with bench.trial() as folder:
            start = time.monotonic()
            check(command, folder)
            bench.undisturbed[command] = time.monotonic() - start, products(folder / "new")
    seconds, expected = bench.undisturbed[command]
    with bench.trial() as folder, disk(folder / "new", rng.randrange(1 << 14, 1 << 20) if full else 0) as enlarge:
        script = bench.start(command, folder)
        sign = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        if not full:
            while script.process.is_alive() and not script.output.exists():  # it is not yet what a user would stop
                time.sleep(0.01)
            script.process.join(rng.uniform(0.2, seconds))
            with suppress(ProcessLookupError):  # it has ended
                rng.choice((os.kill, os.killpg))(script.process.pid, sign)
        problem = script.problem(0, *((2, 5) if full else (-sign, 128 + sign)))
        enlarge()
        (folder / "output").unlink(missing_ok=True)
        resumed = name == "train.py" and (folder / "new/a/weights/last.pt").exists()
        again = "train.py --resume new/a" if resumed else command + " --exist-ok" * (name != "compress.py")
        try:
            products(folder / "new")
            problem = problem or bench.start(again, folder).problem(0)
            differing = sorted(path for path, _ in expected.items() ^ products(folder / "new").items())
            problem = problem or f"{command}; {again}: other {differing}" * bool(differing)
        except SuiteError as failure:
            problem = problem or f"{command}: leaves {failure}"
    return [Outcome(f"{name}: {'full disk' if full else sign.name}{', resumed' * resumed}", problem)]


@contextmanager
def disk(folder: Path, room: int) -> Iterator[Callable[[], object]]:
    """A small disk on a folder, or where none may be mounted small files only; gives what ends it. Room 0: neither."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "faults", folder, "-o", f"size={room}"]
    mounted = room and not subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room if room and not mounted else most[0], most[1]))

    def enlarge() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True)

    try:
        yield enlarge
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def products(folder: Path) -> dict[str, str]:
    """Content of each network in a folder, by its file; all files have to be readable."""
    readers: dict[str, Callable[[Path], object]] = {".pt": tensors, ".cfg": lambda path: format_network(load(path))}
    readers |= {".json": lambda path: read_json(path) and 0, ".onnx": lambda path: read_onnx(path) and sha256(path)}
    readers |= dict.fromkeys((".weights", ".tflite", ".bin"), sha256)
    files = [path for path in sorted(folder.rglob("[!.]*")) if path.suffix in readers]
    contents = {str(path.relative_to(folder)): str(readers[path.suffix](path)) for path in files}
    return {path: content for path, content in contents.items() if not path.endswith("prev.pt")}  # a stop adds one


def tensors(path: Path) -> str:
    """All numbers of a checkpoint that decide how a training goes on."""
    checkpoint = read_checkpoint(path)
    states = [checkpoint.get(name) for name in ("model", "ema", "optimizer")]
    return json.dumps(states, default=lambda tensor: tensor.numpy().tobytes().hex())


# Damaged and hostile files


def read(bench: Bench, hostile: bool) -> list[Outcome]:
    """Let a script read a file that is damaged, or made to harm."""
    files, rng = rules()["read"], bench.rng
    name = rng.choice([name for name in files if "kind" in files[name] or not hostile])
    source, kind = rng.choice(sorted(bench.base.glob(name))), files[name].get("kind", "")
    data = hostile_bytes(source.read_bytes(), kind, rng) if hostile else damaged(source.read_bytes(), rng)
    with bench.trial() as folder:
        (folder / source.relative_to(bench.base)).write_bytes(data)
        before = untouchable(folder)
        problem = bench.start(rng.choice(files[name]["by"]), folder).problem(*STATUSES, seconds=PATIENCE)
        if changes := untouchable(folder) ^ before:
            problem = problem or f"changes {sorted(changes)[:4]}"
    return [Outcome(f"hostile: {kind}" if hostile else f"damaged: {source.suffix}", problem, {source.name: data})]


def untouchable(folder: Path) -> set[tuple[str, int]]:
    """Path and time of each file that no script may change, and of each that lies beside the folder."""
    files = [path for path in folder.rglob("*") if path.relative_to(folder).parts[0] not in FREE and not path.is_dir()]
    return {(str(path), path.lstat().st_mtime_ns) for path in files} | {(name, 0) for name in os.listdir(folder.parent)}


# Random input


def named(text: Any) -> Any:
    """What MODULE:NAME means; anything else is a value."""
    module, colon, name = str(text).partition(":")
    return getattr(import_module(module), name) if colon else text


def feed(bench: Bench) -> list[Outcome]:
    """Give random input to all readers for some seconds, in a process of its own."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_feed, args=(bench.base, bench.rng.random(), sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SLICE + PATIENCE) else [_end(bench)]
    except EOFError:
        return [_end(bench)]
    finally:
        process.kill()
        process.join()


def _end(bench: Bench) -> Outcome:
    path = max(bench.base.glob("random/*/*"), key=lambda path: path.stat().st_mtime_ns)
    return Outcome(f"random: {path.parent.name}", "ends the process, or hangs", {path.name: path.read_bytes()})


def _feed(base: Path, seed: float, sender: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    rng, end, outcomes, counts = Random(seed), time.monotonic() + SLICE, [], Counter[str]()
    while time.monotonic() < end:
        for name, (function, file, turns, *arguments) in rules()["readers"].items():
            whole, path, reader = (base / file).read_bytes(), base / "random" / name / Path(file).name, named(function)
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(turns):
                path.write_bytes(data := random_bytes(whole, rng))
                counts[name] += 1
                try:
                    reader(path, *map(named, arguments))
                except SuiteError:
                    pass
                except Exception:
                    outcomes.append(Outcome(f"random: {name}", traceback.format_exc(), {path.name: data}, 0))
    sender.send([*outcomes, *(Outcome(f"random: {name}", count=count) for name, count in counts.items())])


CLASSES: dict[str, tuple[float, Callable[[Bench], list[Outcome]]]] = {
    "kills": (0.5, partial(stop, full=False)),
    "disks": (0.02, partial(stop, full=True)),
    "damage": (0.25, partial(read, hostile=False)),
    "hostile": (0.08, partial(read, hostile=True)),
    "random": (0.15, feed),
}
"""Share of the time, and trials."""


def main(argv: Sequence[str] | None = None) -> None:
    """Try until the time is over; the exit status is 1 if anything failed."""
    parser = Parser(__doc__, EXAMPLE, "python -m benchmarks.faults")
    parser.add_argument("--hours", type=number, default=1.0, metavar="H", help="time to try (default: %(default)s)")
    parser.add_argument("--seed", type=random_seed, default=0, metavar="N", help="other trials (default: %(default)s)")
    parser.add_argument("--only", choices=CLASSES, help="one class of trials (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="counts, to which those of later runs are added")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    document = read_json(args.json) if args.json and args.json.exists() else {"hours": 0.0, "kinds": {}}
    with tempfile.TemporaryDirectory() as folder:
        failed = attempt(Bench(Path(folder), args.seed), args, document)
    lines = [[kind, *counts] for kind, counts in sorted(document["kinds"].items())]
    print(markdown_table(["what", "tried", "good"], lines))
    sys.exit(failed)


def attempt(bench: Bench, args: argparse.Namespace, document: dict[str, Any]) -> bool:
    """Trials of all classes in turn, counted in the document; returns whether one failed."""
    spent = dict.fromkeys([args.only] if args.only else CLASSES, 0.0)
    start, before, failed = time.monotonic(), document["hours"], False
    while time.monotonic() < start + 3600 * args.hours or not all(spent.values()):
        name = min(spent, key=lambda name: spent[name] / CLASSES[name][0])
        begun = time.monotonic()
        for kind, problem, evidence, count in CLASSES[name][1](bench):
            tried, good = document["kinds"].get(kind, (0, 0))
            document["kinds"][kind] = tried + count, good + count - bool(problem)
            if problem:
                failed, folder = True, KEPT / re.sub(r"\W+", "-", f"{kind} {bench.seed} {(tried - good) % MOST}")
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "problem.txt").write_text(problem, errors="replace")
                for file, data in evidence.items():
                    (folder / file).write_bytes(data)
                log(f"{folder}: {problem.strip().splitlines()[-1][:300]}")
        spent[name] += time.monotonic() - begun
        document["hours"] = before + (time.monotonic() - start) / 3600
        if args.json:
            atomic_write_text(args.json, json.dumps(document, indent=1) + "\n")
    return failed


if __name__ == "__main__":
    run(main)
