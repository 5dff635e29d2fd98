"""How good a generator is after how many seconds of training: eps and edm, same network and data.

Each run is a plain generator (no L_CBDM, no L_AID) of one parameterisation, length and seed, on a
data set and seeds of their own, and is judged on the validation part alone. Generators are trained
one to a core, in processes that have trained before, so that their seconds compare; a run that was
killed goes on with what is finished.
"""

import json
import multiprocessing
import os
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from ..config import RunConfig, load_config, vary
from ..engine.files import atomic_write
from ..engine.parallel import n_cores
from ..engine.progress import bar
from ..engine.provenance import hardware
from ..experiments.pipeline import Pipeline
from ..experiments.results import accuracy, agreement, type_shares
from ..generation.quality import Quality
from ..reporting.items import COLOURS, STYLE, picture_files
from ..reporting.numbers import mean_and_spread
from .shared import add_runs, open_pipeline, write

__all__ = ["add_options", "draw", "measure", "run", "speed", "table"]

DATA_SEED = 1  # never that of the reported tables
LENGTHS = {"eps": (250, 500, 1000, 2000), "edm": (60, 125, 250, 500, 1000, 2000)}  # steps
SEEDS = (201, 202, 203)
QUICK = {"eps": (20, 40), "edm": (10, 40)}
BASELINES = ("cross-entropy", "BSCE")
COLUMNS = {  # of a run: head in the table, digits
    "train_s": ("training s", 1),
    "agreement": ("agreement %", 1),
    "FID": ("FID", 2),
    "ID": ("ID %", 1),
    "AID": ("AID %", 1),
    "OOD": ("OOD %", 1),
    "overall": ("accuracy %", 1),
    "few": ("few %", 1),
}
_INK = {
    "eps": COLOURS["DDPM"],
    "edm": COLOURS["DiffuLT"],
    "cross-entropy": COLOURS["cross-entropy"],
    "BSCE": COLOURS["real"],
}


def add_options(parser) -> None:
    add_runs(parser)
    parser.add_argument("--eps-steps", type=int, nargs="+", metavar="N", help="training lengths")
    parser.add_argument("--edm-steps", type=int, nargs="+", metavar="N", help="training lengths")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S")
    quick = "a minute: profile smoke, two lengths, one seed"
    parser.add_argument("--quick", action="store_true", help=quick)


def run(options) -> None:
    device, quick = options.device, options.quick
    seeds = tuple(options.seeds or (SEEDS[:1] if quick else SEEDS))
    lengths = {
        kind: tuple(getattr(options, f"{kind}_steps") or default)
        for kind, default in (QUICK if quick else LENGTHS).items()
    }
    profile = options.profile or ("smoke" if quick else "demo")
    config = load_config(profile, seeds=seeds, data_seed=DATA_SEED)
    base = open_pipeline(options, config)
    one_thread = base.store.context.threads == 1  # else a generator has all cores
    jobs = n_cores() if device == "cpu" and one_thread else 1
    runs = measure(base, lengths, seeds, jobs, options.runs)
    sentence, ratio = speed(runs)
    name = f"generator-quick-{device}" if quick else f"generator-{device}"
    face = _protocol(config, jobs, Quality(base).words(), hardware(device))
    machines = _machines(base)
    notes = [sentence, _pace(runs), *([] if len(machines) == 1 else [_UNEQUAL])]
    record = {"protocol": face, "sentence": sentence, "ratio": None if np.isnan(ratio) else ratio}
    record |= {"rows": json.loads(runs.to_json(orient="records")), "trained_on": machines}
    record["config"] = config.model_dump(mode="json")
    write(options, name, face, table(runs), record, " ".join(notes))
    csv = runs.to_csv(index=False, float_format="%.4f", lineterminator="\n")
    atomic_write(options.out / f"{name}.csv", csv)
    _save(draw(runs), options.out, name)


def measure(base: Pipeline, lengths: dict, seeds, jobs: int, folder) -> pd.DataFrame:
    """One row a run: method ("eps", "edm", or a baseline, whose steps are 0 and whose generator is
    none), steps, seed, training seconds and the COLUMNS.

    Args:
        lengths: parameterisation -> training steps. jobs: generators side by side; more than cores,
            and the seconds mean nothing. folder: of the pipeline, which holds runs/cache.
    """
    generators = [
        (kind, n_steps, seed, _plain_generator(base.config, kind, n_steps, seed))
        for n_steps, kind in sorted(((n, k) for k in lengths for n in lengths[k]), reverse=True)
        for seed in seeds
    ]
    on_real = [{"seed": seed, "classifier.method": "bsce"} for seed in seeds]
    variants = [changes for *_, changes in generators]
    _train_side_by_side(base, variants, jobs, folder)
    base.build(on_real, stages=("train_extractor", "train_on_real"))
    base.build(variants, stages=("train_classifier", "train_oracle", "quality_samples"))
    quality, rows = Quality(base), []
    for kind, n_steps, seed, changes in generators:
        rows.append(
            {"method": kind, "steps": n_steps, "seed": seed, **_row(base, changes, quality)}
        )
    for changes in on_real:
        variant = base.vary(changes)
        trained = (variant.train_extractor(), variant.train_on_real())
        for method, classifier in zip(BASELINES, trained, strict=True):
            row = {"method": method, "steps": 0, "seed": changes["seed"]}
            rows.append({**row, **_accuracy(variant, classifier)})
    order = {method: i for i, method in enumerate((*BASELINES, *lengths))}
    runs = pd.DataFrame(rows).sort_values(["steps", "seed"])
    runs = runs.sort_values("method", key=lambda m: m.map(order), kind="stable", ignore_index=True)
    return runs[["method", "steps", "seed", *COLUMNS]]


def _plain_generator(config: RunConfig, kind: str, n_steps: int, seed: int) -> dict:
    """Changes for Pipeline.vary; a short training warms up in a fifth of its steps."""
    return {
        "seed": seed,
        "sampling.guide": "null",
        "diffusion.parameterisation": kind,
        "diffusion.n_steps": n_steps,
        "diffusion.tau": 0.0,
        "diffusion.alpha": 0.0,
        "diffusion.plain_share": 0.0,
        "diffusion.schedule": "cosine",
        "diffusion.warmup_steps": min(config.diffusion.warmup_steps, n_steps // 5),
        "diffusion.seed": None,
    }


def _train_side_by_side(base: Pipeline, variants: list[dict], jobs: int, folder) -> None:
    """Generators alone, the next one where a core is free. Pipeline.build would give the first in
    each process the seconds of loading libraries, which are more than a short training's."""
    base.data()
    config, device = base.config, base.store.context.device
    tasks = [(config, folder, device, changes) for changes in variants]
    spawn, total = (
        multiprocessing.get_context("spawn"),
        sum(v["diffusion.n_steps"] for v in variants),
    )
    with (
        ProcessPoolExecutor(jobs, spawn, _warm_up, (config, device)) as pool,
        bar(total, f"{len(variants)} generators, {jobs} at a time") as progress,
    ):
        for n_steps in pool.map(_train, tasks):
            progress.update(n_steps)


def _warm_up(config: RunConfig, device: str) -> None:
    """Runs in a worker before anything that counts. A worker ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        for kind in LENGTHS:
            _train((config, folder, device, _plain_generator(config, kind, 3, 0)))


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _train(task: tuple) -> int:
    config, folder, device, changes = task
    Pipeline(config, folder, device, progress=False).vary(changes).train_diffusion()
    return changes["diffusion.n_steps"]


def _row(base: Pipeline, changes: dict, quality: Quality) -> dict:
    variant = base.vary(changes)
    return {
        "train_s": variant.train_diffusion().manifest["elapsed_s"],
        "agreement": agreement(variant),
        "FID": quality.scores(variant)["FID"],
        **type_shares(variant),
        **_accuracy(variant, variant.train_classifier()),
    }


def _accuracy(variant: Pipeline, classifier) -> dict:
    """On the validation part: the test part is for the reported tables."""
    found = accuracy(variant, classifier, "val")
    return {"overall": found["overall"], "few": found["few"]}


def speed(runs: pd.DataFrame) -> tuple[str, float]:
    """After how many seconds edm is as good as eps gets, in words, and their ratio to eps's; nan if never.

    Accuracy and seconds are means over the seeds; between two lengths of edm accuracy is a line in
    log seconds, and the first crossing counts.

    Args:
        runs: of measure: method, steps, train_s, overall.
    """
    means = runs.groupby(["method", "steps"])[["train_s", "overall"]].mean()
    eps, edm = means.loc["eps"], means.loc["edm"].sort_values("train_s")
    eps_s, best = eps.loc[eps["overall"].idxmax()]
    there = np.flatnonzero(edm["overall"] >= best)
    goal = f"eps's best downstream accuracy ({best:.1f} % of the validation part)"
    if not len(there):
        top_s, top = edm.loc[edm["overall"].idxmax()]
        return f"edm does not reach {goal}: its own best is {top:.1f} % at {top_s:.1f} s.", np.nan
    log_s, overall, i = np.log(edm["train_s"].values), edm["overall"].values, there[0]
    if i:
        share = (best - overall[i - 1]) / (overall[i] - overall[i - 1])
        edm_s, when = np.exp(log_s[i - 1] + share * (log_s[i] - log_s[i - 1])), "at"
    else:
        edm_s, when = np.exp(log_s[0]), "in its shortest training, at"
    ratio = float(edm_s / eps_s)
    need = f"{ratio:.2f} of the {eps_s:.1f} s that eps needs"
    return f"edm reaches {goal} {when} {edm_s:.1f} s, {need}.", ratio


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over the seeds of each method and length, as text."""
    rows = []
    for (method, steps), group in runs.groupby(["method", "steps"], sort=False):
        row = {"generator": method if steps else f"none: {method}", "steps": steps or ""}
        for column, (head, digits) in COLUMNS.items():
            row[head] = mean_and_spread(group[column], digits)
        rows.append(row)
    return pd.DataFrame(rows)


def draw(runs: pd.DataFrame):
    """Accuracy, few-shot accuracy and FID by training seconds: the mean over the seeds, their range
    as a band; baselines as dashed lines."""
    panels = {"overall": "accuracy in %", "few": "few-shot accuracy in %", "FID": "FID"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6))
        for ax, (column, label) in zip(axes, panels.items(), strict=True):
            for method, group in runs.groupby("method", sort=False):
                if method in BASELINES:
                    if column != "FID":
                        level = group[column].mean()
                        ax.axhline(level, color=_INK[method], ls="--", lw=1.2, label=method)
                    continue
                by_length = group.groupby("steps")
                seconds, values = by_length["train_s"].mean(), by_length[column]
                ax.plot(seconds, values.mean(), "o-", ms=4, color=_INK[method], label=method)
                ends = (values.min(), values.max())
                ax.fill_between(seconds, *ends, color=_INK[method], alpha=0.15, lw=0)
            ax.set(xscale="log", xlabel="training seconds", ylabel=label)
            _plain_numbers(ax.xaxis)
        axes[-1].set_yscale("log")
        _plain_numbers(axes[-1].yaxis)
        names = axes[0].get_legend_handles_labels()
        figure.legend(*names, loc="upper center", ncols=len(names[1]))
        figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


def _plain_numbers(axis) -> None:
    """On a log axis: 1, 2 and 5 times each power of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _save(figure, folder, name: str) -> None:
    with plt.rc_context(STYLE):
        for kind, content in picture_files(figure).items():
            atomic_write(folder / f"{name}.{kind}", content)
    plt.close(figure)


def _pace(runs: pd.DataFrame) -> str:
    """Milliseconds of a step, which are alike in all runs where nothing else was running."""
    made = runs[runs["steps"] > 0]
    step_ms = 1000 * made["train_s"] / made["steps"]
    return f"A training step took {step_ms.min():.3g} to {step_ms.max():.3g} ms."


_UNEQUAL = "Not all were trained on one machine and commit: their seconds do not compare."


def _machines(base: Pipeline) -> list[list[str]]:
    """Hardware and commit of every generator that was used."""
    made = [a.manifest["environment"] for n, a in base.used.items() if n.startswith("diffusion/")]
    return sorted({(m["hardware"], m["commit"]) for m in made})


def _protocol(config: RunConfig, jobs: int, fid_words: str, machine: str) -> str:
    data, diffusion, sampling = config.data, config.diffusion, config.sampling
    spread = ": mean ± standard deviation" if len(config.seeds) > 1 else ""
    aside = f"{jobs} at a time, a core each" if jobs > 1 else "one at a time"
    cut = f"n_max {data.n_max}, r = {data.imb_ratio:g}" if data.imb_ratio else "as it is"
    draws = sorted({vary(config, {"seed": seed}).draw for seed in config.seeds})
    return (
        f"{data.name}, {cut}, data seeds {', '.join(map(str, draws))}, profile {config.profile}; seeds "
        f"{', '.join(map(str, config.seeds))}{spread}. Plain generators (tau = "
        f"alpha = 0, cosine), network {diffusion.preset}, batch {diffusion.batch_size}; "
        f"{sampling.sampler}, {sampling.n_steps} steps, guidance {sampling.guidance:g}. Training "
        f"seconds: {aside}, {machine}. Accuracy: the final classifier on the validation part; "
        f"agreement: of an oracle trained on balanced data; FID: {fid_words}."
    )
