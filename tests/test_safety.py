"""Nothing in the project can run code from a file, start a shell, delete a tree or open a connection.

The frames of network streams are OpenCV's to fetch. Tests may serve HTTP to themselves.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

BUILTINS = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK = {
    *("socket", "socketserver", "ssl", "asyncio", "http", "ftplib", "smtplib", "telnetlib", "xmlrpc"),
    *("urllib", "urllib3", "requests", "httpx", "aiohttp", "wget", "gdown", "torch.hub", "huggingface_hub"),
}
ATTRIBUTES = {
    "os": {"system", "popen", "execv", "execve", "execvp", "execl", "execlp", "spawnl", "spawnv", "removedirs"},
    "shutil": {"rmtree"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "torch": {"hub"},
    "jit": {"load"},
}
"""Attributes that may not be named, by the name they hang on."""
ANYWHERE = {"rmtree", "extractall", "add_safe_globals", "load_state_dict_from_url", "download_url_to_file"}
"""Names that may not appear on anything."""
ONE_LOADER = "utils/checkpoint.py"

SKIPPED = {".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis"}
TEXT = {".py", ".md", ".cfg", ".data", ".names", ".toml", ".txt", ".yaml", ".yml", ".json", ".csv", ".sh", ""}
OF_A_MACHINE = re.compile(r"(?<![\w.~:/})\]-])/(?:work|root|tmp|home|Users|opt|mnt)/[\w.]")


def dotted(node: ast.AST) -> str:
    """`torch.hub.load` of an expression; empty for anything else than names and attributes."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def literal(call: ast.Call, keyword: str) -> object:
    """Value of a keyword argument: None if absent, `...` if it is computed."""
    value = next((given.value for given in call.keywords if given.arg == keyword), None)
    return None if value is None else value.value if isinstance(value, ast.Constant) else ...


def banned_imports(node: ast.AST, network: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
        return []
    banned = PICKLES | network | {f"{owner}.{name}" for owner, named in ATTRIBUTES.items() for name in named}
    return [name for name in names if any(name == module or name.startswith(module + ".") for module in banned)]


def banned_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name) and node.id in BUILTINS:
        return [node.id]
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value).split(".")[-1]
        if node.attr in ANYWHERE or node.attr in ATTRIBUTES.get(owner, ()):
            return [f"{owner}.{node.attr}"]
    return []


def banned_calls(node: ast.AST, path: str) -> list[str]:
    if not isinstance(node, ast.Call):
        return []
    found = [f"{name}=True" for name in ("shell", "allow_pickle") if literal(node, name) not in (None, False)]
    if dotted(node.func) == "torch.load":
        if literal(node, "weights_only") is not True:
            found.append("torch.load without the literal weights_only=True")
        if path != ONE_LOADER and not path.startswith(("tests/", "benchmarks/")):
            found.append(f"torch.load outside {ONE_LOADER}")
    return found


def banned(tree: ast.AST, path: str) -> list[str]:
    """What a file may not contain, as `path:line: what`."""
    network = set() if path.startswith("tests/") else NETWORK
    return [
        f"{path}:{node.lineno}: {what}"
        for node in ast.walk(tree)
        for what in (*banned_imports(node, network), *banned_names(node), *banned_calls(node, path))
    ]


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')",
        "run = exec",
        "os.system('ls')",
        "from os import system",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "import pickle",
        "from torch.serialization import add_safe_globals as a; torch.serialization.add_safe_globals([])",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import load",
        "shutil.rmtree('runs')",
        "from shutil import rmtree",
        "import urllib.request",
        "from http import client",
        "import socket",
        "np.load('a.npy', allow_pickle=True)",
        "torch.load('a.pt')",
        "torch.load('a.pt', weights_only=False)",
        "torch.load('a.pt', weights_only=safe)",
        "torch.load('a.pt', weights_only=True)",
        "torch.hub.load('a/b', 'c')",
        "torch.jit.load('a.pt')",
        "zipfile.ZipFile('a').extractall()",
    ],
)
def test_what_is_banned_is_found(code):
    assert banned(ast.parse(code), "utils/other.py")


def test_what_is_harmless_is_left():
    assert banned(ast.parse("torch.load('a.pt', weights_only=True)"), ONE_LOADER) == []
    assert banned(ast.parse("import http.server"), "tests/test_sources.py") == []
    harmless = "yaml.safe_load(text), np.load('a', allow_pickle=False), run(['ls']), model.eval(), re.compile('a')"
    assert banned(ast.parse(harmless), "utils/other.py") == []


def test_the_project_has_nothing_banned(sources):
    wrong = [what for source in sources for what in banned(source.tree, source.path)]
    assert not wrong, "\n".join(wrong)


def text_files(folder: Path) -> list[Path]:
    """Files of the project that people write; generated and ignored folders left out."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED and not (folder.name == "data" and path.name != "samples"):
            found += text_files(path)
        elif path.is_file() and path.suffix in TEXT and path.name != ".git":
            found.append(path)
    return found


def test_no_file_names_a_place_on_one_machine(root):
    wrong = [
        f"{path.relative_to(root)}:{line}: {text.strip()[:80]}"
        for path in text_files(root)
        for line, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if OF_A_MACHINE.search(text)
    ]
    assert not wrong, "\n".join(wrong)
