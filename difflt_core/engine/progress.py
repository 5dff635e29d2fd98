"""Progress bars with time left, in a terminal and in JupyterLab, and the context that a stage runs
in."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from .parallel import rank

__all__ = ["Context", "bar", "resolve_device"]


@dataclass(frozen=True)
class Context:
    """Things that decide how a stage runs and never what it computes."""

    device: str = "cpu"
    progress: bool = True
    data_dir: str = ""  # where data sets lie; "" is data/ in this checkout
    download: bool = False  # fetch a data set that is not there
    threads: int | None = None  # of torch while a stage is built on the CPU; None: all cores
    checkpoint_s: float = 600.0  # seconds between two checkpoints of a training run
    report: Callable[[float], None] | None = None  # of a worker: told each new share of 0..1


def bar(
    total: float, what: str, unit: str = "step", initial: int = 0, context: Context | None = None
):
    """A tqdm bar: a widget in JupyterLab, text on a terminal or under papermill (which relays it to
    the terminal)."""
    from tqdm import tqdm
    from tqdm.auto import tqdm as tqdm_auto

    options = {
        "total": total,
        "desc": what,
        "unit": unit,
        "initial": initial,
        "mininterval": 1.0,
        "leave": False,
    }
    if unit == "%":
        options["bar_format"] = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    if context is not None and context.report is not None:
        return _Reporter(total, context.report)
    if rank() != 0 or (context is not None and not context.progress):
        return tqdm(disable=True, **options)
    if os.environ.get("DIFFLT_PAPERMILL"):
        return tqdm(file=sys.stderr, ncols=90, **options)
    if "ipykernel" in sys.modules:
        return tqdm_auto(**options)
    return tqdm(ncols=90, disable=not sys.stderr.isatty(), **options)


class _Reporter:
    """Looks like a bar, and tells a parent process instead of a terminal."""

    def __init__(self, total: int, report: Callable[[float], None]):
        self.total, self.report, self.new, self.last = max(1, total), report, 0, time.monotonic()

    def update(self, n: int = 1) -> None:
        self.new += n
        if time.monotonic() - self.last > 1:
            self.report(self.new / self.total)
            self.new, self.last = 0, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def resolve_device(name: str) -> str:
    """ "auto" to "cuda" or "cpu".

    Raises:
        ValueError: an unknown name, or CUDA where there is none.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda was asked for, but torch sees no CUDA GPU; use --device cpu or auto"
        )
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
