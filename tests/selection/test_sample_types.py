"""Sample types on hand-made features."""

import numpy as np
import pytest

from difflt_core.recognition.geometry import geometry, relative_distance
from difflt_core.selection.sample_types import sample_types


def test_centres_radii_and_types_by_hand():
    features = np.array([[0, 0], [2, 0], [10, 0], [10, 4.0]])
    centres, radii = geometry(features, np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(centres, [[1, 0], [10, 2]])
    np.testing.assert_allclose(radii, [1, 2])
    d = relative_distance(
        np.array([[1, 1], [1, 1.5], [1, 2], [1, 2.1], [10, 6]]),
        np.array([0, 0, 0, 0, 1]),
        centres,
        radii,
    )
    np.testing.assert_allclose(d, [1, 1.5, 2, 2.1, 2])
    assert sample_types(d).tolist() == [0, 1, 1, 2, 1]


def test_a_class_of_one_image_takes_the_median_radius():
    features = np.array([[0, 0], [2, 0], [0, 10], [6, 10], [5, 5.0]])
    _, radii = geometry(features, np.array([0, 0, 1, 1, 2]), 3)
    np.testing.assert_allclose(radii, [1, 3, 2])


def test_shrunk_radius_only_ever_widens_small_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [100, 30, 3])
    features = rng.normal(size=(133, 4)) * np.array([1, 1, 0.2])[labels][:, None]
    plain, shrunk = (geometry(features, labels, 3, rule)[1] for rule in ("max", "shrunk"))
    assert (
        (shrunk >= plain).all()
        and shrunk[2] > 2 * plain[2]
        and shrunk[0] == pytest.approx(plain[0])
    )


def test_not_a_number_is_ood():
    assert sample_types(np.array([np.nan, np.inf])).tolist() == [2, 2]


def test_empty_class_is_named():
    with pytest.raises(ValueError, match=r"classes \[1\] have no image"):
        geometry(np.zeros((2, 2)), np.array([0, 2]), 3)


def test_identical_images_everywhere_are_refused():
    with pytest.raises(ValueError, match="every class radius is 0"):
        geometry(np.zeros((2, 2)), np.array([0, 1]), 2)
