"""Tables and figures out: every item under its stable id, in every format, with its provenance
beside it."""

import copy
import functools
import html
import io
import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager
from pandas.api.types import is_integer_dtype
from pandas.io.formats.style import Styler

from ..config import INSTEAD, load_config, setting_paths, vary
from ..engine.files import atomic_write
from ..engine.provenance import ROOT, commit, environment
from ..experiments.pipeline import Pipeline
from ..profiles import IMAGENET_SAMPLE, OWN_IMAGES, PARAMETERS
from .numbers import mean_and_spread, n_digits, seeds_in_words

__all__ = [
    "AS_LONG_AS_SAU",
    "AT_SAUS_RATES",
    "COLOURS",
    "GENERATORS",
    "PAPERS_GENERATORS",
    "STYLE",
    "Report",
    "as_markdown",
    "over_seeds",
    "paper_rows",
    "picture_files",
    "summarise",
    "table_files",
    "with_unfinished",
]

# Okabe-Ito, and four of Tol's muted ones, safe for colour-blind readers; one colour per model, sample
# type, shot group and strategy of SAU, in every figure.
COLOURS = {
    "real": "#000000",
    "cross-entropy": "#7f7f7f",
    "DiffuLT": "#D55E00",
    "DDPM, 1/8 of the steps": "#F0E442",
    "DDPM, 1/3 of the steps": "#E69F00",
    "DDPM": "#0072B2",
    "CBDM tau=3": "#56B4E9",
    "CBDM tau=2": "#009E73",
    "CBDM tau=1": "#CC79A7",
    "ID": "#0072B2",
    "AID": "#D55E00",
    "OOD": "#999999",
    "many": "#0072B2",
    "medium": "#E69F00",
    "few": "#D55E00",
    "pos_neg": "#882255",
    "neg_only": "#44AA99",
    "drop": "#999933",
    "trust": "#332288",
}
# The generators that the paper compares, as variations of the method.
GENERATORS: dict[str, dict] = {
    "DDPM": {"diffusion.tau": 0.0, "diffusion.alpha": 0.0},
    "CBDM tau=3": {"diffusion.tau": 3.0, "diffusion.alpha": 0.0},
    "CBDM tau=2": {"diffusion.tau": 2.0, "diffusion.alpha": 0.0},
    "CBDM tau=1": {"diffusion.tau": 1.0, "diffusion.alpha": 0.0},
    "DiffuLT": {},
}
PAPERS_GENERATORS = tuple(GENERATORS)[:4]  # the paper has their FID and accuracy
# Of a configuration, what every label says in its own words, and the repeats, which captions count.
_ON_ITS_FACE = {
    f"data.{name}" for name in ("name", "path", "n_classes", "n_max", "imb_ratio", "image_size")
} | {"seeds", "seed", "n_draws"}
_REPLACED_BY = {epochs: steps for steps, epochs in INSTEAD.items()}
# Rows of table14, which the claims read.
SAME_IMAGES = "cross-entropy + synthetic"
AS_LONG_AS_SAU = f"{SAME_IMAGES}, as long as SAU"
AT_SAUS_RATES = f"{SAME_IMAGES}, SAU's rates"
# A folder has the name of its path, which may say what it holds.
_DATA_NAMES = {
    "digits": "digits (embedded)",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "fashion_mnist": "Fashion-MNIST",
    "imagenet_lt": "ImageNet-LT",
}
_UNFINISHED = {"DDPM, 1/8 of the steps": 8, "DDPM, 1/3 of the steps": 3}
# For names that matplotlib's own font has no letters of: those of these that the machine has.
_OTHER_LETTERS = [
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Arabic",
    "Arial Unicode MS",
]
STYLE = {
    "font.family": [
        "DejaVu Sans",
        *filter(set(font_manager.get_font_names()).__contains__, _OTHER_LETTERS),
    ],
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "svg.hashsalt": "difflt",
    "pdf.fonttype": 42,
}


class Report:
    """Writes the items of one notebook into figures/<profile>/.

    Args:
        pipeline: whose configuration, device and used artifacts stand beside each item.
        out: folder that holds figures/; by default the checkout.
    """

    def __init__(self, pipeline: Pipeline, out: str | Path = ""):
        self.pipeline, self.config = pipeline, pipeline.config
        self.folder = Path(out or ROOT) / "figures" / self.config.profile
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written: list[Path] = []
        mpl.rcParams.update(STYLE)

    def first_seed(self) -> "Report":
        """For items that have the first seed alone: their label says so of the draws."""
        other = copy.copy(self)
        other.config = vary(self.config, {"seeds": self.config.seeds[:1]})
        return other

    @property
    def comparable(self) -> bool:
        """Whether numbers may stand beside one of the paper's."""
        return any(self.measured_on(setting, self.config.data.imb_ratio) for setting in _settings())

    def measured_on(self, setting: dict, imb_ratio: float | None) -> bool:
        """Whether results of this run at a ratio r are comparable with the paper's numbers: the same
        data set, r and backbone, with the profile's own recipe.

        Args:
            setting: data, imb_ratio and arch; arch None is any, where columns are named by networks.
        """
        profile, data = self.config.profile, self.config.data
        if profile.removesuffix("-fast") not in ("cifar10", "cifar100", "imagenet"):
            return False
        free = {
            "data.path": "",
            "data.imb_ratio": 100.0,
            "seeds": (0,),
            "seed": 0,
            "data_seed": 0,
        }
        if profile == "imagenet":
            free.pop("data.imb_ratio")
        own = data.name, imb_ratio, setting["arch"] and self.config.classifier.arch
        same = own == (setting["data"], setting["imb_ratio"], setting["arch"])
        return same and vary(self.config, free) == vary(load_config(profile), free)

    @property
    def label(self) -> str:
        """What stands on the face of every item."""
        data = self.config.data
        name = _DATA_NAMES.get(data.name) or Path(data.path).name or data.name
        name = "CIFAR-10 (JPEG)" if self.config.profile == "cifar10-jpeg" else name
        if data.name == "imagenet_lt" and self.config.profile in IMAGENET_SAMPLE:
            name = "digits (embedded) as an ImageNet-shaped folder"
        elif data.name == "folder" and self._is_of_digits():
            name = "digits (embedded) as a folder"
        elif data.name != "digits":
            name += f", {data.image_size} px"
        cut = f"r = {data.imb_ratio:g}" if data.imb_ratio else "as it is"
        if data.imb_ratio and data.n_max:
            cut = f"n_max {data.n_max}, {cut}"
        text = f"{name}, {cut}, profile {self.config.profile}"
        if changed := self._changed():
            text += f" with {', '.join(changed)}"
        if self.config.diffusion.seed is not None:
            text += ", one generator for all repeats"
        n_draws = min(self.config.n_draws, len(self.config.seeds))
        if n_draws > 1:
            text += f", {n_draws} draws of the long tail"
        return text if self.comparable else f"{text}; not comparable with the paper"

    @property
    def generators(self) -> str:
        """How the generators of this run are trained and sampled, for captions that call them DDPM and
        CBDM: what tells them from each other is L_CBDM and L_AID alone."""
        recipe, sampling = self.config.diffusion, self.config.sampling
        kind = {"edm": "EDM's preconditioning", "eps": "DDPM's noise prediction"}
        text = (
            f"All generators: {kind[recipe.parameterisation]}, {recipe.n_steps:,} steps of training"
        )
        if recipe.plain_share:
            text += f", L_CBDM and L_AID in the last {100 * (1 - recipe.plain_share):.0f} % of them"
        labels = "all classes alike" if recipe.cbdm_labels == "uniform" else "the training labels"
        text += f", y' from {labels}; {sampling.n_steps} steps of {sampling.sampler}"
        if sampling.guidance > 1:
            text += f", guidance {sampling.guidance:g}"
        return f"{text}."

    def _is_of_digits(self) -> bool:
        """Whether a folder is the one that notebook 12 makes of the digits, not the user's own."""
        sample = Path(self.config.data.path).name.startswith(f"{OWN_IMAGES}-")
        return sample and self.config.profile in IMAGENET_SAMPLE

    def _changed(self) -> list[str]:
        """The settings that are not the profile's, but for those that a label says anyway."""
        usual, found = load_config(self.config.profile), []
        if self.config.data.name == "imagenet_lt":
            of_sample = IMAGENET_SAMPLE.get(self.config.profile, {})
            usual = vary(usual, {k: v for k, v in of_sample.items() if k != "n_seeds"})
        names = {path: name for name, path in PARAMETERS.items()}
        for path in setting_paths(self.config.model_dump()):
            mine, theirs = map(attrgetter(path), (self.config, usual))
            if mine == theirs or path in _ON_ITS_FACE:
                continue
            part, _, leaf = path.rpartition(".")
            if mine is None and leaf in _REPLACED_BY:
                path = f"{part}.{_REPLACED_BY[leaf]}"
                mine = attrgetter(path)(self.config)
            value = f"{mine:g}" if isinstance(mine, float) else mine
            found.append(f"{names.get(path, path)} = {value}")
        return list(dict.fromkeys(found))

    def header(self) -> Styler:
        """Versions, device and seeds, each in full, to show at the top of a notebook."""
        env = environment(self.pipeline.store.context.device_here)
        rows = {
            "profile": self.config.profile,
            "data": self.label,
            "device": f"{env['device']} ({env['hardware']})",
            "seeds": ", ".join(map(str, self.config.seeds)),
            "commit": env["commit"] or "not a git checkout",
            "python": env["python"],
            **env["packages"],
        }
        return pd.DataFrame({"": rows}).style.format(escape="html")

    def table(
        self,
        item: str,
        table: pd.DataFrame,
        caption: str,
        values: pd.DataFrame | None = None,
        best: dict[str, str] | None = None,
    ) -> pd.DataFrame:
        """Write <item>.csv, .md, .tex and .json, and return the table to show. A column without a
        number is left out, and named below the table.

        Args:
            item: stable id, e.g. "table07". table: as it should be read; text cells may hold mean ±
                spread.
            values: the numbers behind it, one row per run; they go into the csv (the table itself
                when None).
            best: "max" or "min" by column, e.g. {"accuracy": "max", "FID": "min"}: its best mean, as
                it is written, is bold in the .md and the .tex. Equal ones are bold together; where rows
                have a spread, one of a single seed is not in the running.

        Raises:
            ValueError: best names no column of the table, or no direction.
        """
        table, best = _measured(table, best)
        face, note = f"{caption} ({self.label})", table.attrs.get("note", "")
        for kind, text in table_files(item, table, face, values, best, note).items():
            self._write(f"{item}.{kind}", text)
        self._provenance(item, caption)
        return table.apply(_texts)

    def figure(self, item: str, figure, caption: str) -> None:
        """Write <item>.png, .pdf and .json, with the label below the picture."""
        figure.draw_without_rendering()  # so that the layout is known, and then stays
        figure.set_layout_engine("none")
        for legend in figure.legends:  # which would follow the edge when the picture is cut
            legend.set_bbox_to_anchor((0, 0, 1, 1), figure.transFigure)
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        corner = drawn.x1 / width, drawn.y0 / height - 0.01
        face = textwrap.fill(self.label, 180)
        figure.text(*corner, face, ha="right", va="top", size=6, color="0.5", parse_math=False)
        for kind, content in picture_files(figure).items():
            self._write(f"{item}.{kind}", content)
        self._provenance(item, caption)

    def with_paper(
        self, table: pd.DataFrame, known: pd.DataFrame, ratios: Iterable[float | None] | None = None
    ) -> pd.DataFrame:
        """The table with the paper's columns at its right, in the rows that were measured on the same
        data set, r and backbone; without them where no row was. A line below the table says which.

        Args:
            table: rows under the names that the paper's have; a row that the paper lacks stays empty.
            known: rows and columns of `paper_rows`.
            ratios: r of each row; None is the configuration's.
        """
        ratios = [self.config.data.imb_ratio] * len(table) if ratios is None else ratios
        same = [self.measured_on(known.attrs["on"], r) for r in ratios]
        joined, setting = table.copy(), known.attrs["setting"]
        if any(same):
            paper = known.add_prefix("paper: ").reindex(table.index)
            paper[~np.array(same)] = np.nan
            joined = pd.concat([table, paper], axis=1)
            joined.attrs["note"] = f"paper: measured on {setting}."
            if self.config.profile.endswith("-fast"):
                joined.attrs["note"] += " Here the generator is trained by our recipe, not DDPM's."
        else:
            joined.attrs["note"] = (
                f"The paper's numbers for this table are of {setting}; none stands here, beside "
                "results of other data, another r, backbone or recipe."
            )
        return joined

    def paths(self) -> str:
        return "\n".join(str(p) for p in self.written)

    def _provenance(self, item: str, caption: str) -> None:
        used = self.pipeline.used
        manifests = {name: a.manifest for name, a in sorted(used.items())}
        record = {
            "item": item,
            "caption": caption,
            "label": self.label,
            "changed": self._changed(),
            "comparable_with_paper": self.comparable,
            "commit": commit(),
            "seeds": list(self.config.seeds),
            "elapsed_s": round(
                sum(m["elapsed_s"] for m in manifests.values()), 1
            ),  # of all stages used
            "environment": environment(self.pipeline.store.context.device_here),
            "config": self.config.model_dump(mode="json"),
            "artifacts": {
                name: {
                    "elapsed_s": m["elapsed_s"],
                    "commit": m["environment"]["commit"],
                    "hardware": m["environment"]["hardware"],
                }
                for name, m in manifests.items()
            },
        }
        self._write(f"{item}.json", json.dumps(record, indent=1) + "\n")

    def _write(self, name: str, data: str | bytes) -> None:
        atomic_write(self.folder / name, data)
        self.written.append(self.folder / name)


def table_files(
    item: str,
    table: pd.DataFrame,
    face: str,
    values: pd.DataFrame | None = None,
    best: dict[str, str] | None = None,
    note: str = "",
) -> dict[str, str]:
    """A table's csv, md and tex, by kind. face: its caption as it is shown; the rest as for
    Report.table."""
    numbers = table if values is None else values
    shown = table.apply(_texts)
    bold = _best(shown, best or {})
    return {
        "csv": numbers.to_csv(index=values is None, float_format="%.4f", lineterminator="\n"),
        "md": f"**{item}.** {as_markdown(face)}\n\n{_markdown(shown, bold, note)}\n",
        "tex": _latex(shown, bold, note, _tex(face), f"tab:{item}"),
    }


def picture_files(figure) -> dict[str, bytes]:
    """A figure's png and pdf, by kind; the same figure gives the same bytes."""
    found = {}
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, bbox_inches="tight", metadata=metadata)
        found[kind] = buffer.getvalue()
    return found


def summarise(runs: pd.DataFrame, by: str | list[str], columns: list[str]) -> pd.DataFrame:
    """Rows of one value per seed to "mean ± standard deviation" per group, in order of first
    appearance; a column's numbers have the same number of decimals.

    A column of integers holds counts: no decimals, and no spread where all seeds have the same.
    """
    shown = {}
    for column in columns:
        digits = 0 if is_integer_dtype(runs[column]) else n_digits(runs[column])
        values = runs.astype({column: float}).groupby(by, sort=False)[column]
        shown[column] = values.agg(mean_and_spread, digits)
    return pd.DataFrame(shown)


def over_seeds(seeds: Sequence[int], of_ratios: Iterable[Sequence[int]] = ()) -> str:
    """What a caption says of such cells: "mean ± standard deviation over 3 seeds", or "one seed".

    Args:
        of_ratios: the seeds of each ratio r in the table; some may have the first alone.
    """
    spread = "mean ± standard deviation over " if len(seeds) > 1 else ""
    fewer = " (other ratios: one)" if any(own != seeds for own in of_ratios) else ""
    return spread + seeds_in_words(len(seeds)) + fewer


def with_unfinished(n_steps: int) -> dict[str, dict]:
    """GENERATORS, and before them DDPMs whose training, of n_steps, ends early: figure 1 needs
    generators of every quality."""
    early = {
        name: {**GENERATORS["DDPM"], "diffusion.n_steps": max(1, n_steps // part)}
        for name, part in _UNFINISHED.items()
    }
    return early | GENERATORS


def paper_rows(item: str) -> pd.DataFrame:
    """The paper's numbers for an item, unknown cells empty; attrs["setting"] says in words what they
    were measured on, attrs["on"] as Report.measured_on takes it."""
    entry = _paper()[item]
    frame = pd.DataFrame.from_dict(
        entry["rows"], orient="index", columns=entry["columns"], dtype=float
    )
    frame.attrs |= {"setting": entry["setting"], "on": entry["on"]}
    return frame


@functools.cache
def _paper() -> dict:
    return json.loads((Path(__file__).parent / "paper.json").read_text())["diffult"]


def _settings() -> list[dict]:
    """What any of the paper's numbers was measured on."""
    return [entry["on"] for entry in _paper().values() if isinstance(entry, dict)]


def _measured(
    table: pd.DataFrame, best: dict[str, str] | None
) -> tuple[pd.DataFrame, dict[str, str] | None]:
    """The table and its best without the columns in which nothing was measured, named in its note."""
    texts = table.apply(_texts)
    empty = [name for name in texts if len(texts) and (texts[name] == "").all()]
    if not empty:
        return table, best
    kept = table.drop(columns=empty)
    notes = (table.attrs.get("note", ""), f"Not measured on these data: {', '.join(empty)}.")
    kept.attrs["note"] = " ".join(filter(None, notes))
    return kept, best and {name: way for name, way in best.items() if name not in empty}


def _texts(column: pd.Series) -> pd.Series:
    """Cells as text: nothing for nan; the floats of a column with as many decimals as the one that
    needs most of them, which is one at least."""
    known = [v for v in column if isinstance(v, float) and np.isfinite(v)]
    digits = max([1, *(_n_decimals(v) for v in known)])
    texts = [_text(v, digits) for v in column]
    return pd.Series(texts, column.index, dtype=object, name=column.name)


def _text(cell, digits: int) -> str:
    if isinstance(cell, float):
        return "" if np.isnan(cell) else f"{cell:.{digits}f}"
    return "" if cell is None or cell is pd.NA else str(cell)


def _n_decimals(value: float) -> int:
    """How many decimals a number has, of six significant digits."""
    text = np.format_float_positional(value, precision=6, fractional=False, trim="-")
    return len(text.partition(".")[2])


def _best(shown: pd.DataFrame, best: dict[str, str]) -> pd.DataFrame:
    """Which cells of a table of texts hold the best mean of their column, bool like shown."""
    bold = pd.DataFrame(False, shown.index, shown.columns)
    for column, direction in best.items():
        if column not in shown.columns or direction not in ("max", "min"):
            raise ValueError(
                f"best: expected 'max' or 'min' for one of {', '.join(map(str, shown.columns))}, got "
                f"{direction!r} for {column!r}"
            )
        means = pd.to_numeric(shown[column].str.partition(" ±")[0], errors="coerce")
        spread = shown[column].str.contains("±")
        if spread.any():  # a row of one seed is no match for a mean
            means = means.where(spread)
        if means.nunique() > 1:
            bold[column] = means == (means.max() if direction == "max" else means.min())
    return bold


def _markdown(shown: pd.DataFrame, bold: pd.DataFrame, note: str) -> str:
    escaped = shown.map(as_markdown)
    cells = escaped.mask(bold, "**" + escaped + "**").rename(columns=as_markdown, index=as_markdown)
    text = cells.to_markdown(index=_is_named(shown), disable_numparse=True)
    return f"{text}\n\n{as_markdown(note)}" if note else text


def _latex(shown: pd.DataFrame, bold: pd.DataFrame, note: str, caption: str, label: str) -> str:
    styled = (
        shown.style.format(escape="latex")
        .format_index(escape="latex")
        .format_index(escape="latex", axis=1)
    )
    if bold.any(axis=None):
        styles = bold.map(lambda best: "textbf:--rwrap;" if best else "")
        styled = styled.apply(lambda _: styles, axis=None)
    if not _is_named(shown):
        styled = styled.hide(axis="index")
    text = styled.to_latex(caption=caption, label=label, hrules=True, position="ht")
    text = re.sub(r"^(?=[\[*])", "{}", text, flags=re.MULTILINE)  # not an option of the row above
    if note:
        below = f"\\\\[2pt]\n{{\\footnotesize {_tex(note)}}}\n\\end{{table}}"
        text = text.replace("\n\\end{table}", f"{below}")
    return text.replace("±", r"$\pm$")


def _is_named(table: pd.DataFrame) -> bool:
    """Whether the rows have names: a mere numbering is not shown."""
    return not isinstance(table.index, pd.RangeIndex)


# What Markdown would take for a tag or an entity: class names hold anything.
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")


def as_markdown(cell):
    """Text as Markdown shows it."""
    if not isinstance(cell, str):
        return cell
    return _MARKUP.sub(lambda found: html.escape(found[0]), cell).replace("|", "\\|")


_TEX = str.maketrans(
    {c: f"\\{c}" for c in "_%&#${}"}
    | {"<": "$<$", ">": "$>$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"\\": r"\textbackslash{}"}
)


def _tex(text: str) -> str:
    """Text of a caption or a note: where it stands alone, TeX's old fonts have no < and >."""
    return text.translate(_TEX)
