"""The notebooks, and what a call of ./run_all.sh would run. In the standard library alone, so that it
answers before any package is installed."""

import ast
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .engine.provenance import ROOT, cache_folder
from .profiles import DISK_GB, PARAMETERS, setting_path, unknown

__all__ = [
    "Notebook",
    "UsageError",
    "find_notebooks",
    "listing",
    "local_parameters",
    "plan_run",
    "show_plan",
]

_COMMON = ("profile", "device", "out", "data_dir", "overrides")  # options of their own, or none


class UsageError(Exception):
    """Wrong arguments: exit status 2."""


@dataclass(frozen=True)
class Notebook:
    path: Path

    @property
    def number(self) -> str:
        return self.path.name[:2]

    @property
    def content(self) -> dict:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @property
    def parameters(self) -> list[str]:
        """Names assigned in the cell tagged `parameters`."""
        for cell in self.content["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                tree = ast.parse("".join(cell["source"]))
                targets = (t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets)
                return [t.id for t in targets if isinstance(t, ast.Name)]
        return []

    @property
    def items(self) -> list[str]:
        return self.content["metadata"]["difflt"]["items"]

    def arguments(self, values: dict) -> dict:
        """Chosen values as papermill takes them: settings without a parameter of their own go into
        `overrides`; what only other notebooks have is left out."""
        own = {name: v for name, v in values.items() if name in self.parameters}
        rest = {n: v for n, v in values.items() if n not in own and setting_path(n)}
        return own | ({"overrides": rest} if rest else {})

    def runs_by_default(self, profile: str) -> bool:
        """Whether ./run_all.sh runs it without --only: not where its time is not measured yet."""
        return profile not in self.content["metadata"]["difflt"].get("not_in", [])

    def minutes(self, profile: str) -> str:
        return self.content["metadata"]["difflt"]["minutes"].get(profile, "?")


def find_notebooks() -> list[Notebook]:
    return [Notebook(p) for p in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))]


def local_parameters() -> dict[str, list[str]]:
    """Parameters that are no setting of a run, by name: the numbers of the notebooks that have it."""
    found: dict[str, list[str]] = {}
    for n in find_notebooks():
        for name in n.parameters:
            if name not in PARAMETERS and name not in _COMMON:
                found.setdefault(name, []).append(n.number)
    return found


def asked_for(options) -> list[str]:
    """Numbers of notebooks: those of --only, or those that the profile runs."""
    return options.only or [
        n.number for n in find_notebooks() if n.runs_by_default(options.profile)
    ]


def plan_run(options, values: dict | None = None) -> list[tuple[Notebook, dict]]:
    """The notebooks that a command line asks for, and their parameters, after every check that needs
    no package.

    Args:
        values: of the parameters; None is their text, as it was given.

    Raises:
        UsageError: no such notebook or parameter. OSError: a folder or disk that will not do.
    """
    known, numbers = find_notebooks(), asked_for(options)
    missing = [n for n in numbers if n not in {k.number for k in known}]
    if missing:
        raise UsageError(
            f"no notebook {missing[0]}; there are {', '.join(n.path.stem for n in known)}"
        )
    chosen, given = [n for n in known if n.number in numbers], dict(options.parameters)
    local = local_parameters()
    for name in given:
        if not setting_path(name) and name not in local:
            raise UsageError(unknown("parameter", name, [*PARAMETERS, *local]))
        if not set(local.get(name, numbers)) & set(numbers):
            where = " or ".join(local[name])
            raise UsageError(f"{name} is a parameter of notebook {where}, which does not run")
    if options.hours and [n.number for n in chosen] != ["12"]:  # whose trainings are counted
        raise UsageError(
            "--hours: fits the trainings of notebook 12 into them; expected --profile folder or --only 12, "
            f"got {', '.join(n.number for n in chosen)}. Of others set the lengths (--set "
            "n_diffusion_steps=...)"
        )
    out, data_dir = (options.out or ROOT).resolve(), (options.data_dir or ROOT / "data").resolve()
    for folder in (out / "figures" / options.profile, out / "runs" / options.profile):
        _check_writable(folder, make=not options.dry_run)
    cache = cache_folder(out)  # options.set_environment has told it of --cache
    free_gb = shutil.disk_usage(_existing(cache)).free / 1e9
    if free_gb < DISK_GB[options.profile]:
        raise OSError(
            f"{free_gb:.2f} GB free in {cache}, but profile {options.profile} needs "
            f"{DISK_GB[options.profile]} GB; free some space or choose another --out or --cache"
        )
    common = {
        "profile": options.profile,
        "device": options.device,
        "out": str(out),
        "data_dir": str(data_dir),
    }
    return [(n, common | n.arguments(given if values is None else values)) for n in chosen]


def show_plan(plan: list[tuple[Notebook, dict]]) -> str:
    return "\n".join(f"{notebook.path.name}  {parameters}" for notebook, parameters in plan)


def _check_writable(folder: Path, make: bool) -> None:
    """Writes into a folder; where there is none, into a new one, or (not make) into the nearest above."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        probe = _existing(folder) / f".write-test.{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to {folder} ({error.strerror}); choose another folder with --out DIR"
        ) from None


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    return next(p for p in (folder, *folder.parents) if p.exists())


def listing() -> str:
    known = find_notebooks()
    width = max(len(", ".join(n.items)) for n in known)
    lines = [f"{'notebook':22} {'items':{width}} {'minutes: smoke':>15} {'demo':>7}"]
    for n in known:
        demo = n.minutes("demo") if n.runs_by_default("demo") else "--only"
        items = ", ".join(n.items)
        lines.append(f"{n.path.stem:22} {items:{width}} {n.minutes('smoke'):>15} {demo:>7}")
    lines += [
        "",
        "parameters (--set NAME=VALUE; which notebook takes which: its parameters cell):",
        "  " + ", ".join(PARAMETERS),
        "  or any setting by its path: diffusion.lr, classifier.batch_size (difflt_core/config.py has them all)",
        "  and of single notebooks: "
        + ", ".join(f"{name} ({', '.join(has)})" for name, has in local_parameters().items()),
    ]
    return "\n".join(lines)
