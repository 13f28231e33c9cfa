"""How the project is kept: sizes of modules and functions, nothing at import, requirements, links, ready data files."""

from __future__ import annotations

import ast
import re

import pytest
from packaging.requirements import Requirement

from utils.darknet.data_file import load_data

LONGEST_MODULE = 600
LONGEST_FUNCTION = 60
EIGHT = {"torch", "torchvision", "numpy", "opencv-python", "matplotlib", "pycocotools", "tqdm", "pyyaml"}
OPTIONAL = tuple(f"requirements-{name}.txt" for name in ("convert", "dev", "export", "openvino", "search"))
VAGUE = {"misc", "common", "helpers", "utils"}


def requirements(path):
    """Requirements of a file, without comments and references to other files."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def test_modules_and_functions_are_short(sources):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = [
        f"{source.path}: {count} lines"
        for source in sources
        if not source.is_test and (count := source.text.count("\n")) > LONGEST_MODULE
    ]
    wrong += [
        f"{source.path}:{node.lineno}: {node.name} has {count} lines"
        for source in sources
        if not source.is_test
        for node in ast.walk(source.tree)
        if isinstance(node, functions) and (count := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert not wrong, "\n".join(wrong)


def test_no_star_import_and_no_bare_except(sources):
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names))
        or (isinstance(node, ast.ExceptHandler) and node.type is None)
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_happens_at_import(sources):
    """The top of a module defines: no call, loop or assignment to somebody else's attribute.

    The exception is the hook for imports of scripts that fail, as all else comes after them.
    """

    def defines(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        if isinstance(node, ast.Assign):
            names = all(isinstance(target, ast.Name | ast.Tuple) for target in node.targets)
            return names or ast.unparse(node) == "sys.excepthook = explain"
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)
        kinds = (ast.Import, ast.ImportFrom, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return isinstance(node, kinds)

    wrong = [
        f"{source.path}:{node.lineno}: {ast.unparse(node)[:80]}"
        for source in sources
        if not source.is_test
        for node in source.tree.body
        if not defines(node)
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_are_named_for_what_they_hold(sources):
    assert [source.path for source in sources if source.module.rpartition(".")[2] in VAGUE - {source.module}] == []


def test_the_oldest_python_can_parse_it(sources):
    for source in sources:
        assert ast.parse(source.text, source.path, feature_version=(3, 10)).body


def test_the_suite_needs_eight_packages_in_open_ranges(root):
    needed = requirements(root / "requirements.txt")
    assert {requirement.name for requirement in needed} == EIGHT
    assert all(specifier.operator == ">=" for requirement in needed for specifier in requirement.specifier)


def test_the_pinned_versions_lie_in_the_ranges(root):
    ranges = {requirement.name: requirement.specifier for requirement in requirements(root / "requirements.txt")}
    for pinned in requirements(root / "constraints.txt"):
        (version,) = pinned.specifier
        assert version.operator == "=="
        assert ranges[pinned.name].contains(version.version)


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_requirements_can_be_read(name, root):
    assert requirements(root / name)


def test_clean_removes_what_make_made_and_nothing_else(root):
    recipe = (root / "Makefile").read_text(encoding="utf-8").partition("\nclean:\n")[2]
    assert recipe == "\trm -rf $(VENV) $(DEMO)\n"


def test_links_between_documents_lead_somewhere(root):
    wrong = [
        f"{page.relative_to(root)}: {link}"
        for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
        if "://" not in link and not link.startswith("mailto:") and not (page.parent / link).exists()
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "classes", "last"), [("coco2017", 80, "toothbrush"), ("voc", 20, "tvmonitor"), ("oxfordhand", 1, "hand")]
)
def test_ready_data_files_say_where_pictures_are_expected(name, classes, last, root):
    path = root / "data" / f"{name}.data"
    data = load_data(path)
    assert (data.classes, data.names[-1]) == (classes, last)
    for folder in (data.train, data.valid):
        place = folder.relative_to(path.parent).as_posix()
        assert place.startswith(f"{name}/images/")
        assert place in path.read_text(encoding="utf-8").partition("classes =")[0]


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_names_are_those_of_the_public_weights(name, root, shared):
    ours = (root / "data" / f"{name}.names").read_text(encoding="utf-8").split("\n")
    assert ours == (shared / "data" / "weights" / f"{name}.names").read_text(encoding="utf-8").split("\n")
