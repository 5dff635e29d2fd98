"""The claims of the two papers and questions of our own, each computed from the rows of one table's
CSV: its effect, the interval over the seeds, and a verdict. To add one is to add an entry to CLAIMS."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..engine.files import atomic_write, file_sha256
from ..engine.provenance import commit, environment
from .differences import Difference, interval, paired_difference, within_correlation
from .items import (
    AS_LONG_AS_SAU,
    AT_SAUS_RATES,
    PAPERS_GENERATORS,
    SAME_IMAGES,
    paper_rows,
    table_files,
)
from .numbers import mean_and_interval, seeds_in_words

__all__ = [
    "CLAIMS",
    "Claim",
    "judge",
    "judge_all",
    "lower_fid_goes_with_accuracy",
    "side_by_side",
    "write_claims",
]


@dataclass(frozen=True)
class Claim:
    """text: what is claimed, by a paper or asked by us, so that a positive effect speaks for it. item: whose CSV decides.
    effect: of its rows; raises KeyError where a variant was not run. paper: the effect in the paper
    itself, on its own data, nan where its numbers are not known to us."""

    text: str
    item: str
    effect: Callable[[pd.DataFrame], Difference]
    unit: str = "points"
    paper: float = float("nan")


def judge(claim: Claim, folder: Path) -> dict:
    """A row of the claims' table, from figures/<profile>/: empty where the item is not made.

    Raises:
        OSError: a CSV that is damaged.
    """
    path = folder / f"{claim.item}.csv"
    try:
        found = claim.effect(_rows(path)) if path.exists() else interval([])
    except KeyError:  # a variant that this profile does not run
        found = interval([])
    except (TypeError, ValueError) as error:
        raise OSError(
            f"{path} is damaged ({error}); restore it, or run its notebook with --force"
        ) from None
    verdict = {"larger": "supported", "smaller": "contradicted"}.get(found.verdict, "undecided")
    return {
        "claim": claim.text,
        "item": claim.item,
        "unit": claim.unit,
        "effect": found.mean,
        "low": found.low,
        "high": found.high,
        "seeds": found.n,
        "verdict": verdict if found.n else "not measured",
        "paper": claim.paper,
    }


def _rows(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path)
    if rows.empty:
        raise ValueError("no rows")
    return rows


def judge_all(folder: Path) -> pd.DataFrame:
    """Every claim, a row each, in the order of CLAIMS."""
    return pd.DataFrame([judge(claim, Path(folder)) for claim in CLAIMS])


def write_claims(folder: Path, profile: str) -> None:
    """Write claims.csv, .md, .tex and .json from the CSVs that are in figures/<profile>/; nothing
    where there are none of them."""
    sources = sorted({c.item for c in CLAIMS if (folder / f"{c.item}.csv").exists()})
    if not sources:
        return
    found = judge_all(folder)
    caption = (
        "Claims of the papers and questions of our own (without a number of the paper: it is not known to "
        "us, or the question is ours), and what this profile's runs say: the mean effect over the seeds, "
        "its 95 % interval (t distribution, each claim by itself), and supported or contradicted where "
        f"that leaves out 0 (profile {profile}{_changed(folder, sources)}; not comparable with the paper, "
        "whose effects are on other data, but for their direction)"
    )
    for kind, text in table_files("claims", _shown(found), caption, found).items():
        atomic_write(folder / f"claims.{kind}", text)
    record = {
        "item": "claims",
        "caption": caption,
        "commit": commit(),
        "environment": environment("cpu"),
        "sources": {item: file_sha256(folder / f"{item}.csv") for item in sources},
    }
    atomic_write(folder / "claims.json", json.dumps(record, indent=1) + "\n")


def _changed(folder: Path, sources: list[str]) -> str:
    """The settings of the tables that are not their profile's, as their labels have them."""
    changed = []
    for path in (folder / f"{item}.json" for item in sources):
        try:
            record = json.loads(path.read_text("utf-8")) if path.exists() else {}
            changed.append([str(word) for word in record.get("changed", [])])
        except (ValueError, AttributeError, TypeError) as error:
            raise OSError(
                f"{path} is damaged ({error}); restore it, or run its notebook with --force"
            ) from error
    words = ", ".join(dict.fromkeys(word for words in changed for word in words))
    return f" with {words}" if words else ""


def side_by_side(figures: Path) -> None:
    """Write claims.md into figures/: every claim, and what each profile with a claims.csv says of it,
    beside the paper's own number; smoke's, which mean nothing, are left out. Nothing where there are
    none."""
    profiles = sorted(path.parent for path in figures.glob("*/claims.csv"))
    found = {p.name: judge_all(p) for p in profiles if p.name != "smoke"}
    if not found:
        return
    first = next(iter(found.values()))
    columns = {"claim": [_claim(row) for row in first.itertuples()]}
    for profile, rows in found.items():
        columns[profile] = [_told(row) for row in rows.itertuples()]
    columns["paper"] = [_paper(row) for row in first.itertuples()]
    caption = (
        "Effects, in points where a claim names nothing else, their 95 % intervals over the seeds (t "
        "distribution, each claim by itself), and supported or contradicted where the interval leaves out 0. "
        "Which classes are many- and few-shot is each profile's own (many_above, few_below); the seeds of "
        "ImageNet-LT's shape share one long tail. Empty: not measured. The paper's are on other data: only "
        "the direction can be compared"
    )
    text = table_files("claims", pd.DataFrame(columns), caption)["md"]
    atomic_write(figures / "claims.md", text)


def _shown(found: pd.DataFrame) -> pd.DataFrame:
    """The table as it is read."""
    texts = [
        {
            "claim": _claim(row),
            "effect": _effect(row),
            "seeds": str(row.seeds) if row.seeds else "",
            "verdict": row.verdict,
            "paper": _paper(row),
            "from": row.item,
        }
        for row in found.itertuples()
    ]
    return pd.DataFrame(texts)


def _claim(row) -> str:
    return row.claim if row.unit == "points" else f"{row.claim} ({row.unit})"


def _told(row) -> str:
    """Verdict and effect in one cell."""
    if not row.seeds:
        return ""
    return f"{row.verdict}: {_effect(row)}, {seeds_in_words(row.seeds)}"


def _effect(row) -> str:
    """Effect and interval."""
    if not row.seeds:
        return ""
    effect, ends = mean_and_interval(row.effect, row.low, row.high, _digits(row))
    return f"{effect} ({ends})" if row.seeds > 1 else effect


def _paper(row) -> str:
    return "" if pd.isna(row.paper) else f"{row.paper:+z.{_digits(row)}f}"


def _digits(row) -> int:
    return 1 if row.unit == "points" else 2


def _ahead(a: str, b: str, by: str, value: str = "overall"):
    """The effect a - b of two variants; where a table has several ratios r, at the largest of those that
    have the most seeds."""

    def effect(rows: pd.DataFrame) -> Difference:
        if "r" in rows:
            n_seeds = rows.groupby("r")["seed"].nunique()
            rows = rows[rows["r"] == n_seeds[n_seeds == n_seeds.max()].index.max()]
        return paired_difference(rows, a, b, by, value)

    return effect


def _on_resnet10(a: str, b: str):
    """The effect a - b of table08, with one of its networks."""
    return lambda rows: paired_difference(rows[rows["network"] == "ResNet-10"], a, b)


def _sau_ahead(rows: pd.DataFrame) -> Difference:
    """The effect of SAU in table14, against cross-entropy with as many updates, at its own rates or at
    SAU's: the smaller of the two."""
    methods = set(rows["method"])
    rivals = [AS_LONG_AS_SAU if AS_LONG_AS_SAU in methods else SAME_IMAGES]
    rivals += [AT_SAUS_RATES] if AT_SAUS_RATES in methods else []
    return min((_ahead("SAU", rival, "method")(rows) for rival in rivals), key=lambda d: d.mean)


def _parts_of_sau(a: str, b: str):
    """The effect a - b of table15, whose first row is called _SAU here: both branches, and what the
    profile does with noise."""
    ahead = _ahead(a, b, "variant")
    return lambda rows: ahead(rows.replace({"variant": {rows["variant"].iloc[0]: _SAU}}))


def lower_fid_goes_with_accuracy(rows: pd.DataFrame) -> Difference:
    """Minus the correlation of FID and accuracy over the paper's four generators, seed by seed; its
    interval on Fisher's scale. rows: of table01, a model and seed each."""
    generators = rows.set_index("model", drop=False).loc[list(PAPERS_GENERATORS)]
    by_seed = np.array(within_correlation(generators, "FID", "accuracy")[2], float)
    z = interval(np.arctanh(np.clip(-by_seed[~np.isnan(by_seed)], -0.999, 0.999)))
    mean, low, high = (float(np.tanh(end)) for end in (z.mean, z.low, z.high))
    return Difference(mean, low, high, z.n, z.n_ahead)


def _ood_harms(rows: pd.DataFrame) -> Difference:
    """Minus what 1,000 added OOD images are worth."""
    return interval(-rows.set_index("added").loc[["OOD"], _GAIN].dropna())


def _published(item: str, a: str, b: str | None, column: str, scale: float = 1) -> float:
    """a - b (or a alone) of the paper's own numbers of a table, nan where one of them is unknown."""
    known = paper_rows(item)[column]
    return scale * float(known[a] - known[b] if b else known[a])


def _published_correlation() -> float:
    """Minus the correlation of FID and accuracy over the paper's four generators."""
    known = paper_rows("table01").loc[list(PAPERS_GENERATORS)]
    return -float(known["FID"].corr(known["accuracy"]))


_PER_1000, _GAIN = "per 1,000 images", "gain per 1,000 samples"
_FULL, _NO_WEIGHT = "Gen + L_AID + Filt + Weight", "Gen + L_AID + Filt"
_SAU = "SAU"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        "DiffuLT is ahead of cross-entropy, overall", "table07",
        _ahead("DiffuLT", "cross-entropy", "method", "overall"),
        paper=_published("table07", "DiffuLT", "cross-entropy", "overall"),
    ),
    Claim(
        "DiffuLT is ahead of cross-entropy on the few-shot classes", "table07",
        _ahead("DiffuLT", "cross-entropy", "method", "few"),
    ),
    Claim(
        "The many-shot classes pay for it", "table07",
        _ahead("cross-entropy", "DiffuLT", "method", "many"),
    ),
    Claim(
        "DiffuLT is ahead of BSCE, a loss for long tails, for as many updates, overall",
        "table07_lengths", _ahead("DiffuLT", "BSCE, equal updates", "variant", "overall"),
    ),
    Claim(
        "DiffuLT is ahead of BSCE, for as many updates, on the few-shot classes", "table07_lengths",
        _ahead("DiffuLT", "BSCE, equal updates", "variant", "few"),
    ),
    Claim(
        "A generator of lower FID gives a better classifier", "table01",
        lower_fid_goes_with_accuracy, "minus the correlation over four", _published_correlation(),
    ),
    Claim(
        "L_CBDM (tau = 1) is ahead of plain DDPM", "table01",
        _ahead("CBDM tau=1", "DDPM", "model", "accuracy"),
        paper=_published("table01", "CBDM tau=1", "DDPM", "accuracy"),
    ),
    Claim(
        "An AID image is worth more than an ID one", "table03",
        _ahead("AID", "ID", "added", _GAIN), _PER_1000, _published("table03", "AID", "ID", "gain per sample", 1000),
    ),
    Claim(
        "An ID image is worth more than an OOD one", "table03",
        _ahead("ID", "OOD", "added", _GAIN), _PER_1000, _published("table03", "ID", "OOD", "gain per sample", 1000),
    ),
    Claim(
        "OOD images harm", "table03", _ood_harms, _PER_1000,
        _published("table03", "OOD", None, "gain per sample", -1000),
    ),
    Claim(
        "L_CBDM (tau = 1) makes fewer OOD images than plain DDPM", "table02",
        _ahead("DDPM", "CBDM tau=1", "model", "OOD"),
        paper=_published("table02", "DDPM", "CBDM tau=1", "OOD"),
    ),
    Claim(
        "DiffuLT, with the tau of its profile, makes more AID images than L_CBDM with tau = 1", "table05",
        _ahead("DiffuLT", "CBDM tau=1", "model", "AID"),
    ),
    Claim(
        "Data of the head classes help the tail", "table04", _ahead("100", "0", "p_h", "few"),
        paper=_published("table04", "100", "0", "tail"),
    ),
    Claim(
        "Data of the head classes make more AID images", "table04",
        _ahead("100", "0", "p_h", "AID"), paper=_published("table04", "100", "0", "AID"),
    ),
    Claim(
        "The filter helps", "table09",
        _ahead(_NO_WEIGHT, "Gen + L_AID", "parts", "accuracy"),
    ),
    Claim(
        "The weight omega helps", "table09", _ahead(_FULL, _NO_WEIGHT, "parts", "accuracy"),
        paper=_published("table09", _FULL, _NO_WEIGHT, "accuracy"),
    ),
    Claim(
        "L_AID makes more AID images", "table07_parts",
        _ahead("DiffuLT", "without L_AID", "variant", "AID"),
    ),
    Claim(
        "L_AID raises the accuracy", "table07_parts", _ahead("DiffuLT", "without L_AID", "variant"),
    ),
    Claim(
        "Generated images add to another loss (BSCE)", "table16",
        _ahead("weak, BSCE, with generated", "weak, BSCE, real alone", "variant"),
    ),
    Claim(
        "Generated images add to strong augmentation and BSCE", "table16",
        _ahead("strong, BSCE, with generated", "strong, BSCE, real alone", "variant"),
    ),
    Claim(
        "DiffuLT, weakly augmented, is ahead of strong augmentation and BSCE without generated images", "table16",
        _ahead("weak, cross-entropy, with generated", "strong, BSCE, real alone", "variant"),
    ),
    Claim(
        "Generated images add to RIDE (3 experts)", "table13",
        _ahead("DiffuLT + RIDE", "RIDE (3 experts)", "method"),
    ),
    Claim(
        "Generated images add to GPaCo", "table13", _ahead("DiffuLT + GPaCo", "GPaCo", "method"),
    ),
    Claim(
        "DiffuLT on ImageNet-LT's shape is ahead of cross-entropy (ResNet-10)", "table08",
        _on_resnet10("DiffuLT", "cross-entropy"),
        paper=_published("table08", "DiffuLT", "cross-entropy", "ResNet-10"),
    ),
    Claim(
        "DiffuLT's images add to RIDE on that shape (ResNet-10)", "table08",
        _on_resnet10("DiffuLT + RIDE (3 experts)", "RIDE (3 experts)"),
        paper=_published("table08", "DiffuLT + RIDE (3 experts)", "RIDE (3 experts)", "ResNet-10"),
    ),
    Claim(
        "SAU is ahead of cross-entropy on the same real and synthetic images, as many updates (SAU's of four "
        "views); where measured, also at SAU's rates",
        "table14",
        _sau_ahead,
    ),
    Claim(
        "SAU's synthetic-aware branch adds to the other", "table15",
        _parts_of_sau(_SAU, "unaware branch only"),
    ),
    Claim(
        "SAU's synthetic-unaware branch adds to the other", "table15",
        _parts_of_sau(_SAU, "aware branch only"),
    ),
    Claim(
        "SAU's published second draw of prototypes (a leak) flatters", "table15",
        _parts_of_sau("prototypes of a second draw (leak)", _SAU),
    ),
)  # fmt: skip
