"""The two diagrams: the pipeline of DiffuLT (figure 4) and three families of methods (figure 8)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .figures import class_histogram
from .items import COLOURS

__all__ = ["draw_families", "draw_pipeline"]

_INK = "#555555"


def draw_pipeline(pictures: dict[str, np.ndarray]):
    """Figure 4: the five steps as boxes, each with what it produced.

    Args:
        pictures: tiles (see tile) under the keys "data", "generated", "ID", "AID", "OOD".
    """
    fig, ax = plt.subplots(figsize=(12, 4.2))
    ax.set(xlim=(0, 120), ylim=(0, 42))
    ax.axis("off")
    _box(ax, 1, 5, 22, 32, "long-tailed set $D$", "many images of few classes,\nfew images of many")
    _picture(ax, pictures["data"], 2.5, 6.5, 19, 21.5)
    _box(
        ax,
        30,
        28,
        24,
        10,
        "1  extractor $\\varphi_0$",
        "cross-entropy on $D$;\ncentres $\\mu_c$, radii $d_c$",
    )
    _box(
        ax,
        30,
        9,
        24,
        10,
        "2  diffusion model",
        "$L_{DDPM}+L_{CBDM}(\\tau)+\\alpha L_{AID}$\non nothing but $D$",
    )
    _box(ax, 60, 3, 19, 23, "3  generate", "$N_t-n_c$ images per class")
    _picture(ax, pictures["generated"], 61.5, 4.2, 16, 15.5)
    _box(ax, 86, 13, 33, 26, "4  filter by $d=\\|f(x)-\\mu_y\\|\\,/\\,d_y$", "")
    rules = {"ID": "$d\\leq 1$, kept", "AID": "$1<d\\leq 2$, kept", "OOD": "$d>2$, dropped"}
    for i, (name, rule) in enumerate(rules.items()):
        y = 28 - 7 * i
        _picture(ax, pictures[name], 87.5, y, 16, 6)
        ax.text(104.5, y + 3, f"{name}\n{rule}", va="center", fontsize=8.5, color=COLOURS[name])
    _box(
        ax,
        86,
        0.5,
        33,
        8.5,
        "5  classifier on $D\\,\\cup$ kept",
        "a real image weighs 1, a generated one $\\omega$",
    )
    arrows = [
        ((23, 31), (30, 33)),
        ((23, 16), (30, 14)),
        ((42, 28), (42, 19)),
        ((54, 14), (60, 14)),
        ((54, 33), (86, 33)),
        ((79, 18), (86, 18)),
        ((102.5, 13), (102.5, 9)),
    ]
    for start, end in arrows:
        ax.add_patch(_arrow(start, end))
    ax.text(43, 23.5, "$L_{AID}$", fontsize=9, color=_INK, va="center")
    ax.text(70, 34.2, "$\\varphi_0$, $\\mu_c$, $d_c$", fontsize=9, color=_INK, ha="center")
    return fig


def draw_families(class_counts, class_names, many_above: int, few_below: int):
    """Figure 8: a long-tailed histogram, and three families of methods for it."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 3.8), width_ratios=(1, 1.75))
    class_histogram(left, class_counts, class_names, many_above, few_below)
    left.set_title("the problem: a long-tailed training set", loc="left")
    right.set(xlim=(-0.3, 63), ylim=(0, 33))
    right.axis("off")
    rows = [
        (
            "train differently",
            ["$D$"],
            "re-weight, re-sample, margins,\nmore experts (LDAM, BSCE, RIDE)",
        ),
        (
            "bring in outside knowledge",
            ["$D$", "web images or\npre-trained models"],
            "transfer, or generate\nwith them",
        ),
        (
            "DiffuLT",
            ["$D$", "images of a generator\ntrained on $D$ alone"],
            "filter, then weighted\ncross-entropy",
        ),
    ]
    for i, (name, sources, how) in enumerate(rows):
        y, colour = 23 - 11 * i, COLOURS["DiffuLT"] if name == "DiffuLT" else _INK
        right.text(0, y + 8.1, name, fontsize=10.5, weight="bold", color=colour)
        _box(right, 0, y, 6 if len(sources) == 2 else 27, 7, "", sources[0], colour)
        if len(sources) == 2:
            right.text(7.5, y + 3.4, "+", fontsize=14, ha="center", va="center", color=colour)
            _box(right, 9, y, 18, 7, "", sources[1], colour)
        _box(right, 31, y, 22.5, 7, "", how, colour)
        for start, end in ((27, 31), (53.5, 57)):
            right.add_patch(_arrow((start, y + 3.5), (end, y + 3.5), colour))
        right.text(57.5, y + 3.5, "classifier", fontsize=8.5, va="center", color=colour)
    fig.tight_layout()
    return fig


def _arrow(start, end, colour: str = _INK) -> FancyArrowPatch:
    return FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=12, color=colour, lw=1.2, shrinkA=0, shrinkB=0
    )


def _box(ax, x, y, width, height, title: str, text: str, colour: str = _INK) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=1",
            fc="white",
            ec=colour,
            lw=1.3,
        )
    )
    if title:
        ax.text(
            x + width / 2, y + height - 1, title, ha="center", va="top", fontsize=10, weight="bold"
        )
    top = y + height - 4.6 if title else y + height / 2
    ax.text(x + width / 2, top, text, ha="center", va="top" if title else "center", fontsize=8)


def _picture(ax, picture, x, y, width, height) -> None:
    """A picture inside a rectangle of the diagram, its own aspect ratio kept."""
    H, W = picture.shape[:2]
    w, h = (width, width * H / W) if W / H > width / height else (height * W / H, height)
    ax.imshow(
        picture,
        extent=(
            x + (width - w) / 2,
            x + (width + w) / 2,
            y + (height - h) / 2,
            y + (height + h) / 2,
        ),
        interpolation="nearest",
        aspect="auto",
        zorder=3,
    )
