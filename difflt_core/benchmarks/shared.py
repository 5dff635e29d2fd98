"""What the benchmarks share: options, processes of their own, and how an outcome is written."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd

from ..engine.files import atomic_write
from ..engine.provenance import ROOT, environment
from ..experiments.pipeline import Pipeline

__all__ = [
    "add_runs",
    "add_shared_options",
    "add_steps",
    "compare",
    "four_digits",
    "in_a_process",
    "open_pipeline",
    "write",
]


def add_shared_options(parser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    folder = ROOT / "figures" / "benchmark"
    parser.add_argument("--out", type=Path, default=folder, help="default: figures/benchmark")


def add_steps(parser) -> None:
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: 5)")


def add_runs(parser) -> None:
    """Options of the benchmarks that train a profile's generators."""
    parser.add_argument("--profile", help="whose settings (default: demo)")
    parser.add_argument(
        "--runs", type=Path, default=ROOT, help="holds runs/cache (default: the checkout)"
    )


def open_pipeline(options, config) -> Pipeline:
    return Pipeline(config, options.runs, options.device)


def in_a_process(function, *arguments) -> dict:
    """What a function returns in a fresh process, whose peak memory is then its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def compare(reference: dict, fast: dict, kinds: dict) -> pd.DataFrame:
    """Two modes side by side. kinds: key -> (label, whether "more" or "less" is better, format)."""
    rows = {}
    for key, (label, better, form) in kinds.items():
        a, b = reference[key], fast[key]
        ratio = "" if better is None else f"{b / a if better == 'more' else a / b:.3g}x"
        rows[label] = [form.format(a), form.format(b), ratio]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["reference", "fast", "gain"])


def four_digits(table: pd.DataFrame) -> pd.DataFrame:
    """Floats to text of four digits."""
    return table.map(lambda v: f"{v:.4g}" if isinstance(v, float) else v)


def write(
    options, name: str, face: str, table: pd.DataFrame, record: dict, notes: str = ""
) -> None:
    """Write <name>.md, a caption with a table and notes, and <name>.json, a record with its
    environment; print the former."""
    named = not isinstance(table.index, pd.RangeIndex)
    text = f"**{name}.** {face}\n\n{table.to_markdown(index=named, disable_numparse=True)}\n"
    text += f"\n{notes}\n" if notes else ""
    record = {**record, "environment": environment(options.device)}
    atomic_write(options.out / f"{name}.md", text)
    atomic_write(options.out / f"{name}.json", json.dumps(record, indent=1) + "\n")
    print(text)
