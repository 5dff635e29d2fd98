"""How images are shown: enlarged, each with its contrast stretched, labelled, and framed in the colour
of what it is."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from ..selection.sample_types import TYPES
from .items import COLOURS

__all__ = [
    "clipped",
    "first_of_each",
    "gallery",
    "image_rows",
    "real_and_generated",
    "rows_by_type",
    "stretched",
    "types_by_class",
]

_CELL = 56  # pixels of an image in a gallery
_FRAME, _GAP = 3, 5
_N_COLUMNS = 18


def stretched(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) of images of any range, each from its own darkest value, 0, to its brightest,
    255; an image of one value is black."""
    x = np.asarray(images, dtype=np.float32)
    low = x.min(axis=(1, 2, 3), keepdims=True)
    span = x.max(axis=(1, 2, 3), keepdims=True) - low
    return ((x - low) / np.where(span > 0, span, 1) * 255).round().astype(np.uint8)


def first_of_each(types: np.ndarray, n: int) -> np.ndarray:
    """Rows int64 (n or fewer,) of the first images of each type, as many of each as there are, type
    after type. What a type lacks, the others fill up.

    Args:
        types: int (N,).
    """
    rank = np.zeros(len(types), np.int64)  # of an image among those of its type
    for t in np.unique(types):
        rank[types == t] = np.arange((types == t).sum())
    chosen = np.sort(np.argsort(rank, kind="stable")[:n])
    return chosen[np.argsort(types[chosen], kind="stable")]


def types_by_class(images, labels, types, classes, class_names):
    """Generated images of some classes by sample type: of each class two rows, with as many of each
    type as there are to be had.

    Args:
        images: uint8 (N, H, W, C). labels: (N,). types: (N,), index into TYPES.
    """
    blocks = {}
    for c in classes:
        mine = np.flatnonzero(labels == c)
        whole_rows = min(2, len(mine) // _N_COLUMNS) * _N_COLUMNS
        shown = mine[first_of_each(types[mine], whole_rows or len(mine))]
        counts = np.bincount(types[mine], minlength=len(TYPES))
        told = ", ".join(f"{n} {name}" for n, name in zip(counts, TYPES, strict=True))
        blocks[f"class {class_names[c]}: {told}"] = (
            images[shown],
            [TYPES[t] for t in types[shown]],
        )
    return gallery(blocks)


def real_and_generated(train, images, labels, types, classes, n_shown: int = 24):
    """The real images of some classes, and behind them the first generated ones by sample type, at
    least n_shown of a class and as many more as fill the row.

    Args:
        train: LongTail. images, labels, types: as for types_by_class.
    """
    blocks = {}
    for c in classes:
        real, n_real = train.images[train.labels == c][: 2 * _N_COLUMNS], train.class_counts[c]
        n = -(-(len(real) + n_shown) // _N_COLUMNS) * _N_COLUMNS - len(real)
        mine = np.flatnonzero(labels == c)[:n]
        mine = mine[np.argsort(types[mine], kind="stable")]
        few = f"all {n_real}" if n_real == len(real) else f"the first {len(real)} of {n_real}"
        title = f"class {train.class_names[c]}: {few} real images, the first {len(mine)} generated"
        names = ["real"] * len(real) + [TYPES[t] for t in types[mine]]
        blocks[title] = (np.concatenate([real, images[mine]]), names)
    return gallery(blocks)


def gallery(blocks: dict[str, tuple[np.ndarray, list[str]]]):
    """A block of images below each title, with a legend of the frames.

    Args:
        blocks: by title, images uint8 (N, H, W, C) and the name of each in COLOURS, whose colour its
            frame has. A number of images that fills its rows leaves no hole.
    """
    rows = [max(1, -(-len(names) // _N_COLUMNS)) for _, names in blocks.values()]
    cell, title = 10 / _N_COLUMNS, 0.34  # inches
    figure, axes = plt.subplots(
        len(blocks), 1, figsize=(10, cell * sum(rows) + title * (len(blocks) + 1)),
        height_ratios=rows, squeeze=False, layout="constrained",
    )  # fmt: skip
    for ax, (head, (images, names)) in zip(axes.flat, blocks.items(), strict=True):
        ax.imshow(_framed(images, names))
        ax.axis("off")
        ax.set_title(head, loc="left", fontsize=10, parse_math=False)
    shown = {name for _, names in blocks.values() for name in names}
    handles = [
        plt.Rectangle((0, 0), 1, 1, fill=False, ec=colour, lw=2.5, label=name)
        for name, colour in COLOURS.items()
        if name in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _framed(images: np.ndarray, names: list[str]) -> np.ndarray:
    """One picture float32 (height, width, 3) in 0..1 of images in rows, each in its frame."""
    size = _CELL + 2 * _FRAME
    step, rows = size + _GAP, max(1, -(-len(names) // _N_COLUMNS))
    canvas = np.ones((rows * step - _GAP, _N_COLUMNS * step - _GAP, 3), np.float32)
    for i, (image, name) in enumerate(zip(stretched(images), names, strict=True)):
        y, x = (i // _N_COLUMNS) * step, (i % _N_COLUMNS) * step
        canvas[y : y + size, x : x + size] = to_rgb(COLOURS[name])
        inside = slice(y + _FRAME, y + size - _FRAME), slice(x + _FRAME, x + size - _FRAME)
        canvas[inside] = _enlarged(image) / 255
    return canvas


def _enlarged(image: np.ndarray) -> np.ndarray:
    """uint8 (_CELL, _CELL, C) of (H, W, C): small ones with their pixels as squares, others by Lanczos."""
    from PIL import Image

    H, W, C = image.shape
    kind = Image.Resampling.NEAREST if max(H, W) <= _CELL // 2 else Image.Resampling.LANCZOS
    picture = Image.fromarray(image[..., 0] if C == 1 else image)
    return np.asarray(picture.resize((_CELL, _CELL), kind)).reshape(_CELL, _CELL, C)


def image_rows(
    rows: dict[str, tuple[np.ndarray, list[str]]],
    size: float = 1.0,
    stretch: bool = True,
    figure=None,
):
    """A labelled row of images for each entry, with a line of text above every image.

    Args:
        rows: by label, images (N, H, W, C) and N texts. Rows may have images of other sizes.
        size: of an image in inches. stretch: whether contrast is stretched; else images are uint8.
        figure: a (sub)figure to draw in; None is a new one.
    """
    rows = {label: row for label, row in rows.items() if len(row[0])}
    n_rows, n = max(1, len(rows)), max((len(images) for images, _ in rows.values()), default=1)
    n_lines = max((t.count("\n") + 1 for _, texts in rows.values() for t in texts), default=0)
    width, height = 1.6 + n * (size + 0.1), n_rows * (size + 0.15 + 0.15 * n_lines)
    if figure is None:
        figure = plt.figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(n_rows, n, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for line, (label, (images, texts)) in zip(axes, rows.items(), strict=False):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=8, parse_math=False)
        shown = stretched(images) if stretch else np.asarray(images)
        for ax, image, text in zip(line, shown, texts, strict=False):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            lines = [clipped(part, int(14 * size) + 1) for part in text.split("\n")]
            ax.set_title("\n".join(lines), fontsize=9, parse_math=False)
    return figure


def rows_by_type(images, made, class_names, n: int) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Rows of image_rows: of each sample type n images, from its smallest d to its largest, above each
    the class that it was made for, and d.

    Args:
        images: uint8 (N, H, W, C). made: results.generated, a row for each image.
    """
    rows = {}
    for name in TYPES:
        mine = made[made["type"] == name].sort_values("d", kind="stable")
        shown = mine.iloc[np.linspace(0, len(mine) - 1, min(n, len(mine))).astype(int)]
        texts = [
            f"as {class_names[c]}\nd = {d:.2f}"
            for c, d in zip(shown["label"], shown["d"], strict=True)
        ]
        share = 100 * len(mine) / max(1, len(made))
        rows[f"{name}: {len(mine)} ({share:.0f} %)"] = images[shown.index], texts
    return rows


def clipped(text: str, n: int) -> str:
    """A text of at most n letters: class names may be long."""
    return text if len(text) <= n else f"{text[: n - 1]}…"
