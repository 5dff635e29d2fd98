"""The rooms of the house: data flow through them in one order, and imports go the other way only."""

import ast
from pathlib import Path

from difflt_core.engine.provenance import ROOT

PACKAGE = ROOT / "difflt_core"
# From the lowest room to the highest; a file may import from its own room and from lower ones. The
# settings and the command line lie at the root: what is there imports the standard library, pydantic
# and each other, and the engine's own path.
ROOMS = (
    "config",
    "engine",
    "data",
    "recognition",
    "generation",
    "selection",
    "experiments",
    "reporting",
    "benchmarks",
)
ROOT_FILES = {"config", "profiles", "options", "notebooks", "bootstrap", "__init__"}
LONGEST, P90 = 60, 25  # lines of a function


def room_of(module: str) -> str:
    """Of "difflt_core.engine.loop": engine; what lies at the root is the settings' room."""
    name = module.split(".")[1] if "." in module else "__init__"
    return "config" if name in ROOT_FILES else name


def imports(path: Path) -> set[str]:
    """Full names of the modules of this package that a file imports, lazily too."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            found |= {
                ".".join((*base, *(node.module or alias.name).split("."))) for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("difflt_core"):
            found.add(node.module)
    return found


def arrows() -> dict[tuple[str, str], list[str]]:
    """(from, to): the files whose imports lead from one room into another."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module in imports(path):
            there = room_of(module)
            if there != here:
                found.setdefault((here, there), []).append(str(path.relative_to(ROOT)))
    return found


def test_every_folder_is_a_room():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS) - {"config"}
    assert {p.stem for p in PACKAGE.glob("*.py")} == ROOT_FILES


def test_imports_lead_downwards():
    rank = {room: i for i, room in enumerate(ROOMS)}
    # the command line's words: `read_run` looks for a device, `notebooks` for the checkout
    allowed = {"difflt_core/options.py", "difflt_core/notebooks.py", "difflt_core/bootstrap.py"}
    upward = {
        f"{here} -> {there}": sorted(set(files) - allowed)
        for (here, there), files in arrows().items()
        if rank[here] < rank[there] and set(files) - allowed
    }
    assert not upward, f"imports that lead upwards: {upward}"
    assert len(arrows()) <= 36, f"{len(arrows())} arrows between rooms: {sorted(arrows())}"


def test_functions_are_short():
    lengths = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lengths.append((node.end_lineno - node.lineno + 1, f"{path.name}:{node.name}"))
    lengths.sort(reverse=True)
    longest = [f"{name} ({n})" for n, name in lengths if n > LONGEST]
    assert not longest, f"functions of more than {LONGEST} lines: {longest}"
    p90 = lengths[len(lengths) // 10][0]
    assert p90 <= P90, f"nine of ten functions should have at most {P90} lines, not {p90}"
