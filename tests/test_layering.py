"""Imports point down only, and what is checked before torch is imported does not import it."""

from __future__ import annotations

import ast

import pytest

TIERS = (
    ("utils.errors",),
    ("utils.device", "utils.files"),
    ("utils.cli",),
    ("utils.darknet",),
    ("utils.flags",),
    ("models",),
    ("utils.quantization",),
    ("utils.checkpoint", "utils.data", "utils.detection"),
    ("utils.report",),
    ("utils.runtime",),
    ("utils.detection.evaluate",),
    ("utils.distillation", "utils.pruning"),
    ("utils.export", "utils.quantization.workflow", "utils.training"),
    ("utils.compress",),
    ("benchmarks",),
)
"""Rooms from the bottom up. A module imports from its own room and from lower tiers; scripts import from all."""

SCRIPTS = ("utils.darknet.info", "utils.darknet.rewrite", "utils.report.__main__")
"""Command lines that live in a room; nobody imports them."""

FREE_IN = {
    "compress": ("journey", "page", "recipe"),
    "data": ("annotations", "convert", "doctor"),
    "detection": ("average_precision", "bootstrap", "settings"),
    "distillation": ("strategies",),
    "export": ("settings",),
    "pruning": ("channel_graph", "command", "policy", "target"),
    "quantization": ("scheme",),
    "report": ("plots", "run_dir", "tables"),
    "runtime": ("choice", "exported"),
    "training": ("evolve", "hyperparameters", "settings"),
}
"""Room → its modules that never import torch."""
FREE = ("darknet", "cli", "errors", "files", "flags")
"""Modules of utils/, and a whole room, that never do."""
TORCH_FREE = tuple(
    f"utils.{name}" for name in (*FREE, *(f"{room}.{name}" for room, names in FREE_IN.items() for name in names))
)

TORCH = {"torch", "torchvision"}


def room(module: str) -> str | None:
    """The most specific room a module belongs to; None for a script."""
    rooms = [name for tier in TIERS for name in tier if module == name or module.startswith(name + ".")]
    return None if module in SCRIPTS or not rooms else max(rooms, key=len)


def tier(module: str) -> int:
    """Height of a module's room; scripts are on top."""
    name = room(module)
    return len(TIERS) if name is None else next(height for height, rooms in enumerate(TIERS) if name in rooms)


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and full name of every import, whether at the top or inside a function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def allowed(importer: str, imported: str) -> bool:
    return tier(imported) < tier(importer) or (room(importer) is not None and room(imported) == room(importer))


def owned(name: str, modules: set[str]) -> str | None:
    """The project's module that an imported name is, or is defined in."""
    return next((known for known in (name, name.rpartition(".")[0]) if known in modules and known != "utils"), None)


@pytest.mark.parametrize(
    ("importer", "imported", "fine"),
    [
        ("train", "utils.training.loop", True),
        ("utils.training.loop", "utils.detection.decode", True),
        ("utils.detection.decode", "utils.detection.decode", True),
        ("utils.quantization.workflow", "utils.quantization.scheme", True),
        ("utils.quantization.scheme", "utils.quantization.workflow", False),
        ("utils.detection.decode", "utils.data.images", False),
        ("utils.darknet.cfg", "models", False),
        ("utils.darknet.info", "utils.report.tables", True),
        ("utils.darknet.cfg", "utils.darknet.info", False),
        ("utils.training.loop", "train", False),
    ],
)
def test_the_rule_itself(importer, imported, fine):
    assert allowed(importer, imported) is fine


def test_imports_point_down_only(sources):
    modules = {source.module for source in sources if not source.is_test}
    wrong = [
        f"{source.path}:{line}: imports {target}"
        for source in sources
        if not source.is_test
        for line, name in imports(source.tree)
        if (target := owned(name, modules)) and target != source.module and not allowed(source.module, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_of_utils_has_a_room(sources):
    modules = [source.module for source in sources if source.module.startswith("utils.")]
    homeless = [module for module in modules if room(module) is None and module not in SCRIPTS]
    assert not homeless, f"give them a place in TIERS: {homeless}"


def test_torch_free_rooms_never_import_torch(sources):
    wrong = [
        f"{source.path}:{line}: {name}"
        for source in sources
        if source.module.startswith(TORCH_FREE) and source.module not in SCRIPTS
        for line, name in imports(source.tree)
        if name.split(".")[0] in TORCH | {"models"}
    ]
    assert not wrong, "\n".join(wrong)


def test_loading_a_script_loads_no_torch(sources, python):
    """Flags, cfg, data files and sizes of weights are checked before the seconds that torch costs are spent."""
    scripts = [source.path for source in sources if "/" not in source.path and source.path != "models.py"]
    scripts += [source.path for source in sources if source.module.startswith(TORCH_FREE)]
    code = (
        "import importlib.util, sys\n"
        "for path in sys.argv[1:]:\n"
        "    spec = importlib.util.spec_from_file_location('loaded', path)\n"
        "    module = sys.modules['loaded'] = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        "    assert 'torch' not in sys.modules, path\n"
    )
    done = python("-c", code, *scripts)
    assert done.returncode == 0, done.stderr


def test_nobody_imports_test(sources):
    """`test` is a package of the standard library; what test.py and train.py share is in utils."""
    wrong = [
        f"{source.path}:{line}"
        for source in sources
        for line, name in imports(source.tree)
        if name.split(".")[0] == "test"
    ]
    assert not wrong, "\n".join(wrong)
