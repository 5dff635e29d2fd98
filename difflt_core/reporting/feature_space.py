"""The feature space of phi_0 in two dimensions: classes as circles, one class as rings of d, and one
t-SNE in facets."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patheffects import withStroke

from ..selection.sample_types import TYPES
from .figures import class_ticks, tsne
from .items import COLOURS

__all__ = [
    "class_circles",
    "distance_rings",
    "feature_facets",
    "feature_gaussians",
    "retention_bars",
    "type_facets",
]


def class_circles(ax, features, labels, centres, radii, classes: dict[int, str]) -> None:
    """Real images of two or more classes as dots, their centres as crosses, and the class radii as
    circles, in the plane of the centres.

    The plane shows the features' projection, which shortens distances: no image of a class lies outside
    its circle, and an image inside one may still be far from it.

    Args:
        features: float (N, D). labels: int (N,). centres: (K, D). radii: (K,).
        classes: index and name of those that are drawn.
    """
    chosen, colours = list(classes), plt.get_cmap("Dark2").colors
    middle, plane = _plane(features[np.isin(labels, chosen)], centres[chosen])
    for c, colour in zip(chosen, colours, strict=False):
        xy, at = (features[labels == c] - middle) @ plane.T, (centres[c] - middle) @ plane.T
        label = f"class {classes[c]}: {len(xy)} images"
        ax.scatter(*xy.T, s=9, color=colour, alpha=0.6, lw=0, label=label)
        ax.scatter(*at, s=70, color=colour, marker="X", ec="white", zorder=4)
        ax.add_patch(plt.Circle(at, radii[c], fill=False, ec=colour, lw=1.5))
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    ax.autoscale_view()
    legend = ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, markerscale=2.5)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a class may have any name


def _plane(features, centres) -> tuple[np.ndarray, np.ndarray]:
    """A point (D,) and two orthonormal directions (2, D): of the centres, and where they are two, of
    the features besides."""
    middle = centres.mean(axis=0)
    first = np.linalg.svd(centres - middle, full_matrices=False)[2][: min(2, len(centres) - 1)]
    rest = features - middle
    rest = rest - rest @ first.T @ first
    second = np.linalg.svd(rest, full_matrices=False)[2]
    return middle, np.concatenate([first, second])[:2]


def distance_rings(ax, features, d, types, centre, cuts, real, real_d) -> None:
    """Images of one class around its centre: how far out is d exactly, and the angle is that of the
    two directions in which the generated images spread most. The cuts are rings.

    Args:
        ax: with projection "polar". features: (N, D) of generated images, with d (N,) and types (N,),
            as indices into TYPES. centre: (D,). cuts: two of d. real: (n, D), with real_d (n,).
    """
    off = np.concatenate([features, real]).astype(float) - centre
    plane = np.linalg.svd(off, full_matrices=False)[2][:2]
    x, y = (off @ plane.T).T
    angle = np.arctan2(y, x)
    for i, name in enumerate(TYPES):
        mine = types == i
        label = f"{name}: {mine.sum()}"
        ax.scatter(angle[: len(d)][mine], d[mine], s=12, color=COLOURS[name], lw=0, label=label)
    style = {"s": 70, "marker": "*", "ec": "white", "lw": 0.6, "zorder": 4}
    ax.scatter(angle[len(d) :], real_d, color=COLOURS["real"], label=f"real: {len(real)}", **style)
    around = np.linspace(0, 2 * np.pi, 200)
    for cut, line in zip(cuts, ("-", "--"), strict=True):
        ax.plot(around, np.full(200, cut), color="black", lw=1, ls=line, label=f"d = {cut:g}")
    ax.set(xticks=[], yticks=[], ylim=(0, None))
    ax.spines["polar"].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)


def type_facets(real, drawn: dict[str, tuple]):
    """t-SNE of features (N, D), fitted once, a facet for each generator (column) and sample type
    (row): its images as dots, the real images as stars, and its share of the column.

    Args:
        real: (n, D). drawn: by generator, features (M, D) and types (M,), as indices into TYPES.
    """
    stars, *clouds = tsne(real, *(features for features, _ in drawn.values()))
    figure, axes = plt.subplots(
        len(TYPES), len(drawn), figsize=(2.7 * len(drawn), 7.2), layout="constrained",
        sharex=True, sharey=True, squeeze=False,
    )  # fmt: skip
    for column, xy, (generator, (_, types)) in zip(axes.T, clouds, drawn.items(), strict=True):
        for i, (ax, name) in enumerate(zip(column, TYPES, strict=True)):
            of_type = np.asarray(types) == i
            share = 100 * of_type.mean() if len(of_type) else 0
            ax.scatter(*xy[of_type].T, s=14, color=COLOURS[name], lw=0, alpha=0.8)
            ax.scatter(*stars.T, s=60, color=COLOURS["real"], marker="*", ec="white", lw=0.5)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set(visible=True, color="#cccccc")
            head = f"{generator}\n" if i == 0 else ""
            ax.set_title(f"{head}{name}: {share:.0f} %", loc="left", fontsize=10)
    star = plt.Line2D([], [], ls="", marker="*", color=COLOURS["real"], ms=9, label="real")
    figure.legend(handles=[star], loc="outside lower left")
    return figure


def retention_bars(ax, real, made: np.ndarray, class_names) -> None:
    """A bar for each class: its real images and, on top of them, the generated ones by sample type.

    Args:
        real: int (K,). made: int (K, 3), in the order of TYPES.
    """
    real, made = np.asarray(real), np.asarray(made)
    layers = {"real": real, **dict(zip(TYPES, made.T, strict=True))}
    bottom = np.zeros(len(real), int)
    for name, n in layers.items():
        ax.bar(range(len(real)), n, bottom=bottom, color=COLOURS[name], label=name)
        bottom = bottom + n
    if len(real) <= 20:
        class_ticks(ax.xaxis, class_names, slanted=True)
    ax.set(xlabel="class", ylabel="images", ylim=(0, 1.02 * bottom.max()))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def feature_gaussians(ax, real, fake, colour: str, title: str) -> None:
    """What FID compares: real (grey) and fake features (N, D) in the plane of the real ones' two
    largest principal components, with mean and ellipse of two standard deviations of each."""
    real, fake = np.asarray(real, float), np.asarray(fake, float)
    plane = np.linalg.svd(real - real.mean(axis=0), full_matrices=False)[2][:2].T  # (D, 2)
    turn = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(turn), np.sin(turn)])  # (2, 100)
    for features, ink, name in ((real, "#999999", "real"), (fake, colour, "generated")):
        xy = (features - real.mean(axis=0)) @ plane
        values, vectors = np.linalg.eigh(np.cov(xy.T))
        ellipse = 2 * (vectors * np.sqrt(values.clip(0))) @ circle + xy.mean(axis=0)[:, None]
        ax.scatter(*xy.T, s=8, color=ink, alpha=0.5, ec="#333333", lw=0.15)
        edge = [withStroke(linewidth=3.5, foreground="#333333")]  # yellow needs one
        label = f"{name}: mean, 2 standard deviations"
        ax.plot(*ellipse, color=ink, lw=2, path_effects=edge, label=label)
        ax.plot(*xy.mean(axis=0), "P", color=ink, ms=11, mec="#333333")
    ax.set(xticks=[], yticks=[], xlabel="1st principal component", ylabel="2nd")
    ax.set_title(title, loc="left")


def feature_facets(figure, held_out, train, drawn: dict[str, tuple], title: str) -> None:
    """t-SNE of features (N, D), fitted once, in facets side by side: the real images alone, and what
    each generator makes, with the held-out images in grey behind.

    Args:
        figure: a (sub)figure to draw in, best with a constrained layout. held_out, train: features
            of real images. drawn: by generator, features (M, D) and sample types (M,), as indices
            into TYPES.
    """
    grey, stars, *clouds = tsne(held_out, train, *(features for features, _ in drawn.values()))
    axes = figure.subplots(2, -(-(1 + len(drawn)) // 2), sharex=True, sharey=True).flat
    for ax in axes:
        ax.scatter(*grey.T, s=10, color="#bbbbbb", lw=0)
        ax.set(xticks=[], yticks=[])
    axes[0].scatter(*stars.T, s=60, color=COLOURS["real"], marker="*")
    axes[0].set_title("real", loc="left")
    for ax, xy, (name, (_, types)) in zip(axes[1:], clouds, drawn.items(), strict=False):
        for i, marker in enumerate(_TYPE_MARKS.values()):
            of_type = xy[np.asarray(types) == i].T
            ax.scatter(*of_type, s=16, color=COLOURS[name], marker=marker, lw=1, alpha=0.9)
        ax.set_title(name, loc="left", color=COLOURS[name])
    for ax in axes[1 + len(drawn) :]:
        ax.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)
    figure.legend(handles=_facet_marks(), loc="outside lower left", ncols=5, fontsize=8,
                  handletextpad=0.1, columnspacing=1)  # fmt: skip


_TYPE_MARKS = dict(zip(TYPES, "ox+", strict=True))


def _facet_marks() -> list:
    """Legend of feature_facets."""
    marks = {"real, trained on": ("*", COLOURS["real"]), "real, held out": ("o", "#bbbbbb")}
    marks |= {f"generated, {name}": (marker, "#555555") for name, marker in _TYPE_MARKS.items()}
    return [
        plt.Line2D([], [], ls="", marker=marker, color=colour, ms=6, label=name)
        for name, (marker, colour) in marks.items()
    ]
