"""One stage on several processes, started by `accelerate launch` or `torchrun`.

In training each process takes an equal slice of every global batch; in sampling it takes every
n-th chunk. What one process does for all (planning, locks, stages that gain nothing from company) the
main one does while the others wait and hear that it lives. A process that dies ends the group: its
launcher says which, and the others fail at their next exchange.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

__all__ = [
    "barrier",
    "from_main",
    "main_first",
    "make_accelerator",
    "n_cores",
    "n_processes",
    "rank",
    "start",
]

_T = TypeVar("_T")
_BEAT_S = 10.0  # the main process is heard at least so often
_SILENCE = timedelta(minutes=5)  # after so long the others give up
_alone = False
_control = None  # a group of its own for small words, on CPUs


def n_processes() -> int:
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """0 for the main process."""
    return int(os.environ.get("RANK", 0))


def n_cores() -> int:
    """CPU cores that this process may use: of the machine, its affinity and a container's quota."""
    from dask.system import CPU_COUNT

    return CPU_COUNT


@contextlib.contextmanager
def _by_itself():
    """Inside, the main process waits for nobody: the others are not taking part."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def start(device: str) -> None:
    """Join the group of processes; nothing to do for a single one. device: "cpu" or "cuda"."""
    global _control
    if n_processes() > 1 and _control is None:
        import torch.distributed as dist
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=_SILENCE)
        _control = dist.new_group(backend="gloo", timeout=_SILENCE)


def main_first(work: Callable[[], _T]) -> _T:
    """What work() returns on the main process, which alone calls it; anything small that pickles.

    The others wait as long as it takes, and hear every ten seconds that the main one is at it. Its
    error is raised on all.
    """
    if n_processes() == 1:
        return work()
    if rank() != 0:
        while (said := _word(None)) is None:
            pass
        value, error = said
        if error:
            raise RuntimeError(f"the main process failed: {error}")
        return value
    finished, said = threading.Event(), (None, "it was ended")

    def beat() -> None:
        while not finished.wait(_BEAT_S):
            _word(None)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        with _by_itself():
            value = work()
        said = (value, "")
        return value
    except Exception as failure:
        said = (None, f"{type(failure).__name__}: {failure}")
        raise
    finally:
        finished.set()
        beating.join()
        _word(said)


def from_main(value: _T) -> _T:
    """The main process's value, on every process. value: anything small that pickles."""
    return value if n_processes() == 1 else _word((value,))[0]


def _word(said):
    """What the main process says now, on every process."""
    from torch.distributed import broadcast_object_list

    box = [said]
    broadcast_object_list(box, src=0, group=_control)
    return box[0]


def barrier() -> None:
    if n_processes() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def make_accelerator(device: str):
    """accelerate's Accelerator for "cpu" or "cuda". It keeps its first device for the life of a
    process; alone, we let it choose again, so that one notebook can use both."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if n_processes() == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision="no")
