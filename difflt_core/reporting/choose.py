"""Settings side by side, judged on validation images alone, which is how a profile's are chosen:
`python -m difflt_core.reporting.choose --profile demo --variant longer n_diffusion_steps=3000`.

Writes figures/<profile>/choose.*: accuracy overall and by shot group of the profile as it is, of each
variant and of BSCE on the real images for as many updates, and how often the rare classes'
generated images are copies; and choose_differences.*, paired by seed. With --sau SAU's trainings are
compared instead, with cross-entropy on the same images for as many updates: choose_sau.*. With --name
NAME they are choose_NAME.*, beside the others.
"""

import re
import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..config import RunConfig, by_path, load_config, parse_parameters
from ..data.long_tail import load_split, shot_groups
from ..engine.scheduler import Planner
from ..experiments.pipeline import Pipeline
from ..experiments.results import (
    Experiment,
    Variant,
    accuracy,
    group_rule,
    noise_share,
    on_network_of_sau,
)
from ..generation.memorisation import memorisation
from ..generation.quality import rows_alike
from ..options import USER_ERRORS, build_parser, read_run, told
from .items import AS_LONG_AS_SAU, Report, summarise
from .sentences import contrasts

__all__ = ["DIFFULT", "SAU", "Subject", "main", "report_choice"]

AS_IT_IS = "the profile"
_COPIES = ("few-shot copies %", "of new images %")
_SHARED = ("data", "seeds", "data_seed", "n_draws")


@dataclass(frozen=True)
class Subject:
    """What is trained with each setting: its words in a message, the method of Pipeline, the row that
    it is set beside, and what the caption says of that row and of the last columns."""

    words: str
    trained: str
    reference: str
    caption: str


DIFFULT = Subject(
    "DiffuLT's classifier",
    "train_classifier",
    "BSCE",
    "BSCE: on the real images, as many updates as the profile's. "
    "Copies: share of the few-shot classes' generated images that come as near to a training image "
    "as the nearest 1 % of their validation images do, and what new images would have of them.",
)
SAU = Subject(
    "SAU",
    "train_sau",
    AS_LONG_AS_SAU,
    "Cross-entropy: on the same real and synthetic images, as many updates as the profile's SAU. "
    "Noise: share of the synthetic images that count as noise over the whole training.",
)


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
    parser.add_argument("--sau", action="store_true", help="compare SAU's trainings, not DiffuLT's")
    parser.add_argument("--name", default="", help="write choose_NAME.*, not over choose.*")
    run = read_run(argv, parser)
    if run is None:
        return 2
    of = SAU if run.options.sau else DIFFULT
    config = on_network_of_sau(run.config) if of is SAU else run.config
    try:  # what is wrong with the settings, before anything is trained
        item = _item(run.options.name or ("sau" if of is SAU else ""))
        variants = read_variants(run.options.variant, config)
        pipeline = Pipeline(config, run.out, run.device, data_dir=run.data_dir)
        _refuse_equal(pipeline, variants, of)
        judges = {s: _judge(pipeline, s, run.options.n_val) for s in run.config.seeds}
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1

    def work() -> None:
        report = Report(pipeline, run.out)
        for table in report_choice(pipeline, report, variants, judges, item, of):
            print(f"{table.to_markdown(disable_numparse=True)}\n")
        print(report.paths())

    return told(parser.prog, work)


def _item(name: str) -> str:
    if not name:
        return "choose"
    if name == "differences" or not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise ValueError(f"--name: expected letters, digits and -, not 'differences', got {name!r}")
    return f"choose_{name}"


def read_variants(given: list[list[str]], config: RunConfig) -> dict[str, dict]:
    """Changes of a configuration, for Pipeline.vary, by name.

    Raises:
        ValueError: a name that is taken, a variant without a setting, a setting given twice, or one that
            is none or of the data and seeds, which all variants share.
    """
    variants: dict[str, dict] = {}
    for name, *settings in given:
        if name in (*variants, AS_IT_IS, DIFFULT.reference, SAU.reference):
            raise ValueError(f"--variant {name}: there is one of this name; choose another")
        pairs = [tuple(text.split("=", 1)) for text in settings]
        if not pairs or any(len(pair) < 2 for pair in pairs):
            raise ValueError(
                f"--variant {name}: expected PARAMETER=VALUE after the name, got {settings or 'nothing'}"
            )
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"--variant {name}: expected each parameter once, got {settings}")
        values = parse_parameters(pairs, config)
        changes = by_path(values)
        named = zip(values, changes, strict=True)
        shared = [given for given, path in named if path.split(".")[0] in _SHARED]
        if shared:
            raise ValueError(
                f"--variant {name}: {shared[0]} must be one for all variants; use --set instead"
            )
        variants[name] = changes
    return variants


def _refuse_equal(pipeline: Pipeline, variants: dict[str, dict], of: Subject) -> None:
    """Raise where two rows would be of one and the same training, or could not be trained."""
    named: dict[str, str] = {}
    for name, changes in {AS_IT_IS: {}, **variants}.items():
        planner = Planner(pipeline.store)
        pipeline.vary(changes).plan(planner, [of.trained])
        key = list(planner.nodes)[-1]
        if key in named:
            raise ValueError(
                f"--variant {name}: expected a setting that changes {of.words}, got "
                f"{_words(changes)}, which trains the same as {named[key]}"
            )
        named[key] = name


def report_choice(
    pipeline: Pipeline,
    report: Report,
    variants: dict[str, dict],
    judges: dict[int, Pipeline],
    item: str = "choose",
    of: Subject = DIFFULT,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write and return the table item, and the differences to its reference and to the profile, paired
    by seed.

    Args:
        variants: name -> changes of the configuration. judges: seed -> the pipeline whose validation
            images decide. item: the table's name; item_differences is the other's. of: what is trained.
    """
    rows = _rows(pipeline, variants, of)
    experiment, found = Experiment(pipeline, rows).build(), []
    for seed, name, variant in experiment.plan():
        p = experiment.at(name, seed)
        scores = accuracy(judges[seed], getattr(p, variant.trained)(), "val")
        extra = _extra(p, judges[seed], of) if variant.trained == of.trained else {}
        found.append({"variant": name, "seed": seed, **scores, **extra})
    runs = pd.DataFrame(found)
    n_images = len(load_split(judges[experiment.seeds[0]].data(), "val").labels)
    changed = "; ".join(f"{name}: {_words(changes)}" for name, changes in variants.items())
    table = report.table(
        item,
        summarise(runs, "variant", list(runs.columns[2:])),
        f"Top-1 accuracy in % on {n_images:,} validation images. {_draws(pipeline)} {group_rule(pipeline)} "
        f"{of.caption} {changed}".strip(),
        runs,
    )
    told = {"overall": "overall", "few": "few-shot"}
    ahead = contrasts(runs, list(rows)[1:], [of.reference, AS_IT_IS], told, by="variant")
    return table, report.table(
        f"{item}_differences", ahead, f"Differences of table {item} in points, paired by seed"
    )


def _rows(pipeline: Pipeline, variants: dict[str, dict], of: Subject) -> dict[str, Variant]:
    """What is compared: the reference for as many updates of the weights as the profile, the profile,
    and its variants."""
    if of is SAU:
        alike = {"classifier.method": "ce", "classifier.omega": 1.0, **pipeline.as_long_as_sau()}
        reference = Variant(alike, "train_on_synthetic")
    else:
        equal = pipeline.as_long_on_real()["equal updates"]
        reference = Variant({"classifier.method": "bsce", **equal}, "train_on_real")
    named = {AS_IT_IS: {}, **variants}
    return {
        of.reference: reference,
        **{name: Variant(changes, of.trained) for name, changes in named.items()},
    }


def _extra(p: Pipeline, judge: Pipeline, of: Subject) -> dict[str, float]:
    """What is told of a training beside its accuracy, by column."""
    if of is SAU:
        return {"noise": noise_share(p)}
    return dict(zip(_COPIES, _copies(p, judge), strict=True))


def _words(changes: dict) -> str:
    return ", ".join(f"{name} = {value}" for name, value in changes.items())


def _draws(pipeline: Pipeline) -> str:
    """Which draws of the data decide, and whether the profile's own tables are of them."""
    own, usual = (
        {config.model_copy(update={"seed": seed}).draw for seed in config.seeds}
        for config in (pipeline.config, load_config(pipeline.config.profile))
    )
    told = (
        "which the profile's own tables have too"
        if own & usual
        else "which none of the profile's tables has"
    )
    return f"Data seeds {', '.join(map(str, sorted(own)))}, {told}."


def _judge(pipeline: Pipeline, seed: int, n_val: int | None) -> Pipeline:
    """The pipeline whose data's validation part decides; n_val: images of each class, None is the profile's.

    Raises:
        ValueError: there are not as many, or a class has none.
    """
    own = pipeline.vary({"seed": seed})
    judge = own if n_val is None else own.vary({"data.n_val": n_val})
    val = load_split(judge.data(), "val")
    each = np.bincount(val.labels, minlength=len(val.class_names))
    if n_val is not None and (each != n_val).any():
        theirs = each.any() and np.array_equal(val.labels, load_split(own.data(), "val").labels)
        if theirs or own.config.data.n_max is None:
            raise ValueError(
                "--n-val: expected data whose cut leaves images out, got "
                f"{'a validation part of their own' if theirs else 'none that are cut'}; leave it out"
            )
        raise ValueError(
            f"--n-val: expected {n_val} validation images of each class outside the training part, "
            f"found {each.min()} to {each.max()}; lower it or n_max"
        )
    if not each.all():
        without = ", ".join(val.class_names[c] for c in np.flatnonzero(each == 0)[:5])
        raise ValueError(
            f"expected validation images of each class, got none of {without}; give each class some"
        )
    return judge


def _copies(p: Pipeline, judge: Pipeline) -> tuple[float, float]:
    """Share in % of the few-shot classes' generated images that are as near to a training image as copies
    are, and what new images would have; nan where there are none of either."""
    data, samples = p.config.data, p.generate()
    train, val = (load_split(judge.data(), name) for name in ("train", "val"))
    few = shot_groups(train.class_counts, data.many_above, data.few_below)["few"]
    made, others = rows_alike(samples.array("labels"), val.labels, few)
    if not len(made):
        return float("nan"), float("nan")
    device, flip = p.store.context.device_here, p.config.diffusion.flip
    images = samples.array("images")[made], val.images[others], train.images
    found = memorisation(*images, device, mirrored=flip)
    return found.share, found.expected


if __name__ == "__main__":
    sys.exit(main())
