"""The rules of the package's structure: rooms, directions of imports, sizes, and one home for the names of files."""

import ast
import functools
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from anomalib_lite.runs import folder
from tests.helpers.run_programs import ROOT

PACKAGE = ROOT / "anomalib_lite"
#: Rooms from the bottom to the top. A module imports from its own room and from lower ones. Rooms in one row are
#: independent of each other.
ROOMS = [
    {"errors", "paths", "console"},
    {"cli"},
    {"data"},
    {"features"},
    {"methods"},
    {"metrics"},
    {"runs"},
    {"tracking", "comparison", "exporting"},
    {"sweeps"},
    {"train", "evaluate", "predict", "compare", "splits", "export"},
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(path for folder_ in (PACKAGE, ROOT / "hydra_plugins") for path in folder_.rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Everything that a file's syntax tree holds."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything that a file imports from the package, wherever in the file."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anomalib_lite"):
            found |= {(node.module or "", alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.startswith("anomalib_lite")}
    return found


def target(module: str, name: str) -> str:
    """The module that `from module import name` reads."""
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_point_down():
    upward = []
    for module, path in MODULES.items():
        if room(module) not in LEVEL:
            continue
        for source, name in imports(path):
            other = room(target(source, name))
            same_level = other in LEVEL and LEVEL[other] == LEVEL[room(module)] and other != room(module)
            is_base = LEVEL[room(module)] == 0
            if other in LEVEL and (LEVEL[other] > LEVEL[room(module)] or (same_level and not is_base)):
                upward.append(f"{module} imports {target(source, name)}")
    # the sweep's server preloads the train program, and its jobs run it
    allowed = {
        "anomalib_lite.sweeps.forks imports anomalib_lite.train",
        "anomalib_lite.sweeps.preload imports anomalib_lite.train",
    }
    assert sorted(set(upward) - allowed) == []


def test_imports_have_no_circle():
    edges = {
        module: {target(*each) for each in imports(path)} & MODULES.keys() - {module, "anomalib_lite"}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for other in edges[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def test_experiments_import_names_that_exist():
    missing = [
        f"{path.name}: {module}.{name}"
        for path in sorted((ROOT / "experiments").glob("*.py"))
        for module, name in imports(path)
        if not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []


def test_no_private_name_of_another_module():
    private = [
        f"{module}: {source}.{name}"
        for module, path in MODULES.items()
        for source, name in imports(path)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert private == []


def test_sizes():
    assert len(list(PACKAGE.glob("*.py"))) <= 10
    long = [f"{path.relative_to(ROOT)}: {n}" for path in FILES if (n := len(path.read_text().splitlines())) > 280]
    assert long == []
    functions = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 70
    ]
    assert functions == []


@pytest.mark.parametrize("name", ["RESULT", "SCORES", "MAPS", "METRICS_LOG", "CHECKPOINTS", "last.ckpt", "config.json"])
def test_names_of_a_runs_files_have_one_home(name):
    """As string literals; docstrings, comments and messages may mention them."""
    literal = getattr(folder, name, name)
    homes = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Constant) and node.value == literal
    }
    assert homes == {"anomalib_lite/runs/folder.py"}


#: what the project's top level holds
TOP = {
    "anomalib_lite", "conf", "experiments", "hydra_plugins", "tests", "pyproject.toml", "constraints.txt", "Makefile",
    "README.md", "LICENSE", ".ci", ".gitignore",
}  # fmt: skip


def test_nothing_else_was_committed():
    """A test once wrote a folder named `"` into the checkout."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this checkout is no git repository")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.partition("/")[0] for name in listed.split("\0") if name} - TOP == set()


#: packages whose module has another name
NAMES = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "hydra": "hydra-core", "yaml": "pyyaml",
}  # fmt: skip


def test_declared_packages_are_the_imported_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [
        line for extra in ("sweep", "optuna", "ltad", "export") for line in project["optional-dependencies"][extra]
    ]
    declared = {re.split(r"[><=;! ]", line)[0] for line in [*project["dependencies"], *optional]}
    imported = set()
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    imported = {NAMES.get(name, name) for name in imported - sys.stdlib_module_names - {"anomalib_lite"}}
    # submitit and ray are imported by name where a launcher needs them
    assert declared - {"submitit", "ray"} == imported
