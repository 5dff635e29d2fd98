"""The protocol of FID: which features, which reference, in words; Inception weights read safely."""

import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from difflt_core.data import load_split
from difflt_core.evaluation import INCEPTION, Protocol, inception_features, load_inception
from difflt_core.metrics import fid


def test_the_default_is_phi0_against_held_out_images(trained):
    protocol = Protocol(trained)
    images = trained.generate().array("images")
    val = load_split(trained.data(), "val").images
    assert protocol.fid(images) == fid(protocol.features(val), protocol.features(images))
    n = len(images)
    expected = f"phi_0's features, {n} generated images against {len(val)} of val"
    assert protocol.words(n) == expected
    scores = protocol.scores(val)
    assert scores["FID"] == pytest.approx(0, abs=1e-6) and scores["precision"] == 100


@pytest.mark.parametrize("kind, per_class", [("long-tailed train", None), ("balanced train", 60)])
def test_other_reference_sets(trained, kind, per_class):
    protocol = Protocol(trained.vary({"metrics.reference": kind}))
    counts = protocol.reference.class_counts
    wanted = (
        load_split(trained.data(), "train").class_counts if per_class is None else [per_class] * 10
    )
    assert counts.tolist() == list(wanted) and kind in protocol.words(5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random Inception weights, named like the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        net = FeatureExtractorInceptionV3("random", ["2048"], empty)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:8]
    path = tmp_path_factory.mktemp("weights") / f"weights-random-{digest}.pth"
    path.write_bytes(buffer.getvalue())
    return path


def test_inception_features_do_not_depend_on_the_batch(weights):
    net = load_inception(weights)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    features = inception_features(net, images, batch_size=2)
    assert features.shape == (3, 2048) and features.dtype == np.float32
    np.testing.assert_allclose(features, inception_features(net, images), rtol=1e-3, atol=1e-4)
    assert inception_features(net, images[:0]).shape == (0, 2048)


def test_weights_that_are_missing_changed_or_a_pickle_are_refused(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="inception needs its weights at .*or use phi_0"):
        load_inception(tmp_path / INCEPTION)
    changed = tmp_path / weights.name
    changed.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected a sha256 that begins with"):
        load_inception(changed)
    hostile = pickle.dumps(print)  # a function, not tensors
    path = tmp_path / f"weights-{hashlib.sha256(hostile).hexdigest()[:8]}.pth"
    path.write_bytes(hostile)
    with pytest.raises(pickle.UnpicklingError):
        load_inception(path)


def test_a_run_without_the_weights_says_so(trained):
    protocol = Protocol(trained.vary({"metrics.features": "inception"}))
    with pytest.raises(FileNotFoundError, match=INCEPTION):
        protocol.features(np.zeros((1, 8, 8, 1), np.uint8))
