"""Progress bars with time left, in a terminal and in JupyterLab, and the context that a stage runs
in."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .parallel import rank

__all__ = ["Context", "bar", "catch_up", "read_share", "resolve_device"]


@dataclass(frozen=True)
class Context:
    """Things that decide how a stage runs and never what it computes."""

    device: str = "cpu"
    progress: bool = True
    data_dir: str = ""  # where data sets lie; "" is data/ in this checkout
    download: bool = False  # fetch a data set that is not there
    threads: int | None = None  # of torch while a stage is built on the CPU; None: all cores
    checkpoint_s: float = 600.0  # seconds between two checkpoints of a training run
    share_file: Path | None = (
        None  # where bars also write the share that is done, for other processes
    )
    auto_precision: str = "fp32"  # what a precision "auto" is on this device

    @property
    def device_here(self) -> str:
        """Where this process measures: the CPU of a machine whose cluster alone has GPUs."""
        import torch

        return self.device if self.device == "cpu" or torch.cuda.is_available() else "cpu"


def bar(
    total: float,
    what: str,
    unit: str = "step",
    initial: int = 0,
    context: Context | None = None,
    before: int = 0,
):
    """A tqdm bar: a widget in JupyterLab, text on a terminal or under papermill (which relays it to
    the terminal).

    Args:
        initial: where it begins, of total. before: how much of total is another stage's, which the
            share that other processes read leaves out.
    """
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
        # time left by the mean rate, and shown without waiting for as much again: it comes in bursts
        options |= {"smoothing": 0, "miniters": 0}
    if rank() != 0 or (context is not None and not context.progress):
        made = tqdm(disable=True, **options)
    elif os.environ.get("DIFFLT_PAPERMILL"):
        made = tqdm(file=sys.stderr, ncols=90, **options)
    elif "ipykernel" in sys.modules:
        made = tqdm_auto(**options)
    else:
        made = tqdm(ncols=90, disable=not sys.stderr.isatty(), **options)
    if context is None or context.share_file is None or rank() != 0:
        return made
    return _Told(made, total - before, initial - before, context.share_file)


class _Told:
    """A bar that also writes its share to a file, now and then, for other processes and hosts."""

    def __init__(self, made, total: float, initial: float, file: Path):
        self.made, self.total, self.done, self.file = made, max(1, total), initial, file
        self.found, self.told = initial, 0.0  # told: when

    def update(self, n: float = 1) -> None:
        self.made.update(n)
        self.done += n
        if time.monotonic() - self.told > 1:
            self.told = time.monotonic()
            with contextlib.suppress(OSError):  # only for show
                shares = self.done / self.total, self.found / self.total
                self.file.write_text("{:.4f} {:.4f}".format(*shares))

    def __enter__(self):
        self.made.__enter__()
        return self

    def __exit__(self, *error):
        return self.made.__exit__(*error)


def catch_up(made, n: float) -> None:
    """Move a bar by what was done before it began, which its time left is not reckoned by."""
    made.n += n
    if not made.disable:
        made.initial += n
        made.last_print_n += n


def read_share(file: Path) -> tuple[float, float]:
    """The share, 0 to 1, that a bar in another process last wrote, and the one that it began with; 0
    where there is none."""
    try:
        share, began = (min(1.0, max(0.0, float(text))) for text in file.read_text().split())
    except (OSError, ValueError):
        return 0.0, 0.0
    return share, began


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
            f"device: cuda was asked for, but torch (built for CUDA {torch.version.cuda}) sees no GPU; "
            "look with nvidia-smi whether its driver is as new as that, or use --device cpu or auto"
        )
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
