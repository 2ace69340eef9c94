import pytest

from search.intervals import metric_interval, normal, wilson


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [
        (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 10, 0.2366, 0.7634),
        (15 / 148, 148, 0.0624, 0.1605), (0.3, 0, 0.0, 1.0),
    ],
)  # fmt: skip
def test_wilson_agrees_with_published_values(share, n, low, high):
    # 15 of 148 is an example of Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson(share, n) == pytest.approx((low, high), abs=5e-5)


def test_a_mean_reaches_two_standard_errors_either_way():
    assert normal(1.0, 0.5) == pytest.approx((0.02, 1.98), abs=1e-4)


def test_only_a_share_or_a_known_error_gives_a_metric_interval():
    assert metric_interval(0.9, percent=True, n_samples=1000) == wilson(0.9, 1000)
    assert metric_interval(0.9, percent=False, n_samples=1000, stderr=0.1) == normal(0.9, 0.1)
    assert metric_interval(0.9, percent=False, n_samples=1000) is None
    assert metric_interval(None, percent=True, n_samples=1000) is None
