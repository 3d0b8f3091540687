"""The import layers hold: what may import what, read off the source, and what a bare import brings in."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rlsearch"

# For each part of the package: the parts of ours it may import, and the heavy packages it may import.
BASE = {"errors", "config", "files", "yaml_file", "policy", "_version"}
LAYERS: dict[str, tuple[set[str], set[str]]] = {
    "_version": (set(), set()),
    "errors": (set(), set()),
    "config": ({"errors"}, set()),
    "files": ({"errors"}, set()),
    "yaml_file": ({"errors"}, set()),
    "policy": ({"errors", "config", "files"}, set()),
    "model_graph": (BASE, {"torch"}),
    "replacement": (BASE | {"model_graph", "replacement"}, {"torch"}),
    "learn_drop": (BASE | {"model_graph", "replacement", "learn_drop"}, {"torch"}),
    "training": (
        BASE | {"model_graph", "replacement", "learn_drop", "training"},
        {"torch", "torchvision", "sklearn", "filelock"},
    ),
    "results": (BASE | {"results"}, {"tensorboard", "moocore", "plotly", "matplotlib"}),
    "run_lock": ({"errors", "files"}, {"filelock"}),
    "storage": (set(), set()),
    "search": (
        BASE | {"model_graph", "replacement", "training", "results", "run_lock", "storage", "search"},
        {"torch", "ray", "optuna"},
    ),
    "export": (BASE | {"replacement", "training", "results"}, {"torch"}),
    "confirm": (BASE | {"training", "results", "run_lock", "export"}, {"torch"}),
}
# `Policy.preset` hands over to what makes it, inside the method; torch it names for the type checker alone.
EXCEPTIONS = {("policy.py", "rlsearch.replacement.presets"), ("policy.py", "torch")}
HEAVY = {
    "torch",
    "torchvision",
    "sklearn",
    "ray",
    "optuna",
    "filelock",
    "tensorboard",
    "moocore",
    "plotly",
    "matplotlib",
}


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every dotted name that the file imports, at its top or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "rlsearch" else {node.module}
            )
    return {name for name in names if name}


def files_of(part: str) -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if part_of(path) == part]


def test_every_part_has_its_layer() -> None:
    parts = {part_of(path) for path in PACKAGE.rglob("*.py")}
    # The command line and the package's own front door may import everything.
    assert parts - {"cli", "__init__", "__main__"} == set(LAYERS)


@pytest.mark.parametrize("part", sorted(LAYERS))
def test_imports_point_down_only(part: str) -> None:
    ours, heavy = LAYERS[part]
    for path in files_of(part):
        for name in sorted(imported(path)):
            if (path.name, name) in EXCEPTIONS:
                continue
            top, _, rest = name.partition(".")
            if top == "rlsearch":
                assert rest.split(".")[0] in ours, f"{path.name} imports {name}"
            elif top in HEAVY:
                assert top in heavy, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("rlsearch", {"torch", "ray", "optuna"}),
        ("rlsearch.policy", {"torch", "ray", "optuna"}),
        ("rlsearch.results", {"torch", "ray", "optuna"}),
        ("rlsearch.cli", {"torch", "ray", "optuna", "plotly"}),
        ("rlsearch.training.trial", {"ray", "optuna", "moocore", "plotly"}),
    ],
)
def test_a_bare_import_stays_light(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(sorted({forbidden!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
