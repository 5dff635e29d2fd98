"""The two diagrams: the pipeline of DiffuLT (figure 4) and three families of methods (figure 8)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from ..selection.sample_types import TYPES
from .figures import class_histogram
from .items import COLOURS

__all__ = ["draw_families", "draw_pipeline"]

_INK = "#555555"
_FAMILIES = {
    "train differently": (
        "",
        "the same images, other losses, sampling\nor experts (LDAM, BSCE, RIDE)",
    ),
    "bring in outside knowledge": ("#bbbbbb", "web images, or images of\na pre-trained model"),
    "DiffuLT": (COLOURS["DiffuLT"], "images of a generator that is\ntrained on these images alone"),
}


def draw_pipeline(
    pictures: dict[str, np.ndarray], aid_factor: float = 2.0, kept: tuple[int, ...] = (0, 1)
):
    """Figure 4: the five steps as boxes, each with what it produced.

    Args:
        pictures: tiles (see tile) under the keys "data", "generated", "ID", "AID", "OOD"; what no
            image is there for is left out.
        aid_factor: where AID ends. kept: indices of TYPES.
    """
    fig, ax = plt.subplots(figsize=(12, 5.7))
    ax.set(xlim=(-0.5, 120.5), ylim=(-5, 52))
    ax.axis("off")
    _box(ax, 0, 7, 25, 38, "long-tailed set $D$", "many of few classes,\nfew of many classes")
    _picture(ax, pictures["data"], 1.5, 8, 22, 28.5)
    _box(ax, 32, 32, 25, 12, "1  extractor $\\varphi_0$",
         "cross-entropy on $D$; class\ncentres $\\mu_c$ and radii $d_c$")  # fmt: skip
    _box(ax, 32, 8, 25, 12, "2  diffusion model",
         "$L_{DDPM} + L_{CBDM}(\\tau) + \\alpha\\, L_{AID}$,\non nothing but $D$")  # fmt: skip
    _box(ax, 64, 0.5, 22, 27, "3  generate", "$N_t - n_c$ images per class")
    _picture(ax, pictures.get("generated"), 65.5, 1.5, 19, 18.5)
    _box(ax, 93, 17.5, 27, 34, "4  filter", "$d = \\|f(x) - \\mu_y\\| \\,/\\, d_y$")
    a = f"{aid_factor:g}"
    for i, rule in enumerate(("$d \\leq 1$", f"$1 < d \\leq {a}$", f"$d > {a}$")):
        name, y = TYPES[i], 36.5 - 9 * i
        told = f"{name},  {rule}: {'kept' if i in kept else 'dropped'}"
        told = told if name in pictures else f"{name},  {rule}: none in this run"
        ax.text(94.5, y + 5.6, told, va="center", fontsize=9, color=COLOURS[name])
        _picture(ax, pictures.get(name), 94.5, y - 0.6, 24, 5)
    _box(ax, 93, 0.5, 27, 11, "5  classifier",
         "on $D$ (weight 1)\nand what is kept (weight $\\omega$)")  # fmt: skip
    arrows = [(25, 38, 32, 38), (25, 14, 32, 14), (44.5, 32, 44.5, 20), (57, 14, 64, 14)]
    arrows += [(57, 38, 93, 38), (86, 22.5, 93, 22.5), (106.5, 17.5, 106.5, 11.5)]
    arrows += [(106.5, -3.5, 106.5, 0.5)]
    ax.plot((12.5, 12.5, 106.5), (7, -3.5, -3.5), color=_INK, lw=1.3)  # D, below the others
    for x0, y0, x1, y1 in arrows:
        ax.add_patch(_arrow((x0, y0), (x1, y1)))
    ax.text(46, 26, "$L_{AID}$", fontsize=10, color=_INK, va="center")
    ax.text(75, 40, "$\\varphi_0$, $\\mu_c$, $d_c$", fontsize=10, color=_INK, ha="center")
    return fig


def draw_families(class_counts, class_names, many_above: int, few_below: int):
    """Figure 8: a long-tailed histogram, and three families of methods for it: each with the images
    that it trains on, those of the set and those that it adds."""
    fig = plt.figure(figsize=(12, 4.4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.15), wspace=0.03)
    ax = left.subplots()
    class_histogram(ax, class_counts, class_names, many_above, few_below)
    ax.set_title("the problem: a long-tailed training set", loc="left", pad=26)
    counts = np.asarray(class_counts)
    rows = right.subplots(3, 2, width_ratios=(1, 1.5))
    for (bars, words), (name, (added, how)) in zip(rows, _FAMILIES.items(), strict=True):
        colour = COLOURS.get(name, _INK)
        bars.bar(range(len(counts)), counts, width=1, color=_INK)
        if added:
            missing = counts.max() - counts
            bars.bar(range(len(counts)), missing, bottom=counts, width=1, color=added)
        bars.set(xticks=[], yticks=[], ylim=(0, counts.max()))
        bars.spines["left"].set_visible(False)
        words.axis("off")
        words.set(xlim=(0, 1), ylim=(0, 1))
        words.text(0.06, 0.75, name, weight="bold", fontsize=11, color=colour, va="center")
        words.text(0.06, 0.35, how, fontsize=9.5, va="center")
    return fig


def _arrow(start, end) -> FancyArrowPatch:
    return FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=14, color=_INK, lw=1.3, shrinkA=0, shrinkB=0
    )


def _box(ax, x, y, width, height, title: str, text: str) -> None:
    """A box with a bold title and a line or two below it, at its top."""
    style = "round,pad=0,rounding_size=1"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc="white", ec=_INK, lw=1.3))
    middle, top = x + width / 2, y + height
    ax.text(middle, top - 1.2, title, ha="center", va="top", fontsize=11, weight="bold")
    ax.text(middle, top - 4.6, text, ha="center", va="top", fontsize=9)


def _picture(ax, picture, x, y, width, height) -> None:
    """A picture, if there is one, inside a rectangle of the diagram, its aspect ratio kept."""
    if picture is None:
        return
    H, W = picture.shape[:2]
    w, h = (width, width * H / W) if W / H > width / height else (height * W / H, height)
    left, low = x + (width - w) / 2, y + (height - h) / 2
    extent = (left, left + w, low, low + h)
    ax.imshow(picture, extent=extent, interpolation="nearest", aspect="auto", zorder=3)
