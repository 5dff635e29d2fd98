"""Where a number comes from: versions, commit, hardware. Recorded beside results, never part of a
cache key. `python -m difflt_core.engine.provenance` prints the licences of all packages of the lock."""

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

__all__ = ["ROOT", "cache_folder", "commit", "environment", "hardware", "licences", "locked"]

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "torchvision", "diffusers", "accelerate", "numpy", "scikit-learn", "pandas")


def cache_folder(out: Path) -> Path:
    """Of what is trained with figures/ and runs/ in a folder: DIFFLT_CACHE (relative: to the checkout, for
    a notebook runs in a folder of its own), or runs/cache in it."""
    named = os.environ.get("DIFFLT_CACHE")
    return ROOT / named if named else out.resolve() / "runs" / "cache"


@functools.cache
def commit() -> str:
    """The git commit of the checkout, "-dirty" when tracked code differs from it, "" outside
    git. A notebook's outputs, which JupyterLab saves, are no code."""
    try:
        git = functools.partial(
            subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True
        )
        head = git(["git", "rev-parse", "HEAD"]).stdout.strip()
        lines = git(["git", "status", "--porcelain", "--", "difflt_core", "notebooks"]).stdout
        changed = any(_is_code(line, git) for line in lines.splitlines())
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("-dirty" if changed else "")


def _is_code(line: str, git) -> bool:
    """Whether a line of git's status tells of more than outputs of a notebook."""
    path = line[3:]
    if line[1] != "M" or not path.endswith(".ipynb"):
        return True
    texts = git(["git", "show", f"HEAD:{path}"]).stdout, (ROOT / path).read_text(encoding="utf-8")
    try:
        before, now = (
            [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
            for text in texts
        )
    except (ValueError, KeyError):  # no notebook, or half of one
        return True
    return before != now


@functools.cache
def hardware(device: str) -> str:
    """One line: processor or GPU, and how many cores this process may use."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {cores} cores"


def environment(device: object = None) -> dict:
    """Versions, commit, device and hardware, for a manifest."""
    name = str(device or "cpu")
    versions = {p: importlib.metadata.version(p) for p in _PACKAGES}
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "device": name,
        "hardware": hardware(name),
        "packages": versions,
    }


def locked() -> list[tuple[str, str]]:
    """Name and version of every package of requirements-test.lock, for all platforms and Pythons."""
    lock = (ROOT / "requirements-test.lock").read_text(encoding="utf-8")
    return re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE)


def licences() -> list[tuple[str, str, str]]:
    """Package, version and licence, as its own metadata say; a version of the lock that is not the
    installed one belongs to another platform or Python."""
    rows = []
    for name, version in sorted(locked()):
        try:
            about = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            about = None
        if about is None or about["Version"] != version:
            rows.append((name, version, "another platform's or Python's"))
            continue
        kinds = [
            c.rsplit(" :: ", 1)[-1] for c in about.get_all("Classifier", []) if "License ::" in c
        ]
        stated = about.get("License-Expression") or about.get("License") or ""
        if stated in ("", "UNKNOWN") or len(stated) > 60:  # some put the whole text there
            stated = ", ".join(kinds) or stated.strip().partition("\n")[0]
        rows.append((name, version, stated or "not stated"))
    return rows


def main() -> None:
    import pandas as pd

    table = pd.DataFrame(licences(), columns=["package", "version", "licence"])
    print(table.to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
