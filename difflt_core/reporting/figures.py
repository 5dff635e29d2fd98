"""How pictures are drawn: grids of images, histograms, curves and feature maps. No numbers here."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..data.long_tail import shot_groups
from .gallery import clipped, image_rows, stretched
from .items import COLOURS

__all__ = [
    "class_histogram",
    "class_map",
    "class_ticks",
    "confusion_change",
    "confusion_matrix",
    "draw_dataset",
    "draw_noise",
    "loss_curves",
    "nearest_distances",
    "nearest_pairs",
    "noise_by_epoch",
    "pictures",
    "reliability",
    "seed_lines",
    "sweep",
    "tile",
    "tsne",
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


def class_histogram(
    ax, class_counts, class_names, many_above: int, few_below: int, filled_to: int = 0
) -> None:
    """Training images per class, coloured by shot group, with a legend above; filled_to adds in grey
    what generation fills up. Numbers and names up to 20 classes."""
    counts = np.asarray(class_counts)
    missing = np.maximum(filled_to - counts, 0)
    for name, classes in shot_groups(counts, many_above, few_below).items():
        if len(classes):
            label = f"{name} ({len(classes)} class{'es' if len(classes) > 1 else ''})"
            ax.bar(classes, counts[classes], color=COLOURS[name], label=label)
    if missing.any():
        ax.bar(range(len(counts)), missing, bottom=counts, color="#cccccc", label="generated")
    if len(counts) <= 20:
        class_ticks(ax.xaxis, class_names, slanted=True)
        for c, (n, m) in enumerate(zip(counts, missing, strict=True)):
            told = f"{n}\n+ {m}" if m else f"{n}"
            ax.text(c, n + m, told, ha="center", va="bottom", fontsize=8)
    room = 1.02 if len(counts) > 20 else 1.15
    ax.set(xlabel="class", ylabel="training images", ylim=(0, room * (counts + missing).max()))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, columnspacing=1)


def class_ticks(axis, class_names, first: float = 0, slanted: bool = False) -> None:
    """The names of the classes at first, first + 1, ... of an axis; slanted: where they are long."""
    names = [clipped(name, 10) for name in class_names]
    text: dict = {"parse_math": False}
    if slanted and len("".join(class_names)) > 20:  # each ends at its tick
        text |= {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_ticks(np.arange(len(names)) + first, names, **text)


def draw_dataset(train, many_above: int, few_below: int, n_columns: int = 10):
    """A training set at a glance: its histogram, and images of each shot group, class after class,
    contrast stretched.

    Args:
        train: LongTail. many_above, few_below: bounds of the groups. n_columns: images of a group.
    """
    figure = plt.figure(figsize=(12, 3.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7), wspace=0.03)
    bounds = many_above, few_below
    class_histogram(left.subplots(), train.class_counts, train.class_names, *bounds)
    rows = {}
    for name, classes in shot_groups(train.class_counts, *bounds).items():
        rank = {c: np.flatnonzero(train.labels == c)[:n_columns] for c in classes}
        turns = [rank[c][k] for k in range(n_columns) for c in classes if k < len(rank[c])]
        chosen = np.sort(np.array(turns[:n_columns], int))
        texts = [clipped(train.class_names[c], 7) for c in train.labels[chosen]]
        n = int(train.class_counts[classes].sum())
        rows[f"{name}\n{n} images"] = train.images[chosen], texts
    image_rows(rows, figure=right)
    return figure


def confusion_matrix(ax, shares: np.ndarray, class_names, colour_bar: bool = True):
    """Shares in % (K, K) of true class (row) by predicted class, as colours; their numbers, but for
    those that round to 0, up to 20 classes. Returns the picture, for a colour bar that several share."""
    picture = _matrix(ax, shares, class_names, "Blues", 0, 100, "{:.0f}")
    if colour_bar:
        ax.figure.colorbar(picture, ax=ax, label="share of the class's test images in %")
    return picture


def confusion_change(before: np.ndarray, after: np.ndarray, names: tuple[str, str], class_names):
    """Two confusion matrices (K, K) in % under one colour bar, and their difference: red is less than
    before, blue is more.

    Args:
        names: what the two are called.
    """
    gap = after - before
    limit = max(1.0, float(np.nanmax(np.abs(gap))))
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for ax, shares, name in zip(axes, (before, after), names, strict=False):
        picture = confusion_matrix(ax, shares, class_names, colour_bar=False)
        ax.set_title(name, loc="left")
    label = "share of the class's test images in %"
    figure.colorbar(picture, ax=axes[:2], label=label, shrink=0.8, pad=0.01)
    picture = _matrix(axes[2], gap, class_names, "RdBu", -limit, limit, "{:+.0f}")
    figure.colorbar(picture, ax=axes[2], label="difference in points", shrink=0.8, pad=0.02)
    axes[2].set_title(f"{names[1]} minus {names[0]}", loc="left")
    for ax in axes[1:]:
        ax.set_ylabel("")
    return figure


def _matrix(ax, values: np.ndarray, class_names, cmap: str, low: float, high: float, text: str):
    """A matrix (K, K) of true by predicted class, in colours from low to high; its numbers, but for
    those that round to 0, up to 20 classes."""
    few = len(class_names) <= 20
    numbers = np.where(np.nan_to_num(values).round() != 0, np.vectorize(text.format)(values), "")
    sns.heatmap(
        values, ax=ax, cmap=cmap, vmin=low, vmax=high, cbar=False, square=True, rasterized=not few,
        annot=numbers if few else None, fmt="", annot_kws={"size": 7},
        xticklabels=False, yticklabels=False,
    )  # fmt: skip
    ax.set(xlabel="predicted class", ylabel="true class")
    if few:
        class_ticks(ax.xaxis, class_names, 0.5, slanted=True)
        class_ticks(ax.yaxis, class_names, 0.5)
    return ax.collections[0]


def reliability(axis, found: dict[str, np.ndarray], error: float, name: str) -> None:
    """Accuracy against confidence, by bin, from recognition.accuracy.calibration; on the dashed line a
    probability is what it says. A dot's area is its share of the images."""
    axis.plot([0, 100], [0, 100], "--", color="#999999", lw=1)
    share = found["images"] / max(1, found["images"].sum())
    axis.plot(found["confidence"], found["accuracy"], color=COLOURS["DiffuLT"], lw=1)
    axis.scatter(
        found["confidence"], found["accuracy"], 400 * share, color=COLOURS["DiffuLT"], clip_on=False
    )
    axis.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence in %", ylabel="accuracy in %")
    axis.set(title=f"{name}: ECE {error:.1f}", aspect="equal")


def loss_curves(ax, loss: np.ndarray, names: list[str], window: int = 50) -> None:
    """Running means of loss terms (n_steps, terms) or (n_steps,), log scale; each from the step on in
    which it joins."""
    loss = loss[:, None] if loss.ndim == 1 else loss
    window = max(1, min(window, len(loss) // 8))
    kernel = np.ones(window) / window
    for name, term, style in zip(names, loss.T, itertools.cycle(("-", "--", ":"))):
        joined = int(np.argmax(term > 0))
        if (term > 0).any() and len(term) - joined >= window:
            smooth = np.convolve(term[joined:], kernel, mode="valid")
            steps = np.arange(len(smooth)) + joined + window
            ax.plot(steps, smooth, style, color="#333333", lw=1.4, label=name)
    ax.set(xlabel="training step", ylabel=f"loss (mean of {window} steps)", yscale="log")
    ax.set_xlim(0, len(loss))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def seed_lines(ax, runs, x: str, y: str, by: str, xlabel: str, ylabel: str) -> None:
    """y against x: a thin line for each seed through its points in order of x, each point in the
    colour and marker of its `by`; the legend stands below.

    x is drawn on a log scale where it spans more than a factor of ten.

    Args:
        runs: DataFrame with the columns x, y, by and seed.
    """
    styles = ("-", "--", ":", "-.", (0, (7, 1.5, 1, 1.5, 1, 1.5)))
    for (seed, rows), style in zip(runs.groupby("seed"), itertools.cycle(styles)):
        ordered = rows.sort_values(x)
        ax.plot(
            ordered[x], ordered[y], ls=style, color="#888888", lw=1, label=f"seed {seed}", zorder=1
        )
    lines, groups = list(ax.lines), runs.groupby(by, sort=False)
    points = [
        ax.scatter(rows[x], rows[y], color=COLOURS[name], marker=marker, label=name,
                   s=110 if marker == "*" else 50, ec="#333333", lw=0.5, zorder=3)
        for (name, rows), marker in zip(groups, itertools.cycle("ovsD^P*"))
    ]  # fmt: skip
    wide = runs[x].min() > 0 and runs[x].max() > 10 * runs[x].min()
    if wide:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=f"{xlabel}, log scale" if wide else xlabel, ylabel=ylabel)
    below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "ncols": 3}
    ax.legend(handles=points + lines, fontsize=8, columnspacing=1, **below)


def class_map(
    ax, real, synthetic, real_y, synthetic_y, class_names, title: str,
    noise=None, groups: dict[str, np.ndarray] | None = None, legend: bool = True,
) -> None:  # fmt: skip
    """t-SNE of real (stars) and synthetic features (N, D) together, each class's name at its real
    images. Synthetic images are dots, or crosses where they count as noise.

    Args:
        real_y, synthetic_y: classes int (N,). noise: bool (N_syn,), None is none. groups: of
            shot_groups, whose colours the images have; None is one colour for all.
    """
    stars, dots = tsne(real, synthetic)
    noise = np.zeros(len(dots), bool) if noise is None else np.asarray(noise)
    for name, classes in (groups or {"real": np.unique(real_y)}).items():
        own, colour = np.isin(synthetic_y, classes), COLOURS[name]
        ax.scatter(*dots[own & ~noise].T, color=colour, s=10, alpha=0.5, linewidths=0)
        ax.scatter(*dots[own & noise].T, color=colour, s=22, marker="x", lw=1)
        ax.scatter(*stars[np.isin(real_y, classes)].T, color=colour, s=60, marker="*",
                   ec="white", lw=0.4, zorder=3)  # fmt: skip
    halo = [withStroke(linewidth=3, foreground="white")]
    names = []
    for c in np.unique(real_y):
        x, y = np.median(stars[real_y == c], axis=0)
        name = ax.text(x, y, clipped(class_names[c], 10), ha="center", va="center", weight="bold",
                       path_effects=halo, parse_math=False)  # fmt: skip
        names.append(name)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title(title, loc="left")
    if legend:
        _map_legend(ax, groups or {})
    _move_apart(ax, names)


def _move_apart(ax, texts) -> None:
    """Move texts of an axis up and down, a little at a time, until none lies on another."""
    ax.figure.draw_without_rendering()  # places the axis
    per_pixel = ax.transData.inverted().get_matrix()[1, 1]
    for _ in range(100):
        boxes = [text.get_window_extent() for text in texts]
        on_another = [
            sorted((i, j), key=lambda k: boxes[k].y0)
            for i, j in itertools.combinations(range(len(texts)), 2)
            if boxes[i].overlaps(boxes[j])
        ]
        if not on_another:
            return
        for lower, upper in on_another:
            for i, pixels in ((lower, -1), (upper, 1)):
                texts[i].set_y(texts[i].get_position()[1] + pixels * per_pixel)


def _map_legend(ax, groups) -> None:
    """Below a class map: the colours of the groups, and what the markers mean."""
    marks = {name: ("s", COLOURS[name], 6) for name, classes in groups.items() if len(classes)}
    for name, marker, size in (
        ("real", "*", 9),
        ("synthetic", "o", 4),
        ("synthetic, noise", "x", 5),
    ):
        marks[name] = (marker, "#555555", size)
    handles = [
        plt.Line2D([], [], ls="", marker=m, color=colour, ms=size, label=name)
        for name, (m, colour, size) in marks.items()
    ]
    place = {"loc": "upper left", "bbox_to_anchor": (0, 0), "ncols": len(handles)}
    ax.legend(handles=handles, fontsize=9, handletextpad=0.1, columnspacing=1.2, **place)


def noise_by_epoch(curve: np.ndarray, steps_per_epoch: int) -> np.ndarray:
    """Share in % of the synthetic images that count as noise, float (n_epochs,): of each whole epoch,
    or of a training that is shorter.

    curve: of SAU's losses (n_steps, 4), whose last columns are noisy and synthetic images.
    """
    n = max(1, len(curve) // steps_per_epoch)
    parts = [curve[i * steps_per_epoch : (i + 1) * steps_per_epoch, 2:] for i in range(n)]
    noisy, synthetic = np.array([part.sum(axis=0) for part in parts]).T
    return 100 * noisy / np.maximum(synthetic, 1)


def draw_noise(ax, shares: dict[str, list[np.ndarray]]) -> None:
    """What noise_by_epoch has of the runs of each strategy: their mean and range, over the epochs that
    all of them have."""
    for (name, runs), marker in zip(shares.items(), "osD^", strict=False):
        of_runs = np.array([run[: min(map(len, runs))] for run in runs])
        epochs, colour = np.arange(1, of_runs.shape[1] + 1), COLOURS[name]
        mean, low, high = of_runs.mean(axis=0), of_runs.min(axis=0), of_runs.max(axis=0)
        label = f"{name}: {mean[-1]:.0f} % in the last"
        ax.plot(epochs, mean, marker=marker, ms=4, color=colour, label=label)
        ax.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="epoch", ylabel="% of the synthetic images", ylim=(0, 100))
    ax.set_title("counts as noise", loc="left")
    ax.legend(loc="best")


def tsne(*sets: np.ndarray) -> list[np.ndarray]:
    """Points (n, 2) of each set of features (n, D), fitted together."""
    from sklearn.manifold import TSNE

    features, ends = np.concatenate(sets), np.cumsum([len(s) for s in sets])[:-1]
    points = features[:, :2]  # of five or fewer
    if len(features) > 5:
        perplexity = min(30, (len(features) - 1) / 3)
        fit = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
        points = fit.fit_transform(features)
    return np.split(points, ends)


def sweep(ax, runs, x: str, columns: dict[str, str], xlabel: str, log: bool = False) -> None:
    """Mean over the runs of each value of x as a line, and every run as a dot.

    Args:
        columns: of runs, and their labels, three at most. log: x on a log scale; 0, which it does not have, stands
            a decade below the smallest value.
    """
    values = np.sort(runs[x].unique())
    for (column, label), colour in zip(
        columns.items(), ("#000000", COLOURS["few"], COLOURS["many"]), strict=False
    ):
        shared = {"x": x, "y": column, "color": colour, "legend": False, "ax": ax}
        sns.lineplot(runs, errorbar=None, label=label, **shared)
        sns.scatterplot(runs, alpha=0.6, linewidth=0, **shared)
    if log and values.max() > 0:
        ax.set_xscale("symlog", linthresh=values[values > 0].min())
        ax.minorticks_off()
    ax.set_xticks(values, [f"{v:g}" for v in values])
    ax.set(xlabel=xlabel, ylabel="accuracy in %")


def pictures(x) -> np.ndarray:
    """Tensors float (N, C, H, W) of any range as images uint8 (N, H, W, C), contrast stretched."""
    return stretched(x.detach().float().cpu().permute(0, 2, 3, 1).numpy())


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
        label=f"threshold {found.threshold:.1f}: the nearest {found.n_nearest} held-out",
    )  # fmt: skip
    ax.set(xlabel="distance to the nearest training image in grey levels (root mean square)")
    ax.set(ylabel="images in %", xlim=(0, None))
    expected = f"{found.expected:.1f} ± {found.spread:.1f} %"
    ax.set_title(
        f"{found.share:.1f} % of the generated images lie below the threshold (new ones: {expected})",
        loc="left",
    )
    ax.legend()


def nearest_pairs(
    images: np.ndarray, train_images: np.ndarray, pairs, n_columns: int = 6, figure=None
):
    """Generated image (left) and nearest training image (right) of each pair, contrast as it is,
    with their distance in grey levels below; framed in the colours of nearest_distances. A training
    image whose mirror image was the nearest is drawn as that.

    Args:
        images, train_images: uint8 (N, H, W, C) and (n, H, W, C). pairs: of Memorisation.pairs.
        figure: a (sub)figure to draw in; None is a new one.
    """
    rows = max(1, -(-len(pairs) // n_columns))
    if figure is None:
        figure = plt.figure(figsize=(1.7 * n_columns, 1.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, n_columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (i, j, distance) in zip(axes.flat, pairs, strict=False):
        pair = np.stack([images[i], _as_it_matched(images[i], train_images[j], distance)])
        H, W = pair.shape[1:3]
        gap = max(1, W // 8)
        ax.imshow(tile(pair, 2, gap), interpolation="nearest")
        for x, name in ((0, "DiffuLT"), (W + gap, "real")):
            box = plt.Rectangle((x - 0.5, -0.5), W, H, fill=False, ec=COLOURS[name], lw=2.5)
            ax.add_patch(box).set_clip_on(False)
        ax.set_title(f"{distance:.1f}", y=-0.34, fontsize=9)
    figure.suptitle(
        "The closest pairs: generated image (left), its nearest training image (right), their distance",
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return figure


def _as_it_matched(image: np.ndarray, other: np.ndarray, distance: float) -> np.ndarray:
    """other, or its mirror image where that is the one at this distance."""

    def off(candidate: np.ndarray) -> float:
        return abs(np.sqrt(((image.astype(float) - candidate) ** 2).mean()) - distance)

    return min((other, other[:, ::-1]), key=off)
