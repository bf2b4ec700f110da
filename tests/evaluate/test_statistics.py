import numpy as np
import pytest
from scipy import stats

from tclora.evaluate.statistics import Bootstrap, Difference, difference, holm


def mean_interval(values, bootstrap):
    """Interval of the mean of values (S, n)."""
    return bootstrap.interval(bootstrap.sums(values[None])[0] / values.shape[1])


def test_one_seed_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).gamma(2.0, size=80)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = mean_interval(values[None], Bootstrap(resamples=20_000))
    assert found == pytest.approx((wanted.low, wanted.high), abs=0.015)


def test_a_paired_difference_is_scipys():
    rng = np.random.default_rng(2)
    shared = rng.normal(size=60)
    one, other = shared + rng.normal(0.1, 0.2, 60), shared + rng.normal(0, 0.2, 60)
    wanted = stats.bootstrap(
        (one, other),
        lambda a, b, axis=-1: a.mean(axis) - b.mean(axis),
        paired=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(3),
    )  # fmt: skip
    bootstrap = Bootstrap(resamples=20_000)
    draws = bootstrap.sums(np.stack([one, other])[:, None]) / 60
    found = difference(one.mean() - other.mean(), draws[0] - draws[1], bootstrap, n=60)
    interval = wanted.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.005)
    t = stats.ttest_rel(one, other).pvalue
    assert found.p == pytest.approx(t, abs=0.02)


def test_the_standard_error_of_seeds_is_unbiased():
    """Of S seeds S - 1 are drawn: the variance of their mean is s² / S, not smaller."""
    by_seed = np.array([1.0, 2.0, 6.0])
    draws = Bootstrap(resamples=50_000).sums(np.repeat(by_seed[:, None], 4, axis=1)[None])[0] / 4
    assert draws.std() == pytest.approx(by_seed.std(ddof=1) / np.sqrt(3), rel=0.02)


@pytest.mark.parametrize(("seeds", "n", "least"), [(1, 60, 0.86), (8, 60, 0.82), (3, 60, 0.7)])
def test_intervals_cover_the_truth(seeds, n, least):
    """Crossed effects of seeds and items; nominal 0.9, less with three seeds, as documented."""
    rng = np.random.default_rng(seeds)
    hits = 0
    for trial in range(300):
        spread = 0.1 if seeds > 1 else 0.0
        table = rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 1, (1, n)) * 0.8
        table = table + rng.normal(0, 0.3, (seeds, n))
        low, high = mean_interval(table, Bootstrap(0.9, 300, seed=trial))
        hits += low <= 0 <= high
    assert least <= hits / 300 <= 0.97


def test_items_are_shared_by_seeds():
    """Items anew in every seed would make the interval of a common item effect √S too narrow."""
    effects = np.random.default_rng(4).normal(size=50)
    bootstrap = Bootstrap(resamples=5000)
    one = mean_interval(effects[None], bootstrap)
    many = mean_interval(np.tile(effects, (9, 1)), bootstrap)
    assert np.ptp(many) == pytest.approx(np.ptp(one))


@pytest.mark.parametrize(
    ("p", "wanted"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5], [0.5]),
        ([0.6, 0.7], [1.0, 1.0]),
        ([0.02, np.nan, 0.01], [0.02, np.nan, 0.02]),
        ([], []),
    ],
)
def test_holm(p, wanted):
    assert holm(p) == pytest.approx(wanted, nan_ok=True)


def test_holm_keeps_the_familywise_error():
    rng = np.random.default_rng(5)
    wrong = sum(min(holm(rng.random(10))) <= 0.05 for _ in range(2000)) / 2000
    assert 0.03 < wrong < 0.065


def test_no_difference_at_all_is_p_1():
    bootstrap = Bootstrap(resamples=50)
    assert difference(0.0, np.zeros(50), bootstrap, n=9) == Difference(0.0, 0.0, 0.0, 1.0)
    assert np.isnan(difference(np.nan, np.full(50, np.nan), bootstrap, n=9).p)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_same_difference_on_every_item_has_scipys_sign_test(n):
    bootstrap = Bootstrap(resamples=50)
    found = difference(1.0, np.ones(50), bootstrap, n=n, largest=1.0)
    assert found.p == pytest.approx(stats.binomtest(n, n).pvalue)
    share = stats.binomtest(n, n).proportion_ci(0.95, method="exact")  # of items at 1, not at -1
    assert (found.low, found.high) == pytest.approx((2 * share.low - 1, 1.0))
    assert np.isnan(difference(0.5, np.full(50, 0.5), bootstrap, n=n)[1:3]).all()


def test_a_part_of_the_range_on_every_item_leaves_both_sides_open():
    found = difference(-0.5, np.full(50, -0.5), Bootstrap(), n=4, largest=1.0)
    missed = 1 - 0.025 ** (1 / 4)
    assert (found.low, found.high) == pytest.approx((-0.5 - 0.5 * missed, -0.5 + 1.5 * missed))


def test_seeds_that_differ_do_not_make_one_item_several():
    found = difference(0.4, np.random.default_rng(6).normal(0.4, 0.01, 50), Bootstrap(), n=1)
    assert found.p == 1
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("n", [1, 4, 50])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_an_extreme_share_has_scipys_exact_interval(n, confidence):
    bootstrap = Bootstrap(confidence)
    for right, share in ((0, 0.0), (n, 1.0)):
        wanted = stats.binomtest(right, n).proportion_ci(confidence, method="exact")
        assert bootstrap.extreme_share(share, n) == pytest.approx((wanted.low, wanted.high))
