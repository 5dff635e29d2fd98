"""difflt: DiffuLT and SAU for long-tailed image recognition.

Data flow through the rooms in this order, and imports go the other way only: engine (runs stages,
whatever they compute), data, recognition, generation, selection, experiments, reporting, benchmarks.
Importing this package imports no torch.
"""

import importlib
import os

# Idle OpenMP threads spin for some microseconds and then sleep: without spinning a training step on
# two cores takes a quarter longer, and with the default two runs at once starve each other. Read when
# torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_WHERE = {
    "RunConfig": "config",
    "load_config": "config",
    "vary": "config",
    "Pipeline": "experiments.pipeline",
    "DiffuLT": "experiments.method",
    "Experiment": "experiments.results",
    "Variant": "experiments.results",
    "run_diffult": "experiments.method",
    "Report": "reporting.items",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module 'difflt_core' has no attribute {name!r}")
