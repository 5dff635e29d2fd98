"""How pictures are drawn: grids of images, histograms, curves and feature maps. No numbers here."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter

from .data import shot_groups
from .filtering import TYPES
from .report import COLOURS
from .reporting.claims import within_correlation

__all__ = [
    "class_histogram",
    "class_map",
    "confusion_matrix",
    "draw_dataset",
    "feature_map",
    "image_grid",
    "loss_curves",
    "nearest_distances",
    "nearest_pairs",
    "noise_per_epoch",
    "seed_lines",
    "sweep",
    "tile",
    "types_by_class",
]


_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # colour-blind-safe, in this order


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


def types_by_class(images, labels, types, classes, class_names, n_columns: int = 12):
    """Generated images of some classes (rows) by sample type (columns): the first two rows of each.

    Args:
        images: uint8 (N, H, W, C). labels: (N,). types: (N,), index into TYPES.
    """
    figure, axes = plt.subplots(
        len(classes), len(TYPES), figsize=(10, 0.95 * len(classes) + 0.2), squeeze=False
    )
    for row, c in zip(axes, classes, strict=True):
        for i, (name, ax) in enumerate(zip(TYPES, row, strict=True)):
            mine = np.flatnonzero((labels == c) & (types == i))
            none = np.full_like(images[:1], 255)
            image_grid(ax, images[mine[: 2 * n_columns]] if len(mine) else none, n_columns)
            ax.set_title(f"class {class_names[c]}, {name}: {len(mine)}", loc="left", fontsize=9)
    figure.tight_layout()
    return figure


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


def seed_lines(ax, runs, x: str, y: str, by: str, xlabel: str, ylabel: str) -> tuple[float, float]:
    """y against x: a thin line for each seed through its points in order of x, each point in the
    colour and marker of its `by`.

    x is drawn on a log scale where it spans more than a factor of ten.

    Args:
        runs: DataFrame with the columns x, y, by and seed.

    Returns:
        The correlations that the title gives: pooled, and within the seeds.
    """
    for _, rows in runs.groupby("seed"):
        ordered = rows.sort_values(x)
        ax.plot(ordered[x], ordered[y], color="#aaaaaa", lw=0.9, zorder=1)
    groups = runs.groupby(by, sort=False)
    for (name, rows), marker in zip(groups, itertools.cycle("ovsD^P*")):
        ax.scatter(rows[x], rows[y], color=COLOURS[name], marker=marker, label=name,
                   s=80 if marker == "*" else 40, ec="white", lw=0.5, zorder=3)  # fmt: skip
    wide = runs[x].min() > 0 and runs[x].max() > 10 * runs[x].min()
    if wide:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=f"{xlabel}, log scale" if wide else xlabel, ylabel=ylabel)
    pooled, within, _ = within_correlation(runs, x, y)
    ax.set_title(f"correlation within seeds {within:.2f}, pooled {pooled:.2f}", loc="left")
    ax.legend(fontsize=8)
    return pooled, within


def feature_map(
    ax, sets: dict[str, np.ndarray], title: str, legend: bool = True, alpha: float = 0.7
) -> None:
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
                   zorder=order, alpha=1 if name == "real" else alpha, linewidths=0.8)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    if legend:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.2)


def class_map(
    ax, real, synthetic, real_y, synthetic_y, class_names, title: str, legend: bool = True
) -> None:
    """t-SNE of real (stars) and synthetic (dots) features (N, D) together, one colour per class."""
    points = _tsne(np.concatenate([real, synthetic]))
    colours = plt.get_cmap("tab10")
    for c in np.unique(real_y):
        mine = points[: len(real)][real_y == c], points[len(real) :][synthetic_y == c]
        ax.scatter(*mine[1].T, color=colours(c % 10), s=8, alpha=0.5, linewidths=0)
        ax.scatter(*mine[0].T, color=colours(c % 10), s=50, marker="*", ec="black", lw=0.3,
                   label=class_names[c], zorder=3)  # fmt: skip
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="left")
    if legend:
        ax.legend(
            title="class", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handletextpad=0.1
        )


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


def nearest_distances(ax, found) -> None:
    """Histograms of the distances to the nearest training image, generated and held-out images on
    the same bins, and the threshold. found: Memorisation."""
    both = np.concatenate([found.generated, found.held_out])
    bins = np.linspace(0, both.max() or 1, 41)
    for distances, name, style in (
        (found.held_out, "held-out", {"histtype": "step", "color": COLOURS["real"], "lw": 1.3}),
        (found.generated, "generated", {"color": COLOURS["DiffuLT"], "alpha": 0.6}),
    ):
        share = np.full(len(distances), 100 / len(distances))
        ax.hist(distances, bins, weights=share, label=f"{name} ({len(distances)})", **style)
    ax.axvline(
        found.threshold, color="#555555", ls="--", lw=1.2,
        label=f"nearest {found.n_nearest} held-out: {found.threshold:.1f}",
    )  # fmt: skip
    ax.set(xlabel="distance to the nearest training image in grey levels (root mean square)")
    ax.set_ylabel("images in %")
    expected = f"{found.expected:.1f} ± {found.spread:.1f} %"
    ax.set_title(
        f"{found.share:.1f} % of the generated images are as near (new ones: {expected})",
        loc="left",
    )
    ax.legend()


def nearest_pairs(
    images: np.ndarray, train_images: np.ndarray, pairs, n_columns: int = 6, figure=None
):
    """Generated image (left) and nearest training image (right) of each pair, contrast as it is,
    with their distance in grey levels below.

    Args:
        images, train_images: uint8 (N, H, W, C) and (n, H, W, C). pairs: of Memorisation.pairs.
        figure: a (sub)figure to draw in; None is a new one.
    """
    rows = max(1, -(-len(pairs) // n_columns))
    if figure is None:
        figure = plt.figure(figsize=(1.7 * n_columns, 1.2 * rows), layout="tight")
    axes = figure.subplots(rows, n_columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (i, j, distance) in zip(axes.flat, pairs, strict=False):
        pair = np.stack([images[i], train_images[j]])
        ax.imshow(tile(pair, 2, gap=max(1, pair.shape[2] // 8)), interpolation="nearest")
        ax.set_title(f"{distance:.1f}", y=-0.34, fontsize=9)
    return figure
