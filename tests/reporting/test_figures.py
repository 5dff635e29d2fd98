"""Pictures whose texts can be read."""

import itertools

import matplotlib.pyplot as plt
import numpy as np

from difflt_core.reporting.figures import class_map


def test_class_names_of_a_map_do_not_lie_on_one_another():
    """Eight classes share one cloud, so their names would stand near one place."""
    rng = np.random.default_rng(0)
    features, classes = rng.standard_normal((160, 4)), np.tile(range(8), 20)
    figure, ax = plt.subplots(layout="constrained")
    class_map(ax, features, features[:2], classes, classes[:2], ["automobile"] * 8, "")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    plt.close(figure)
