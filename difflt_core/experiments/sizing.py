"""How long to train in so many hours: seconds of each kind of step are measured on the very data and
machine, and the lengths that fit are fixed, as settings of the run."""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..data.long_tail import load_split, shortfall
from ..engine.artifacts import Store
from ..engine.cluster import default_jobs
from .pipeline import Pipeline

__all__ = ["Rates", "measure", "sized"]

ENOUGH = 2000  # generator steps from which its images may help, a rule of thumb
_SPARE = 0.85  # of the hours: imports, tables and the export need the rest
_FINAL_SHARE = 0.3  # of the hours at most for classifiers, of which each repeat has three
_EPOCHS = 150  # of the filled-up set, at most
_SHORT, _LONG = 4, 14  # steps of the two trainings whose difference is measured
_SURE_S = 1.0  # so much longer the second one has to take, or is made longer still
_LONGEST = 900  # but not more steps than these


@dataclass(frozen=True)
class Rates:
    """Seconds, with as many stages side by side as the run will have: of a plain step of the generator, of
    one with L_CBDM and L_AID, of a classifier's step, and of a generated image."""

    plain_step: float
    full_step: float
    classifier_step: float
    image: float


def measure(pipeline: Pipeline, jobs: int) -> Rates:
    """Train each kind for a few steps and for some more, `jobs` at once, and take the difference."""
    plain: dict[str, Any] = {
        "sampling.guide": "null",  # there is no first part to be guided by
        "diffusion.plain_share": 0.0,
        "diffusion.tau": 0.0,
        "diffusion.alpha": 0.0,
        "diffusion.seed": None,  # repeats that share a generator would share what is measured
    }
    full: dict[str, Any] = {
        "sampling.guide": "null",
        "diffusion.plain_share": 0.0,
        "diffusion.schedule": "constant",
        "diffusion.seed": None,
        "extractor.n_steps": _SHORT,  # L_AID asks a phi_0; any is as slow
    }
    kinds: dict[str, tuple[str, dict[str, Any], str, int]] = {
        "plain_step": ("train_diffusion", plain, "diffusion.n_steps", 1),
        "full_step": ("train_diffusion", full, "diffusion.n_steps", 1),
        "classifier_step": ("train_extractor", {}, "extractor.n_steps", 4),
    }
    with tempfile.TemporaryDirectory() as folder:
        there = _elsewhere(pipeline, Path(folder))

        def seconds(stage: str, changes: dict[str, Any], first_seed: int = 0) -> float:
            """Of the slowest of `jobs` at once."""
            runs = [{**changes, "seed": seed} for seed in range(first_seed, first_seed + jobs)]
            there.build(runs, jobs, (stage,))
            made = [getattr(there.vary(run), stage)() for run in runs]
            return max(artifact.manifest["elapsed_s"] for artifact in made)

        found = {}
        for kind, (stage, changes, length, times) in kinds.items():
            # not counted: it pays for imports, compiled functions and a cold cache
            seconds(stage, {**changes, length: _SHORT * times}, jobs)
            short, n = seconds(stage, {**changes, length: _SHORT * times}), _LONG
            while (long := seconds(stage, {**changes, length: n * times})) < short + _SURE_S:
                if 4 * n > _LONGEST:
                    break
                n *= 4
            found[kind] = _per_step(short, long, _SHORT * times, n * times)
        K = len(load_split(pipeline.data(), "train").class_names)
        drawn: dict[str, Any] = {**plain, "diffusion.n_steps": _SHORT}
        drawn["metrics.n_per_class"] = max(1, 128 // K)
        found["image"] = seconds("quality_samples", drawn) / (K * drawn["metrics.n_per_class"])
    return Rates(**found)


def _elsewhere(pipeline: Pipeline, folder: Path) -> Pipeline:
    """The same pipeline with a store of its own, whatever cache is named, but for the data, which are read
    already."""
    data, there = pipeline.data(), pipeline.vary({})
    there.store, there.used = Store(folder, pipeline.store.context), {}
    link = there.store.root / "data" / data.key
    link.parent.mkdir(parents=True)
    link.symlink_to(data.path.resolve(), target_is_directory=True)
    return there


def _per_step(short_s: float, long_s: float, n_short: int, n_long: int) -> float:
    """Seconds of a step, of two trainings that differ in their length; where the shorter one took as
    long, of all that the longer one did, which is too many."""
    more = (long_s - short_s) / (n_long - n_short)
    return max(1e-4, more if more > 0 else long_s / n_long)


def sized(pipeline: Pipeline, hours: float, rates: Rates | None = None) -> dict:
    """The lengths that fit into so many hours of this machine.

    Returns:
        parameters: by the flat names of --set; rates; words: what was chosen and why, for a person;
        enough_hours: with how many the generator would have ENOUGH steps.

    Raises:
        ValueError: hours that leave the generator no step at all; says how many would.
    """
    config, jobs = pipeline.config, default_jobs(pipeline.store.context.device)
    rates = rates or measure(pipeline, jobs)
    counts = load_split(pipeline.data(), "train").class_counts
    n_new = int(shortfall(counts, config.sampling.fill_to).sum())
    n_all, n_seeds = int(counts.sum()) + n_new, len(config.seeds)
    waves = math.ceil(n_seeds / jobs)  # of repeats side by side: a generator is not split
    each = hours * 3600 * _SPARE / waves  # seconds of one repeat
    per_epoch = n_all / config.classifier.batch_size
    n_final = min(_EPOCHS * per_epoch, _FINAL_SHARE * each / (3 * rates.classifier_step))
    n_final = max(200, _round(n_final))
    rest = 3 * n_final * rates.classifier_step + (n_new + 500) * rates.image
    step = config.diffusion.plain_share * rates.plain_step
    step += (1 - config.diffusion.plain_share) * rates.full_step
    n_generator = _round((each - rest) / step)
    enough_hours = (rest + ENOUGH * step) * waves / _SPARE / 3600
    if n_generator < 100:
        raise ValueError(
            f"--hours {hours:g}: too few for {n_all} images, {n_seeds} repeats and this machine; "
            f"{math.ceil(10 * enough_hours) / 10:g} would give the generator {ENOUGH} steps"
        )
    parameters = {
        "n_diffusion_steps": n_generator,
        "n_extractor_steps": n_final,
        "n_classifier_steps": n_final,
    }
    words = (
        f"{hours:g} h on {jobs} at a time: {n_generator} steps of {config.diffusion.batch_size} for the "
        f"generator ({step:.2g} s each), {n_final} for each classifier ({rates.classifier_step:.2g} s), "
        f"{n_new} images to generate, {n_seeds} repeats."
    )
    if n_generator < ENOUGH:
        words += (
            f" That is short: by a rule of thumb generated images help from {ENOUGH} steps on; "
            f"--hours {math.ceil(10 * enough_hours) / 10:g} would reach them."
        )
    return {
        "parameters": parameters,
        "rates": asdict(rates),
        "words": words,
        "enough_hours": round(enough_hours, 2),
    }


def _round(n: float) -> int:
    """Down to two digits, so that a configuration reads well."""
    if n < 1:
        return 0
    unit = 10 ** max(0, int(math.log10(n)) - 1)
    return int(n // unit * unit)
