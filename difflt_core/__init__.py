"""difflt: DiffuLT and SAU for long-tailed image recognition, one file per job.

The data path, in file order: data -> classifiers -> generation -> filtering -> classifiers ->
metrics, strung together by pipeline, cached by store, shown by report. Importing this package
imports no torch.
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
    "Pipeline": "pipeline",
    "DiffuLT": "pipeline",
    "run_diffult": "pipeline",
    "Report": "report",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module 'difflt_core' has no attribute {name!r}")
