"""What the benchmarks measure with: seconds and peak memory."""

import resource
import sys
import time

import numpy as np
import torch

__all__ = ["now", "peak_gib", "seconds"]


def now(device: str) -> float:
    """Seconds, once the device has done all it was told."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call, n: int, device: str) -> float:
    """Median seconds of call(i) after one call to warm up."""
    times = []
    for i in range(n + 1):
        started = now(device)
        call(i)
        times.append(now(device) - started)
    return float(np.median(times[1:]))


def peak_gib(device: str) -> float:
    """Largest memory that this process has taken so far, on the GPU or in RAM."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
