"""Which images are shown, and what stands above them."""

import numpy as np
import pandas as pd

from difflt_core.reporting.gallery import first_of_each, image_rows, rows_by_type, stretched


def test_each_types_images_from_its_smallest_d_to_its_largest():
    d = np.array([0.9, 0.1, 1.5, 0.5, 1.2])
    made = pd.DataFrame({"label": [0, 1, 1, 0, 0], "d": d, "type": np.where(d <= 1, "ID", "AID")})
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    rows = rows_by_type(images, made, ["cat", "dog"], 2)
    assert list(rows) == ["ID: 3 (60 %)", "AID: 2 (40 %)", "OOD: 0 (0 %)"]
    shown, texts = rows["ID: 3 (60 %)"]
    assert shown.ravel().tolist() == [1, 0] and texts == ["as dog\nd = 0.10", "as cat\nd = 0.90"]
    assert len(image_rows(rows).axes) == 4  # a type without images has no row
    assert not any(len(images) for images, _ in rows_by_type(images, made[:0], [], 2).values())


def test_the_first_of_each_type_and_what_one_lacks_the_others_fill_up():
    types = np.array([0, 0, 0, 0, 1, 2, 2])
    assert first_of_each(types, 5).tolist() == [0, 1, 4, 5, 6]
    assert first_of_each(types, 9).tolist() == list(range(7))


def test_contrast_is_stretched_image_by_image():
    images = np.array([[10, 20], [7, 7]], np.uint8).reshape(2, 1, 2, 1)
    assert stretched(images).ravel().tolist() == [0, 255, 0, 0]
