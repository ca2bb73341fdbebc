"""The house: imports go strictly downward, and what needs no torch does not wait for it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gm_probe

ROOT = Path(gm_probe.__file__).parent
BELOW = {
    "errors": set(),
    "checks": {"errors"},
    "setting": {"checks"},
    "runtime": {"errors"},
    "files": {"errors"},
    "runs": {"errors", "files"},
    "data": {"setting", "runtime", "files"},
    "models": {"data", "runs"},
    "linalg": {"checks"},
    "inconsistency": {"models", "linalg"},
    "curvature": {"inconsistency"},
    "measures": {"curvature"},
    "training": {"measures"},
    "optim": {"training"},
    "executors": {"runtime", "runs"},
    "measuring": {"training", "executors"},
    "accuracy": {"measuring"},
    "sweep": {"measuring"},
    "tables": {"measures", "runs"},
    "analysis": {"tables"},
    "reproduce": {"sweep", "analysis"},
    "cli": {"reproduce", "accuracy"},
    "__main__": {"cli"},
}
"""The rooms of the house, and those directly below each; what is below these is below it, too."""


def below(room: str) -> set[str]:
    """Return every room that ``room`` may import from."""
    return BELOW[room].union(*map(below, BELOW[room]))


FILES = sorted(ROOT.rglob("*.py"))
WITHOUT_TORCH = [
    "gm_probe",
    "gm_probe.errors",
    "gm_probe.files.atomic",
    "gm_probe.files.locks",
    "gm_probe.runs.records",
    *(f"gm_probe.measures.{name}" for name in ("catalogue", "costs", "names", "settings")),
    "gm_probe.reproduce.catalogue",
    *(
        f"gm_probe.{room}.{path.stem}"
        for room in ("tables", "analysis")
        for path in sorted((ROOT / room).glob("[!_]*.py"))
    ),
    *(f"gm_probe.cli.{path.stem}" for path in sorted((ROOT / "cli").glob("[!_]*.py"))),
    "gm_probe.cli",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that ``path`` imports, wherever in the file, and the line."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import name` may name a module: both are looked at
            yield stem, node.lineno
            yield from ((f"{stem}.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_strictly_downward(path: Path) -> None:
    room = module_name(path).split(".")[1:2]
    if not room:
        return  # the public API looks at every room, lazily (below)
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] != "gm_probe":
            continue
        assert len(parts) > 1, f"{path}:{line} imports the public API from inside"
        if parts[1] in BELOW:
            assert parts[1] == room[0] or parts[1] in below(room[0]), f"{path}:{line} imports {name}"


def test_every_room_has_its_place() -> None:
    rooms = {module_name(path).split(".")[1] for path in FILES if path != ROOT / "__init__.py"}
    assert rooms == set(BELOW)
    for room in BELOW:
        assert room not in below(room), f"{room} is below itself"


def test_no_import_cycle() -> None:
    modules = {module_name(path): path for path in FILES}
    under = {
        name: {found for found, _ in imports(path) if found in modules and found != name}
        for name, path in modules.items()
        if name not in ("gm_probe", "gm_probe.cli")  # their imports are lazy
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name in done:
            return
        for other in sorted(under.get(name, ())):
            visit(other, (*above, name))
        done.add(name)

    for name in under:
        visit(name, ())
    assert done == set(under) | {other for others in under.values() for other in others}


def test_tables_and_analysis_name_no_torch_and_tables_no_scipy() -> None:
    for path in [*(ROOT / "tables").glob("*.py"), *(ROOT / "analysis").glob("*.py")]:
        heavy = {"torch", "torchvision", "timm", *(["scipy"] if path.parent.name == "tables" else [])}
        for name, line in imports(path):
            assert name.split(".")[0] not in heavy, f"{path}:{line}"


def test_what_needs_no_torch_does_not_import_it() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {WITHOUT_TORCH!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'torchvision', 'sklearn', 'timm'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


def test_importing_the_sweep_waits_for_no_torchvision() -> None:
    code = (
        "import sys, gm_probe.sweep.runner\nassert not {'torchvision', 'sklearn', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr


# ---- the public API


@pytest.mark.parametrize("name", gm_probe.__all__)
def test_public_names_resolve_to_their_home(name: str) -> None:
    value = getattr(gm_probe, name)
    home = importlib.import_module(f"gm_probe.{gm_probe._HOME_OF[name]}")
    assert value is getattr(home, name)
    if getattr(value, "__module__", "").startswith("gm_probe."):
        assert value.__module__ == home.__name__, f"{name} is only passing through {home.__name__}"
        assert value.__doc__, f"{name} has no docstring"


def test_typed_and_lazy_exports_agree() -> None:
    tree = ast.parse(Path(gm_probe.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    typed = set()
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, (
                f"{alias.name}: `as {alias.name}` re-exports it to type checkers"
            )
            typed.add((node.module, alias.name))
    lazy = {(f"gm_probe.{home}", name) for name, home in gm_probe._HOME_OF.items()}
    assert typed == lazy
    assert set(gm_probe.__all__) <= set(dir(gm_probe))


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'gm_probe' has no attribute 'mesure'"):
        _ = gm_probe.mesure
    assert not hasattr(gm_probe, "torch")
