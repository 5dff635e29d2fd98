"""Progress bars with time left, in a terminal and in JupyterLab, and the context that a stage runs in."""

import os
import sys
from dataclasses import dataclass

__all__ = ["Context", "bar", "resolve_device"]


@dataclass(frozen=True)
class Context:
    """Things that decide how a stage runs and never what it computes."""

    device: str = "cpu"
    progress: bool = True


def bar(total: int, what: str, unit: str = "step", initial: int = 0, context: Context | None = None):
    """A tqdm bar. Under papermill it goes to the terminal of run_all.sh, not into the notebook."""
    from tqdm import tqdm
    from tqdm.auto import tqdm as tqdm_auto

    enabled = context is None or context.progress
    relay = os.environ.get("DIFFLT_PROGRESS_FD")
    options = {"total": total, "desc": what, "unit": unit, "initial": initial, "mininterval": 0.5}
    if not enabled:
        return tqdm(disable=True, **options)
    if relay:
        return tqdm(file=os.fdopen(os.dup(int(relay)), "w"), leave=False, ncols=90, **options)
    if "ipykernel" in sys.modules:
        return tqdm_auto(leave=False, **options)
    return tqdm(leave=False, ncols=90, disable=not sys.stderr.isatty(), **options)


def resolve_device(name: str) -> str:
    """ "auto" to "cuda" or "cpu".

    Raises:
        ValueError: an unknown name, or CUDA where there is none.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no CUDA GPU; use --device cpu or auto")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"
