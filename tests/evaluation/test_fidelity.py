"""Agreement with torch-fidelity, where it is installed: it needs torchvision, which a CPU build of PyTorch may lack."""

import pytest
import torch

from diffusers_dod.evaluation import (
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from diffusers_dod.evaluation.extractors import InceptionExtractor


pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")


@pytest.fixture(scope="module")
def features():
    """2,000 samples of 64 correlated channels, twice, not far from each other."""
    torch.manual_seed(0)
    mixing = torch.randn(64, 64) / 8
    one, other = (torch.randn(2000, 64) @ mixing for _ in range(2))
    return one, 1.1 * other + 0.1


def test_frechet_distance(features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(part) for part in features]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    ours = frechet_distance(*(feature_statistics(part) for part in features))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_kernel_distance(features):
    from torch_fidelity.metric_kid import kid_features_to_metric

    # Subsets that are whole sets do not depend on what is drawn.
    options = {"kid_subsets": 1, "kid_subset_size": 2000, "verbose": False}
    theirs = kid_features_to_metric(*(part.double() for part in features), **options)
    ours, _ = kernel_distance(*features, subsets=1, subset_size=2000)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)


def test_inception_score(features):
    from torch_fidelity.metric_isc import isc_features_to_metric

    theirs = isc_features_to_metric(features[0], splits=1)["inception_score_mean"]
    assert inception_score(features[0], splits=1)[0] == pytest.approx(theirs, rel=1e-3)


def test_precision_and_recall(features):
    from torch_fidelity.metric_prc import prc_features_to_metric

    theirs = prc_features_to_metric(*features, verbose=False)
    precision, recall = precision_recall(*features)
    assert precision == pytest.approx(theirs["precision"], abs=1e-3)
    assert recall == pytest.approx(theirs["recall"], abs=1e-3)


def test_the_inception_network(tmp_path):
    """Features, logits and the spatial features of sFID, with weights of chance from a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True):
            pass

    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    untrained = Untrained("weights", ["2048"], feature_extractor_weights_path=str(file))
    torch.save(untrained.state_dict(), file)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    outputs = InceptionExtractor(str(file))(images)
    assert {name: value.shape[1] for name, value in outputs.items()} == {
        "features": 2048,
        "spatial": 7 * 17 * 17,
        "logits": 1008,
    }
    torch.testing.assert_close(outputs["features"], untrained(images)[0])
