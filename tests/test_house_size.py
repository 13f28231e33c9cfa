"""The size of the house: what it may have at most, measured and held."""

from __future__ import annotations

import ast
import io
import os
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import slim_prune
import train
from tests.test_layering import SCRIPTS, imports, owned
from utils.training import loop

LIMITS = {
    "code lines of scripts, models.py, utils/": 18_324,
    "modules in utils/": 95,
    "code lines of benchmarks/": 1_837,
    "code lines of tests/": 17_280,
    "files that run in slim_prune.py --no-test": 26,
    "files that run in one training step": 13,
    "class names used twice": 0,
    "folders in a cycle of imports": 0,
    "flags of train.py": 55,
    "README lines": 200,
    "fmt: skip": 0,
    "lines of the median function": 10,
}
"""What is measured, and the most that is allowed. docs/architecture.md has the table."""


def code_lines(text: str) -> int:
    """Count the lines that hold code: no blanks, comments or docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        for child in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                docstrings |= set(range(child.lineno, child.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def room(path: str) -> str:
    """Return tests, benchmarks or product."""
    folder = path.split("/")[0]
    return folder if folder in ("tests", "benchmarks") else "product"


def cycles(sources) -> list[str]:
    """Return the folders of utils/ that import themselves through another, at run time or for type checking."""
    modules = {source.module for source in sources if not source.is_test}
    imported = defaultdict(set)
    for source in sources:
        for _, name in imports(source.tree):
            target = owned(name, modules)
            if target and is_room(source) and target.count(".") > 1 and source.module not in SCRIPTS:
                imported[folder(source.module)].add(folder(target))
    reached = {start: set(targets) - {start} for start, targets in imported.items()}
    for _ in reached:
        for start, targets in reached.items():
            reached[start] = targets.union(*(reached.get(target, set()) for target in targets))
    return [start for start, targets in reached.items() if start in targets]


def is_room(source) -> bool:
    """Whether a file is in a folder of utils/."""
    return source.path.startswith("utils/") and source.path.count("/") > 1


def folder(module: str) -> str:
    """Return the folder of a module in utils."""
    return module.split(".")[1]


@pytest.fixture(scope="module")
def measured(sources, root):
    """What can be read off the files."""
    lines = Counter()
    for source in sources:
        lines[room(source.path)] += code_lines(source.text)
    ours = [source for source in sources if not source.is_test]
    nodes = [node for source in ours for node in ast.walk(source.tree)]
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    flags = set(train.make_parser()._option_string_actions.values())
    return {
        "code lines of scripts, models.py, utils/": lines["product"],
        "modules in utils/": sum(source.module.startswith("utils") for source in ours),
        "code lines of benchmarks/": lines["benchmarks"],
        "code lines of tests/": lines["tests"],
        "class names used twice": sum(count > 1 for count in classes.values()),
        "folders in a cycle of imports": len(cycles(sources)),
        "flags of train.py": len(flags) - len(("help", "version", "debug")),
        "README lines": (root / "README.md").read_text(encoding="utf-8").count("\n"),
        "fmt: skip": sum(source.text.count("# fmt" + ": skip") for source in sources),
        "lines of the median function": statistics.median(
            node.end_lineno - node.body[0].lineno + 1 for node in functions
        ),
    }


@pytest.mark.parametrize("name", [name for name in LIMITS if not name.startswith("files that run")])
def test_the_house_stays_small(measured, name):
    assert measured[name] <= LIMITS[name]


def files_that_run(root: Path, call) -> set[str]:
    """Return the files of this repository with a function that runs in a call."""
    seen = set()

    def note(frame, event, _):
        if event == "call":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    ours = {os.path.relpath(name, root) for name in seen if name.startswith(f"{root}{os.sep}")}
    return {name for name in ours if not name.startswith((".venv", "tests"))}


def test_few_files_run_in_a_training_step(run, folder, root, monkeypatch):
    """The second of two batches, with all that a step may have: sparse training, distillation and quantization."""
    owner = next(kind for kind in vars(loop).values() if hasattr(kind, "train_batch"))
    step, names = owner.train_batch, []

    def profiled(*args):
        result = []
        names.append(files_that_run(root, lambda: result.append(step(*args))))
        return result[0]

    teacher = run("--epochs", "1", "--notest")["last"]
    monkeypatch.setattr(owner, "train_batch", profiled)
    run("--epochs", "1", "--notest", "-sr", "--s", "0.001", "--prune", "1", "--t_weights", teacher, "--quantized", "1")
    assert len(names[-1]) <= LIMITS["files that run in one training step"], "\n".join(sorted(names[-1]))


def test_few_files_run_in_a_pruning(files, root, tmp_path, capsys):
    """From the command line to the written cfg."""
    flags = [*files, "--percent", "0.3", "--no-test", "--project", str(tmp_path / "runs"), "--device", "cpu"]
    names = files_that_run(root, lambda: slim_prune.main(flags))
    capsys.readouterr()
    assert len(names) <= LIMITS["files that run in slim_prune.py --no-test"], "\n".join(sorted(names))
