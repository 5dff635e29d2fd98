"""Settings side by side, judged on validation images alone, which is how a profile's are chosen:
`python -m difflt_core.reporting.choose --profile demo --variant longer n_diffusion_steps=3000`.

Writes figures/<profile>/choose.*: accuracy overall and by shot group of the profile as it is, of each
variant and of BSCE on the real images, and how often the rare classes' generated images are copies.
"""

import sys

import numpy as np
import pandas as pd

from ..config import parse_parameters
from ..data.long_tail import load_split, shot_groups
from ..experiments.pipeline import Pipeline
from ..experiments.results import Experiment, Variant, accuracy, group_rule
from ..generation.memorisation import memorisation
from ..generation.quality import balanced_rows
from ..options import build_parser, read_run
from ..profiles import PARAMETERS
from .items import Report, summarise
from .sentences import contrasts

__all__ = ["main", "report_choice"]

AS_IT_IS, REFERENCE = "the profile", "BSCE"
_SHARED = ("data", "seeds", "data_seed", "n_draws")


def main(argv: list[str] | None = None) -> int:
    parser = build_parser("python -m difflt_core.reporting.choose", __doc__)
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        nargs="+",
        metavar=("NAME", "PARAMETER=VALUE"),
        help="its name, and parameters as --set has them; repeatable",
    )
    parser.add_argument(
        "--n-val",
        type=int,
        metavar="N",
        help="judge by so many validation images of each class, where the cut leaves them out",
    )
    run = read_run(argv, parser)
    if run is None:
        return 2
    try:  # what is wrong with the settings, before anything is trained
        variants = read_variants(run.options.variant, run.config.profile)
        pipeline = Pipeline(run.config, run.out, run.device, data_dir=run.data_dir)
        for changes in variants.values():
            pipeline.vary(changes)
        judges = {s: _judge(pipeline, s, run.options.n_val) for s in run.config.seeds}
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    report = Report(pipeline, run.out)
    for table in report_choice(pipeline, report, variants, judges):
        print(f"{table.to_markdown(disable_numparse=True)}\n")
    print(report.paths())
    return 0


def read_variants(given: list[list[str]], profile: str) -> dict[str, dict]:
    """Changes for Pipeline.vary by name.

    Raises:
        ValueError: a name that is taken, a variant without a setting, or a setting that is none or of
            the data and seeds, which all variants share.
    """
    variants: dict[str, dict] = {}
    for name, *settings in given:
        if name in (*variants, AS_IT_IS, REFERENCE):
            raise ValueError(f"--variant {name}: there is one of this name; choose another")
        pairs = [tuple(text.split("=", 1)) for text in settings]
        if not pairs or any(len(pair) < 2 for pair in pairs):
            raise ValueError(
                f"--variant {name}: expected PARAMETER=VALUE after the name, got {settings or 'nothing'}"
            )
        values = parse_parameters(pairs, profile)
        shared = [key for key in values if PARAMETERS[key].split(".")[0] in _SHARED]
        if shared:
            raise ValueError(
                f"--variant {name}: {shared[0]} must be one for all variants; use --set instead"
            )
        variants[name] = {PARAMETERS[key]: value for key, value in values.items()}
    return variants


def report_choice(
    pipeline: Pipeline, report: Report, variants: dict[str, dict], judges: dict[int, Pipeline]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the table `choose` and return it, and the differences to BSCE paired by seed.

    Args:
        variants: name -> changes of the configuration. judges: seed -> the pipeline whose validation
            images decide.
    """
    baseline = Variant({"classifier.method": "bsce"}, "train_on_real")
    rows = {REFERENCE: baseline, AS_IT_IS: {}, **variants}
    experiment, found = Experiment(pipeline, rows).build(), []
    for seed, name, variant in experiment.plan():
        p = experiment.at(name, seed)
        scores = accuracy(judges[seed], getattr(p, variant.trained)(), "val")
        copies = _copies(p, judges[seed]) if variant.generates else np.nan
        found.append({"variant": name, "seed": seed, **scores, "copies %": copies})
    runs = pd.DataFrame(found)
    n_images = len(load_split(judges[experiment.seeds[0]].data(), "val").labels)
    changed = "; ".join(
        f"{name}: {', '.join(f'{k} = {v}' for k, v in changes.items())}"
        for name, changes in variants.items()
    )
    table = report.table(
        "choose",
        summarise(runs, "variant", list(runs.columns[2:])),
        f"Top-1 accuracy in % on {n_images:,} validation images. {group_rule(pipeline)} "
        "Copies: share of the few-shot classes' generated images that come as near to a training image as "
        f"the nearest 1 % of their validation images do. {changed}".strip(),
        runs,
    )
    told = {"overall": "overall", "few": "few-shot"}
    ahead = contrasts(runs, list(rows)[1:], [REFERENCE], told, by="variant")
    return table, ahead


def _judge(pipeline: Pipeline, seed: int, n_val: int | None) -> Pipeline:
    """The pipeline whose data's validation part decides; n_val: images of each class, None is the profile's.

    Raises:
        ValueError: there are not as many, or they would be taken from the training part.
    """
    own = pipeline.vary({"seed": seed})
    judge = own if n_val is None else own.vary({"data.n_val": n_val})
    val = load_split(judge.data(), "val")
    each = np.bincount(val.labels, minlength=len(val.class_names))
    if not each.any() or (n_val is not None and (each != n_val).any()):
        raise ValueError(
            f"expected {judge.config.data.n_val} validation images of each class, which the training part "
            f"leaves out, found {each.min()} to {each.max()}; change --n-val or n_max"
        )
    kept, more = (load_split(p.data(), "train").images for p in (own, judge))
    if kept.shape != more.shape or not np.array_equal(kept, more):
        raise ValueError(
            f"--n-val {n_val}: expected training images that do not depend on it, and here they do; "
            "leave it out"
        )
    return judge


def _copies(p: Pipeline, judge: Pipeline) -> float:
    """Share in % of the few-shot classes' generated images that are near a training image as copies are;
    nan where there are none."""
    data, samples = p.config.data, p.generate()
    train, val = (load_split(judge.data(), name) for name in ("train", "val"))
    few = shot_groups(train.class_counts, data.many_above, data.few_below)["few"]
    made, labels = samples.array("images"), np.asarray(samples.array("labels"))
    rows, others = (np.flatnonzero(np.isin(y, few)) for y in (labels, val.labels))
    if not len(rows) or not len(others):
        return float("nan")
    rows, others = rows[balanced_rows(labels[rows])], others[balanced_rows(val.labels[others])]
    device, flip = p.store.context.device, p.config.diffusion.flip
    return memorisation(made[rows], val.images[others], train.images, device, mirrored=flip).share


if __name__ == "__main__":
    sys.exit(main())
