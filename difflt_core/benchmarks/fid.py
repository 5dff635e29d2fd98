"""How long FID at 2,048 dimensions takes: ours beside scipy's matrix root, on the CPU."""

import numpy as np
import pandas as pd

from ..engine.provenance import hardware
from ..generation.quality import fid
from .shared import write
from .timing import seconds

__all__ = ["add_options", "run"]


def add_options(parser) -> None:
    parser.add_argument("--dimensions", type=int, default=2048, metavar="D")


def run(options) -> None:
    """Both ways on the same features, two sets of 2 D."""
    options.device, D = "cpu", options.dimensions
    g = np.random.default_rng(0)
    real, fake = g.normal(size=(2 * D, D)), 1.1 * g.normal(size=(2 * D, D)) + 0.1
    ways = {"scipy's sqrtm": _textbook, "difflt_core.generation.quality.fid": fid}
    rows = [
        {"way": n, "s": seconds(lambda _, f=f: f(real, fake), 1, "cpu"), "FID": f(real, fake)}
        for n, f in ways.items()
    ]
    table = pd.DataFrame(rows).map(lambda v: f"{v:.8g}" if isinstance(v, float) else v)
    face = f"Two sets of {2 * D} features of {D} dimensions, float64, {hardware('cpu')}"
    write(options, "fid-cpu", face, table, {"rows": rows})


def _textbook(real, fake) -> float:
    import scipy.linalg

    a, b = np.cov(real.T), np.cov(fake.T)
    offset = np.square(real.mean(axis=0) - fake.mean(axis=0)).sum()
    return float(offset + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real))
