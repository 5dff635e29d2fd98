"""How pictures are drawn: grids of images, class histograms, and the two diagrams (figures 4 and
8). No numbers here."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .data import shot_groups
from .report import COLOURS

__all__ = [
    "class_histogram",
    "class_map",
    "confusion_matrix",
    "draw_dataset",
    "draw_families",
    "draw_pipeline",
    "feature_map",
    "image_grid",
    "loss_curves",
    "noise_per_epoch",
    "sweep",
    "tile",
    "trend",
]


def tile(images: np.ndarray, n_columns: int, gap: int = 1) -> np.ndarray:
    """Images uint8 (N, H, W, C) side by side on white, as one (rows, columns, 3) uint8 picture."""
    N, H, W, _ = images.shape
    rows = -(-N // n_columns)
    canvas = np.full((rows * (H + gap) - gap, n_columns * (W + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (i // n_columns) * (H + gap), (i % n_columns) * (W + gap)
        canvas[y : y + H, x : x + W] = image
    return canvas


def image_grid(
    ax, images: np.ndarray, n_columns: int, frames: list[str] | None = None, title: str = ""
) -> None:
    """Show images in rows of n_columns; frames gives each image a coloured border."""
    N, H, W, _ = images.shape
    gap = 2 if frames else 1
    ax.imshow(tile(images, n_columns, gap), interpolation="nearest", vmin=0, vmax=255)
    for i, colour in enumerate(frames or []):
        y, x = (i // n_columns) * (H + gap), (i % n_columns) * (W + gap)
        ax.add_patch(
            plt.Rectangle((x - 0.9, y - 0.9), W + 0.8, H + 0.8, fill=False, ec=colour, lw=1.6)
        )
    if frames:
        ax.set_xlim(-2, n_columns * (W + gap))
        ax.set_ylim(-(-N // n_columns) * (H + gap), -2)
    ax.axis("off")
    ax.set_title(title, loc="left")


def class_histogram(
    ax, class_counts, class_names, many_above: int, few_below: int, filled_to: int = 0
) -> None:
    """Training images per class, coloured by shot group; filled_to shades what generation adds."""
    counts = np.asarray(class_counts)
    groups = shot_groups(counts, many_above, few_below)
    for name, classes in groups.items():
        if len(classes):
            ax.bar(
                classes,
                counts[classes],
                color=COLOURS[name],
                label=f"{name} ({len(classes)} classes)",
            )
    if filled_to:
        ax.bar(
            range(len(counts)),
            np.maximum(filled_to - counts, 0),
            bottom=counts,
            color="none",
            ec="#bbbbbb",
            hatch="////",
            lw=0,
            label="generated",
        )
    if len(counts) <= 20:
        ax.set_xticks(range(len(counts)), class_names)
        for c, n in enumerate(counts):
            ax.text(c, n, f"{n}", ha="center", va="bottom", fontsize=8)
    ax.set(xlabel="class", ylabel="training images")
    ax.legend()


def draw_dataset(train, many_above: int, few_below: int, n_columns: int = 12):
    """A training set at a glance: its histogram, and images of each shot group, class after class.

    Args:
        train: LongTail. many_above, few_below: bounds of the groups.
    """
    groups = shot_groups(train.class_counts, many_above, few_below)
    present = {name: classes for name, classes in groups.items() if len(classes)}
    figure = plt.figure(figsize=(12, 3.4))
    grid = figure.add_gridspec(len(present), 2, width_ratios=(1, 1.15))
    class_histogram(
        figure.add_subplot(grid[:, 0]), train.class_counts, train.class_names, many_above, few_below
    )
    for row, (name, classes) in enumerate(present.items()):
        rank = {c: np.flatnonzero(train.labels == c)[: 2 * n_columns] for c in classes}
        turns = [rank[c][k] for k in range(2 * n_columns) for c in classes if k < len(rank[c])]
        ax = figure.add_subplot(grid[row, 1])
        n = int(train.class_counts[classes].sum())
        title = f"{name}: {len(classes)} classes, {n} images"
        image_grid(ax, train.images[np.sort(turns[: 2 * n_columns])], n_columns, title=title)
    figure.tight_layout()
    return figure


def confusion_matrix(ax, shares: np.ndarray, class_names) -> None:
    """Shares in % (K, K) of true class (row) by predicted class, as colours; numbers up to 20 classes."""
    K = len(class_names)
    picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    ax.figure.colorbar(picture, ax=ax, label="share of the class's test images in %")
    ax.set(xlabel="predicted class", ylabel="true class")
    if K <= 20:
        ax.set_xticks(range(K), class_names, rotation=45 if len("".join(class_names)) > 20 else 0)
        ax.set_yticks(range(K), class_names)
        for y, x in np.ndindex(K, K):
            ink = "white" if shares[y, x] > 50 else "black"
            ax.text(x, y, f"{shares[y, x]:.0f}", ha="center", va="center", fontsize=7, color=ink)


def loss_curves(ax, loss: np.ndarray, names: list[str], window: int = 50) -> None:
    """Running means of loss terms (n_steps, terms) or (n_steps,), log scale."""
    loss = loss[:, None] if loss.ndim == 1 else loss
    window = max(1, min(window, len(loss) // 4))
    kernel = np.ones(window) / window
    for name, term in zip(names, loss.T, strict=True):
        if (term > 0).any():
            smooth = np.convolve(term, kernel, mode="valid")
            ax.plot(np.arange(len(smooth)) + window, smooth, label=name)
    ax.set(xlabel="training step", ylabel=f"loss (mean of {window} steps)", yscale="log")
    ax.legend()


def trend(ax, x, y, names, xlabel: str, ylabel: str) -> float:
    """Points coloured by name, the fitted line, and the correlation, which is returned."""
    x, y, names = np.asarray(x, float), np.asarray(y, float), np.asarray(names)
    for name in dict.fromkeys(names):
        chosen = names == name
        ax.scatter(x[chosen], y[chosen], color=COLOURS[name], label=name, s=36, zorder=3)
    varied = len(x) > 2 and x.std() > 0 and y.std() > 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varied else float("nan")
    if varied:
        slope, offset = np.polyfit(x, y, 1)
        ends = np.array([x.min(), x.max()])
        ax.plot(ends, slope * ends + offset, color="#999999", lw=1.2, ls="--")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(f"correlation {correlation:.2f}" if varied else "", loc="left")
    ax.legend()
    return correlation


def feature_map(ax, sets: dict[str, np.ndarray], title: str, legend: bool = True) -> None:
    """t-SNE of sets of features (N, D), one colour per set, the real images on top."""
    sets = {name: np.asarray(f) for name, f in sets.items() if len(f)}
    points = _tsne(np.concatenate(list(sets.values())))
    start = 0
    for name, features in sets.items():
        xy = points[start : start + len(features)]
        start += len(features)
        marker, size, order = ("*", 70, 4) if name == "real" else ("o", 12, 2)
        marker, order = ("x", 3) if name == "AID" and "ID" not in sets else (marker, order)
        ax.scatter(*xy[:, :2].T, color=COLOURS[name], marker=marker, s=size, label=name,
                   zorder=order, alpha=1 if name == "real" else 0.7, linewidths=0.8)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    if legend:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.2)


def class_map(ax, real, synthetic, real_y, synthetic_y, class_names, title: str) -> None:
    """t-SNE of real (stars) and synthetic (dots) features (N, D) together, one colour per class."""
    points = _tsne(np.concatenate([real, synthetic]))
    colours = plt.get_cmap("tab10")
    for c in np.unique(real_y):
        mine = points[: len(real)][real_y == c], points[len(real) :][synthetic_y == c]
        ax.scatter(*mine[1].T, color=colours(c % 10), s=8, alpha=0.5, linewidths=0)
        ax.scatter(*mine[0].T, color=colours(c % 10), s=70, marker="*", ec="black", lw=0.5,
                   label=class_names[c], zorder=3)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    ax.legend(title="class", ncol=2, fontsize=7, handletextpad=0.1, columnspacing=0.6)


def noise_per_epoch(ax, curves: dict[str, list[np.ndarray]], steps_per_epoch: int) -> None:
    """Share of synthetic images that count as noise, by epoch: mean and range of each strategy's runs.

    curves: loss curves of SAU (n_steps, 4), whose last columns are noisy and synthetic images.
    """
    for (name, runs), colour in zip(curves.items(), _CYCLE, strict=False):
        starts = range(0, len(runs[0]), steps_per_epoch)
        sums = np.array(
            [[run[s : s + steps_per_epoch, 2:].sum(axis=0) for s in starts] for run in runs]
        )
        share = 100 * sums[..., 0] / np.maximum(sums[..., 1], 1)
        epochs = np.arange(1, len(starts) + 1)
        ax.plot(epochs, share.mean(axis=0), "o-", ms=3, color=colour, label=name)
        ax.fill_between(
            epochs, share.min(axis=0), share.max(axis=0), color=colour, alpha=0.15, lw=0
        )
    ax.set(xlabel="epoch", ylabel="synthetic images that count as noise in %")
    ax.legend()


def _tsne(features: np.ndarray) -> np.ndarray:
    """Points (N, 2) of features (N, D)."""
    from sklearn.manifold import TSNE

    if len(features) <= 5:
        return features[:, :2]
    perplexity = min(30, (len(features) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(features)


def sweep(ax, runs, x: str, columns: dict[str, str], xlabel: str) -> None:
    """Mean over the runs of each value of x as a line, their range as a band."""
    for (column, label), colour in zip(columns.items(), ("#000000", COLOURS["few"]), strict=False):
        groups = runs.groupby(x)[column]
        mean, low, high = groups.mean(), groups.min(), groups.max()
        ax.plot(mean.index, mean, "o-", color=colour, label=label)
        ax.fill_between(mean.index, low, high, color=colour, alpha=0.15, lw=0)
    ax.set_xticks(sorted(runs[x].unique()))
    ax.tick_params(axis="x", rotation=45 if runs[x].max() < 0.1 else 0)
    ax.set(xlabel=xlabel, ylabel="accuracy in %")
    ax.legend()


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


_INK = "#555555"
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


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
