"""Scores of sets whose score is known."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from flowdit.fields import FieldError
from flowdit.scores import blocks
from flowdit.scores.feature_set import FeatureSet, feature_set
from flowdit.scores.floor import floor
from flowdit.scores.frechet import frechet_distance
from flowdit.scores.inception_score import SPLITS, inception_score
from flowdit.scores.kid import kernel_distance
from flowdit.scores.metrics import METRICS, check_metrics, score
from flowdit.scores.moments import Moments, merge, moments_of
from flowdit.scores.neighbours import neighbour_scores


def normal(seed: int, count: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def random_covariance(seed: int, width: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(width, 2 * width))
    return root @ root.T / width


def test_moments_are_those_of_numpy_and_merge_exactly():
    features = normal(0, 50) + 3
    whole = moments_of(features)
    assert whole.count == 50
    np.testing.assert_allclose(whole.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(features.astype(np.float64).T), rtol=1e-10)
    parts = [moments_of(features[rows]) for rows in (slice(0, 1), slice(1, 20), slice(20, 50))]
    merged = merge(merge(parts[0], parts[1]), parts[2])
    assert merged.count == 50
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-12)


class TestFrechet:
    def test_gaussians_whose_covariances_commute(self):
        """|m1 - m2|^2 + the squared differences of the standard deviations, in any common basis."""
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
        sigma_a, sigma_b = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 2.0, 1.5, 1.0])
        a = Moments(100, np.zeros(4), basis * sigma_a**2 @ basis.T)
        b = Moments(100, np.array([1.0, 0, 0, -2]), basis * sigma_b**2 @ basis.T)
        assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 1 + 4, rel=1e-12)

    def test_it_is_that_of_scipy_for_any_covariances(self):
        a = Moments(100, np.arange(16.0) / 8, random_covariance(0, 16))
        b = Moments(0, np.zeros(16), random_covariance(1, 16))
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
        expected = np.square(a.mean).sum() + np.trace(a.covariance + b.covariance - 2 * np.real(root))
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("count", [10, 500])
    def test_equal_sets_have_distance_zero(self, count):
        features = moments_of(normal(0, count, 100) * np.geomspace(1e-3, 30, 100, dtype=np.float32))
        assert 0 <= frechet_distance(features, features) <= 1e-9 * features.covariance.trace()

    @pytest.mark.parametrize("counts", [(10, 12), (10, 500)])
    def test_fewer_images_than_features(self, counts):
        """tr((C1^1/2 C2 C1^1/2)^1/2) is the nuclear norm of the product of two centred matrices of features."""
        a, b = (normal(seed, count, 64) * (1 + seed) for seed, count in enumerate(counts))
        halves = [(x - x.mean(axis=0)).astype(np.float64) / np.sqrt(len(x) - 1) for x in (a, b)]
        nuclear = np.linalg.svd(halves[0] @ halves[1].T, compute_uv=False).sum()
        means = np.square(moments_of(a).mean - moments_of(b).mean).sum()
        expected = means + sum(np.square(half).sum() for half in halves) - 2 * nuclear
        assert frechet_distance(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-6)

    def test_one_constant_set(self):
        a, b = moments_of(np.ones((5, 3), np.float32)), moments_of(normal(0, 50, 3))
        expected = np.square(b.mean - 1).sum() + b.covariance.trace()
        assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


class TestKid:
    def test_every_pair_is_counted_once_and_no_image_with_itself(self):
        x, y = normal(0, 5, 3), normal(1, 4, 3) + 1

        def kernel(a, b):
            return (float(a.astype(np.float64) @ b) / 3 + 1) ** 3

        def estimate(x, y):
            within = [np.mean([kernel(a, b) for a, b in itertools.permutations(s, 2)]) for s in (x, y)]
            return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])

        value, error = kernel_distance(x, y)
        assert value == pytest.approx(estimate(x, y), rel=1e-5)
        variance = 0.0
        without_x = [estimate(np.delete(x, i, axis=0), y) for i in range(5)]
        without_y = [estimate(x, np.delete(y, i, axis=0)) for i in range(4)]
        for values in (without_x, without_y):
            variance += np.var(values) * (len(values) - 1)
        assert error == pytest.approx(np.sqrt(variance), rel=1e-4)

    def test_it_is_unbiased_and_its_error_is_that_of_repeated_draws(self):
        """For N(0, 1) in one dimension, E (xy + 1)^3 = 1 + 3 E[xy]^2 = 4; against N(1, 1) by its moments, below."""
        draws = [kernel_distance(normal(i, 40, 1), normal(1000 + i, 40, 1)) for i in range(300)]
        values, errors = np.array(draws).T
        assert abs(values.mean()) < 3 * values.std() / np.sqrt(300)
        # Efron and Stein: not below the true error; 2^1/2 times it where both sets are of one distribution.
        assert 1.2 < np.sqrt(np.mean(errors**2)) / values.std() < 1.7

        draws = [kernel_distance(normal(i, 40, 1), normal(1000 + i, 40, 1) + 1) for i in range(300)]
        values, errors = np.array(draws).T
        moments_a, moments_b = np.array([1, 0, 1, 0]), np.array([1, 1, 2, 4])  # E 1, x, x^2, x^3 of N(0, 1), N(1, 1)
        expected = np.array([1, 3, 3, 1]) @ np.square(moments_a - moments_b)
        assert abs(values.mean() - expected) < 3 * values.std() / np.sqrt(300)
        assert 0.9 < np.sqrt(np.mean(errors**2)) / values.std() < 1.25

    def test_blocks_change_nothing_but_rounding(self, monkeypatch):
        x, y = normal(0, 33), normal(1, 21)
        whole = kernel_distance(x, y)
        monkeypatch.setattr(blocks, "BLOCK_SIZE", 64)
        assert kernel_distance(x, y) == pytest.approx(whole, rel=1e-5)


class TestInceptionScore:
    def test_certain_and_balanced_classes_score_their_number(self):
        logits = np.tile(100 * np.eye(5, dtype=np.float32), (200, 1))
        value, error = inception_score(logits)
        # Shuffled, a split of 100 has not exactly 20 of each class.
        assert 4.8 < value <= 5
        assert 0 < error < 0.05

    def test_images_that_say_nothing_score_one(self):
        assert inception_score(np.zeros((100, 7), np.float32)) == pytest.approx((1, 0), abs=1e-12)

    def test_splits_as_defined(self):
        logits = normal(0, 100, 4)
        order = np.random.default_rng(3).permutation(100)
        p = np.exp(logits.astype(np.float64)[order]).reshape(SPLITS, 10, 4)
        p /= p.sum(axis=-1, keepdims=True)
        mean = p.mean(axis=1, keepdims=True)
        scores = np.exp((p * np.log(p / mean)).sum(axis=-1).mean(axis=-1))
        expected = scores.mean(), scores.std(ddof=1) / np.sqrt(SPLITS)
        assert inception_score(logits, seed=3) == pytest.approx(expected, rel=1e-9)


class TestNeighbours:
    def test_two_sets_on_a_line(self):
        """Real at 0, 1, ..., 9, radii by k=3: 3, 2, 2, ..., 2, 3; by k=5: 5, 4, 3, 3, ..., 3, 4, 5."""
        real = np.arange(10, dtype=np.float32)[:, None]
        fake = np.array([4.5, 20, 21, 22, 23, 24], np.float32)[:, None]
        scores = neighbour_scores(real, fake)
        assert scores["precision"] == pytest.approx(1 / 6)
        # 4.5 reaches to 22, its third neighbour, by 17.5: all real images; the others reach 3 at most.
        assert scores["recall"] == 1
        inside = sum(abs(4.5 - x) <= radius for x, radius in enumerate([5, 4, 3, 3, 3, 3, 3, 3, 4, 5]))
        assert scores["density"] == pytest.approx(inside / 6 / 5)
        assert scores["coverage"] == pytest.approx(inside / 10)

    def test_as_defined_and_in_blocks(self, monkeypatch):
        monkeypatch.setattr(blocks, "BLOCK_SIZE", 100)
        real, fake = normal(0, 40, 3), normal(1, 30, 3) * 2 + 1

        def distances(a, b):
            return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=-1)

        within_real = np.sort(distances(real, real), axis=1)
        within_fake = np.sort(distances(fake, fake), axis=1)
        across = distances(real, fake)
        expected = {
            "precision": (across <= within_real[:, 3:4]).any(axis=0).mean(),
            "recall": (across <= within_fake[None, :, 3]).any(axis=1).mean(),
            "density": (across <= within_real[:, 5:6]).sum(axis=0).mean() / 5,
            "coverage": (across.min(axis=1) <= within_real[:, 5]).mean(),
        }
        assert neighbour_scores(real, fake) == pytest.approx(expected, rel=1e-9)
        assert min(expected.values()) > 0
        assert len(set(expected.values())) == 4

    def test_far_from_the_origin(self):
        """In float32 the distances would be lost if the features were not centred first."""
        real, fake = normal(0, 200, 4), normal(1, 200, 4)
        near = neighbour_scores(real, fake)
        assert neighbour_scores(real + 1000, fake + 1000) == pytest.approx(near, abs=0.02)


class TestScore:
    def test_all_scores_in_the_order_asked_for(self):
        real, fake = (feature_set(normal(seed, 200), normal(seed + 2, 200, 5)) for seed in (0, 1))
        names = [name for name, metric in METRICS.items() if not metric.needs_text]
        scores = score(names, fake, real)
        assert [found.metric for found in scores] == names
        assert all(np.isfinite(found.value) for found in scores)
        assert [found.metric for found in scores if found.error is not None] == ["kid", "inception_score"]

    def test_statistics_are_enough_for_the_frechet_distance(self):
        real, fake = normal(0, 50), normal(1, 50)
        whole = score(["fd"], feature_set(fake), feature_set(real))
        assert score(["fd"], feature_set(fake), FeatureSet(moments_of(real))) == whole

    @pytest.mark.parametrize(
        ("names", "options", "message"),
        [
            (["fid"], {}, "metrics: must be one of fd, kid, .*, got 'fid'"),
            ([], {}, "metrics: must be one or more of fd, kid"),
            (["fd", "fd"], {}, "metrics: must be different names"),
            (["kid"], {"num_images": 9}, "num_images: must be at least 10 for kid, got 9"),
            (["recall"], {"num_images": 5}, "num_images: must be at least 6 for recall, got 5"),
            (["inception_score"], {"num_images": 99}, "num_images: must be at least 100 for inception_score, got 99"),
            (["coverage"], {"num_reference": 4}, "reference: must have at least 6 images for coverage, got 4"),
            (["kid"], {"num_reference": None}, "metrics: kid must have a reference with images; with the statistics"),
            (["inception_score"], {"has_logits": False}, "metrics: inception_score must have a feature network with"),
            (["clip_score"], {}, "metrics: clip_score must be of a model that draws from prompts, this one does not"),
        ],
    )
    def test_what_cannot_be_computed_is_refused_in_one_line(self, names, options, message):
        with pytest.raises(FieldError, match=f"^{message}"):
            check_metrics(names, **{"num_images": 1000, "num_reference": 1000, **options})

    def test_what_can_be_computed_is_allowed(self):
        check_metrics(["fd", "inception_score"], 100, None)
        check_metrics(list(METRICS), 100, 10, has_text=True)


class TestFloor:
    def test_as_many_real_images_against_the_others(self):
        real = feature_set(normal(0, 300))
        found = floor(["fd", "kid"], real, count=100)
        assert found.count == 100
        assert found.missing == {}
        assert 0 < found.scores["fd"].value < 1
        kid = found.scores["kid"]
        assert kid.error is not None
        assert abs(kid.value) < 4 * kid.error
        assert floor(["fd", "kid"], real, count=100) == found
        assert floor(["fd"], real, count=100, seed=1).scores["fd"] != found.scores["fd"]

    def test_halves_where_too_few_are_left(self):
        found = floor(["fd"], feature_set(normal(0, 51)), count=30)
        assert found.count == 25

    def test_no_floor_and_why(self):
        found = floor(["fd", "clip_score"], FeatureSet(moments_of(normal(0, 50))), count=10)
        assert found == ({}, 0, {"fd": "the reference has statistics only, no images"})
        few = floor(["fd", "kid", "inception_score"], feature_set(normal(0, 12)), count=10)
        assert list(few.scores) == ["fd"]
        assert few.missing == {"kid": "it needs at least 10 images, 6 are compared"}

    def test_images_of_one_distribution_score_about_their_floor(self):
        generated = feature_set(normal(1, 100))
        real = feature_set(normal(0, 300))
        [found] = score(["fd"], generated, real)
        assert found.value == pytest.approx(floor(["fd"], real, 100).scores["fd"].value, rel=0.3)
