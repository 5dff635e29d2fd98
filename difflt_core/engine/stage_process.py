"""A process of its own for a stage: a GPU that nothing else has touched, and an end with its worker."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, forkserver

__all__ = ["dask_setup", "in_own_process", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_TRIES = 3  # of a stage whose process dies
_ON_LINUX = sys.platform == "linux"
# For a CPU: forked from a clean process below each worker, that has imported the slow packages. For a GPU
# nothing is inherited: a package that only asks for GPUs at its import would spoil them for a fork.
_FORK = multiprocessing.get_context("forkserver" if _ON_LINUX else "spawn")
_SPAWN = multiprocessing.get_context("spawn")
_IMPORTED = ["difflt_core.experiments.pipeline", "torch._dynamo", "sklearn.datasets", "accelerate"]
_IMPORTED += ["diffusers.training_utils", "diffusers.models.unets.unet_2d", "diffusers.schedulers"]


def dask_setup(worker) -> None:
    """Called by a worker of ours when it starts: the imports begin before the first stage comes."""
    _prepare(forks=not os.environ.get("CUDA_VISIBLE_DEVICES"))  # which a worker for a GPU has


def _prepare(forks: bool) -> None:
    # Dask's own, for workers that hold data: with it a training gives its memory back at every step.
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
    if forks and _ON_LINUX:
        _FORK.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()


def in_own_process(what: str, device: str, function: Callable, *args) -> None:
    """Call a function in a new process, and again where that dies.

    Args:
        what: names it in an error. device: "cpu" or "cuda", that it uses.

    Raises:
        ChildProcessError: it died three times. The function's own errors are raised as they are.
    """
    context = _FORK if device == "cpu" else _SPAWN
    _prepare(forks=context is _FORK)
    multiprocessing.current_process()._config["daemon"] = False  # which dask's workers are
    for _ in range(_TRIES):
        with ProcessPoolExecutor(1, context, initializer=_begin) as process:
            try:
                called = process.submit(_call, function, *args)
            except (ConnectionError, EOFError):
                time.sleep(1)  # the clean process died; the next try starts another
                continue
            with contextlib.suppress(BrokenProcessPool):
                return called.result()
    raise ChildProcessError(
        f"{what}: its process died {_TRIES} times, perhaps for lack of memory; try --jobs 1 or a "
        "smaller batch"
    )


def _call(function: Callable, *args) -> None:
    try:
        function(*args)
    except SystemExit:  # asked to end, and a training has written its checkpoint
        os._exit(128 + signal.SIGTERM)


def _begin() -> None:
    keep_freed_memory()
    _end_with_parent()


def keep_freed_memory() -> None:
    """Of glibc: what is freed stays with the process, up to 1 GiB at its end. By default an array above
    32 MB is given back each time, and each of its pages is fetched anew: a third of the seconds in which
    images are generated (`python -m difflt_core.benchmarks allocator`)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _ON_LINUX else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**30)


def _end_with_parent() -> None:
    """End when the worker has: a training writes its checkpoint first. Ctrl-C is for the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
