"""One stage on several processes, started by `accelerate launch` or `torchrun`.

In training each process takes an equal slice of every global batch; in sampling it takes every
n-th chunk. Stages that gain nothing from it are built by the main process while the others wait.
"""

import contextlib
import os
from datetime import timedelta

__all__ = [
    "alone",
    "barrier",
    "from_main",
    "make_accelerator",
    "n_cores",
    "n_processes",
    "rank",
    "start",
]

_alone = False


def n_processes() -> int:
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """0 for the main process."""
    return int(os.environ.get("RANK", 0))


def n_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def alone():
    """Inside, the main process waits for nobody: the others are not taking part."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def start(device: str) -> None:
    """Join the group of processes; nothing to do for a single one. device: "cpu" or "cuda"."""
    if n_processes() > 1:
        from accelerate import PartialState

        # A process may wait for another one's whole classifier training.
        PartialState(cpu=device == "cpu", timeout=timedelta(days=2))


def barrier() -> None:
    if n_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def from_main(value):
    """The main process's value, on every process. value: anything small that pickles."""
    if n_processes() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value], from_process=0)[0]


def make_accelerator(device: str):
    """accelerate's Accelerator for "cpu" or "cuda". It keeps its first device for the life of a
    process; alone, we let it choose again, so that one notebook can use both."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if n_processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision="no")
