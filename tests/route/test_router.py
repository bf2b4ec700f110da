from dataclasses import replace

import numpy as np
import pytest

from tclora.errors import LibraryError
from tclora.route import Abstention, RouterState, derive, fit_router, routers
from tclora.route.router import load_router, save_router
from tclora.route.routers.nearest import Nearest
from tclora.route.text import calibrate_temperature

TEXT_ROUTERS = ("membership", "nearest", "per-token", "softmax")


def blobs(k=3, n=40, d=8, spread=0.15, seed=0):
    rng = np.random.default_rng(seed)
    vectors = np.eye(k, d).repeat(n, axis=0) + spread * rng.normal(size=(k * n, d))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), np.arange(k).repeat(n)


def fitted(**options):
    vectors, labels = blobs()
    return vectors, labels, fit_router(vectors, labels, **options)


def few(router, top_k):
    """The same router with mixtures of fewer clusters."""
    return type(router)(replace(router.clusters, top_k=top_k))


def test_a_prompt_goes_to_its_nearest_centroid():
    vectors, labels, router = fitted()
    routing = router.route(vectors)
    assert (routing.weights.argmax(1) == labels).all()
    assert set(np.unique(routing.weights)) == {0.0, 1.0}
    assert routing.similarity == pytest.approx((vectors @ router.clusters.centroids.T).max(1))


@pytest.mark.parametrize("coverage", [1.0, 0.8])
def test_thresholds_let_the_asked_share_of_new_rows_through(coverage):
    """Few rows in many dimensions: centroids are nearer to their own rows than to new ones."""
    strict = Abstention(9.0)  # the coverage alone keeps it from turning all away
    vectors, labels = blobs(k=3, n=1000, d=200, spread=0.12)
    seen = np.arange(len(labels)) % 50 == 0  # 20 rows per cluster
    router = fit_router(vectors[seen], labels[seen], coverage=coverage, abstention=strict)
    assert router.route(vectors[~seen]).coverage > coverage - 0.05
    alone = fit_router(vectors[seen][:20], labels[seen][:20], coverage=coverage, abstention=strict)
    new = vectors[~seen & (labels == 0)]
    assert coverage - 0.05 < alone.route(new).coverage < coverage + 0.15  # 20 rows tell so much


@pytest.mark.parametrize("at", [-0.2, 0.0, 0.4])
def test_thresholds_lie_at_a_share_of_the_way_to_the_other_clusters(at):
    vectors, labels = blobs(spread=0.05)
    rule = Abstention(at, 0.1)
    router = fit_router(vectors, labels, coverage=1.0, abstention=rule)
    similarity = vectors @ router.clusters.centroids.T
    for k in range(3):
        near, far = np.median(similarity[labels == k, k]), np.median(similarity[labels != k, k])
        wanted = far + at * (near - far)
        assert router.clusters.thresholds[k] == pytest.approx(wanted, abs=0.01)
        assert router.clusters.widths[k] == pytest.approx(0.1 * (near - far), abs=0.01)


def test_overlapping_clusters_know_the_asked_share_of_their_rows_whatever_the_rule():
    overlapping = blobs(spread=0.6)
    router = fit_router(*overlapping, coverage=0.9, abstention=Abstention(0.9))
    assert router.route(overlapping[0]).coverage > 0.8


def test_belonging_falls_smoothly_through_one_half_at_the_threshold():
    vectors, labels = blobs(spread=0.05)
    router = fit_router(vectors, labels, abstention=Abstention(0.5, 0.1))
    centre = router.clusters.centroids[0].astype(float)
    aside = np.eye(8)[7] - centre * centre[7]
    aside /= np.linalg.norm(aside)
    cosine = np.linspace(-0.2, 1, 200)
    ray = cosine[:, None] * centre + np.sqrt(1 - cosine**2)[:, None] * aside
    routing = router.route(ray.astype(np.float32))
    mine = routing.weights[:, 0] == 1
    shares, above = routing.shares[mine], cosine[mine] - router.clusters.thresholds[0]
    assert (np.diff(shares) >= 0).all()
    assert ((shares >= 0.5) == routing.known[mine]).all()
    wanted = 1 / (1 + np.exp(-above / router.clusters.widths[0]))
    assert shares == pytest.approx(wanted, abs=1e-3)
    step = fit_router(vectors, labels, abstention=Abstention(0.5, 0.0))
    assert set(step.route(ray.astype(np.float32)).shares) == {0.0, 1.0}


def test_a_router_of_the_previous_version_abstains_by_a_step():
    """Its thresholds stand for themselves: it stored no widths."""
    vectors, _, router = fitted()
    state = router.save()
    arrays = {name: array for name, array in state.arrays.items() if name != "widths"}
    found = Nearest.load(RouterState(arrays, state.settings))
    far = np.zeros((1, 8), np.float32)
    far[0, 7] = 1
    routing = found.route(np.concatenate([vectors, far]))
    assert (routing.shares == routing.known).all()
    assert routing.known.tolist()[-1] is False
    assert (found.clusters.thresholds == router.clusters.thresholds).all()


def test_a_prompt_far_from_every_cluster_is_not_known():
    _, _, router = fitted()
    far = np.zeros((1, 8), np.float32)
    far[0, 7] = 1
    routing = router.route(far)
    assert not routing.known[0]
    assert routing.coverage == 0


def test_a_mixture_weighs_by_similarity_and_keeps_the_strongest():
    vectors, labels = blobs(spread=0.6)  # clusters that overlap
    router = fit_router(vectors, labels, router="softmax")
    centroids = router.clusters.centroids
    between = (centroids[0] + 0.9 * centroids[1])[None]
    between /= np.linalg.norm(between)
    (weights,) = router.route(between).weights
    assert weights.sum() == pytest.approx(1)
    assert weights[0] > weights[1] > weights[2] > 0
    (kept,) = few(router, 2).route(between).weights
    assert kept[2] == 0
    assert kept[:2] == pytest.approx(weights[:2] / weights[:2].sum(), rel=1e-4)


def test_membership_follows_the_shape_of_a_cluster():
    """A crescent around a blob: its tips are nearer to the blob's centre than to its own."""
    rng = np.random.default_rng(0)
    angle = rng.uniform(-0.9 * np.pi, 0.9 * np.pi, 400)
    ring = np.stack([0.5 * np.cos(angle), 0.5 * np.sin(angle), np.ones(400)], axis=1)
    blob = np.stack([0.05 * rng.normal(size=40), 0.05 * rng.normal(size=40), np.ones(40)], axis=1)
    vectors = np.concatenate([ring, blob]).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.repeat([0, 1], [400, 40])
    router = fit_router(vectors, labels, router="membership")
    weights = router.route(vectors).weights
    assert weights.sum(axis=1) == pytest.approx(1)
    assert (weights[400:].argmax(axis=1) == 1).all()
    nearest = (derive(router, "nearest").route(vectors).weights.argmax(1) == labels).mean()
    assert (weights.argmax(1) == labels).mean() > nearest + 0.1
    (alone,) = few(router, 1).route(vectors[:1]).weights
    assert sorted(alone.tolist()) == [0, 1]


def test_the_temperature_is_the_most_likely_one():
    """Labels drawn from softmax(s / T) give T back."""
    rng = np.random.default_rng(1)
    similarity = rng.uniform(0, 1, (20_000, 4)).astype(np.float32)
    logits = similarity / 0.2
    odds = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (odds.cumsum(1) > rng.random((len(odds), 1))).argmax(1)
    assert calibrate_temperature(similarity, labels) == pytest.approx(0.2, rel=0.05)


def test_the_temperature_tells_sure_clusters_from_overlapping_ones():
    temperatures = [
        fit_router(*blobs(spread=spread)).clusters.temperature for spread in (0.15, 0.5)
    ]
    assert temperatures[1] > 2 * temperatures[0]


def test_a_cluster_of_one_row_is_kept():
    vectors, labels = blobs(n=10)
    vectors, labels = vectors[:21], labels[:21]
    router = fit_router(vectors, labels)
    assert np.isfinite(router.clusters.thresholds).all()
    assert router.route(vectors[20:]).weights.tolist() == [[0, 0, 1]]


def test_noise_belongs_to_no_cluster():
    vectors, labels = blobs()
    noisy = np.where(np.arange(len(labels)) % 10 == 0, -1, labels)
    clean, dirty = fit_router(vectors[noisy >= 0], noisy[noisy >= 0]), fit_router(vectors, noisy)
    assert (dirty.clusters.centroids == clean.clusters.centroids).all()
    assert (dirty.clusters.thresholds == clean.clusters.thresholds).all()


@pytest.mark.parametrize("name", TEXT_ROUTERS)
def test_vectors_of_another_width_are_refused(name):
    _, _, router = fitted(router=name)
    with pytest.raises(ValueError, match=r"shape \(N, 8\), got \(2, 5\)"):
        router.route(np.zeros((2, 5), np.float32))


@pytest.mark.parametrize("name", routers)
def test_every_router_gives_weights_and_comes_back_from_its_file(name, tmp_path):
    vectors, _, router = fitted(router=name, top_k=2)
    save_router(router, tmp_path / "router.safetensors")
    found = load_router(tmp_path / "router.safetensors")
    assert type(found) is routers[name]
    here, there = router.route(vectors), found.route(vectors)
    assert here.weights.dtype == np.float32
    assert here.weights.sum(axis=1) == pytest.approx(1)
    assert (here.weights >= 0).all()
    assert (here.weights == there.weights).all()
    assert (here.known == there.known).all()
    assert (here.shares == there.shares).all()
    assert here.by_token == there.by_token
    assert (here.by_token is not None) == (name == "per-token")


@pytest.mark.parametrize("name", TEXT_ROUTERS)
@pytest.mark.parametrize("other", TEXT_ROUTERS)
def test_text_routers_are_made_of_each_others_values(name, other, tmp_path):
    vectors, labels, router = fitted(router=name, top_k=2)
    save_router(router, tmp_path / "router.safetensors")
    wanted = fit_router(vectors, labels, router=other, top_k=2).route(vectors)
    found = load_router(tmp_path / "router.safetensors", other).route(vectors)
    assert (found.weights == wanted.weights).all()
    assert found.by_token == wanted.by_token


def test_equal_routers_are_equal_bytes(tmp_path):
    _, _, router = fitted()
    for number in range(16):
        save_router(router, tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_router_without_the_values_of_another_cannot_become_it():
    state = RouterState({"centroids": np.eye(3, dtype=np.float32)}, {"temperature": 0.1})
    with pytest.raises(LibraryError, match="stored thresholds, exemplars, top_k, which this"):
        Nearest.load(state)


def test_an_unknown_router_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"router must be a registered name, got 'near.*nearest"):
        fitted(router="nearst")
