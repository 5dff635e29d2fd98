"""How work reaches the device: copies that nobody waits for, and compiled functions.

What a step draws for the host to read (which operation an image gets, the box of CutMix) is numpy's;
what it draws for the device is torch's. to_device is the only way from one to the other, and nothing
goes back before a step is over, so the host runs ahead of a GPU. tests/engine/test_no_sync.py holds it.
"""

import os
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.utils._pytree import tree_map

__all__ = ["Compiled", "compiled", "how_compiled", "to_device"]

MODES = ("default", "reduce-overhead", "off")  # of DIFFLT_COMPILE

_MOST_GRAPHS = 64
_outcomes: dict[str, str] = {}


def to_device(values, device) -> torch.Tensor:
    """A host array or tensor on the device; to a GPU from pinned memory, so that the copy is queued
    and not waited for."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # torch takes no array that must stay as it is
    values = torch.as_tensor(values)
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def compiled(function: Callable, what: str, device) -> Callable:
    """The function, compiled on a GPU; as it is on a CPU, where its small kernels gain nothing.

    DIFFLT_COMPILE chooses how: default, reduce-overhead (CUDA graphs: no launches, but more memory)
    or off. Which of them pays is for `python -m difflt_core.benchmarks throughput` to say.

    Args:
        what: names it in a warning and in the provenance.
    """
    mode = os.environ.get("DIFFLT_COMPILE", "default")
    if mode not in MODES:
        raise ValueError(f"DIFFLT_COMPILE: expected one of {', '.join(MODES)}, got {mode!r}")
    if torch.device(device).type == "cpu" or mode == "off":
        return function
    return Compiled(function, what, mode)


class Compiled:
    """A compiled function, which goes on as it was written when it cannot be compiled: with a warning
    that names the reason, kept for the provenance."""

    def __init__(self, function: Callable, what: str, mode: str = "default", **options):
        import torch._functorch.config  # which torch itself does not load

        self.plain, self.what, self.mode = function, what, mode
        # a backward that cannot be compiled is found out in the forward, which can go on without
        torch._functorch.config.force_non_lazy_backward_lowering = True
        # a graph for each size of a batch: they are few
        self.fast: Callable | None = torch.compile(function, mode=mode, dynamic=False, **options)
        _outcomes[what] = mode
        # a graph for each setting that a run sweeps, too; past the limit it is said, not passed over
        torch._dynamo.config.recompile_limit = _MOST_GRAPHS
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    def __call__(self, *args, **kwargs):
        if self.fast is not None:
            try:
                if self.mode == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()
                    # a graph's output lies where its next call writes: keep it for whoever holds it
                    found = self.fast(*args, **kwargs)
                    return found if torch.is_grad_enabled() else tree_map(torch.clone, found)
                return self.fast(*args, **kwargs)
            # named here: torch._dynamo takes a second to import, and most processes compile nothing
            except (
                torch._dynamo.exc.TorchDynamoException,
                torch._dynamo.exc.FailOnRecompileLimitHit,
            ) as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                reason = " ".join(lines[:2]) or type(error).__name__
                self.fast, _outcomes[self.what] = None, f"not compiled: {reason}"
                warnings.warn(
                    f"{self.what} cannot be compiled ({reason}); it goes on without, and slower. "
                    "DIFFLT_COMPILE=off says so from the start",
                    stacklevel=2,
                )
        return self.plain(*args, **kwargs)


def how_compiled() -> dict[str, str]:
    """What was compiled since the last call, and how, or why not."""
    found = dict(_outcomes)
    _outcomes.clear()
    return found
