import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, homogeneity_score

from tclora.cluster.centroids import NOISE, assign, centroids
from tclora.cluster.quality import agreement, map_2d, silhouette
from tclora.cluster.registry import clusterers
from tclora.cluster.rows import cluster_rows
from tclora.config import ClusterConfig
from tclora.errors import DataError

SIZES = (60, 40, 30)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def blobs(sizes=SIZES, width=32, spread=0.08, seed=0):
    """Unit vectors around random directions, shuffled; returns them with their true labels."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((len(sizes), width)))
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    noise = spread * rng.standard_normal((len(truth), width))
    return unit(centres[truth] + noise), truth


def scattered(n=40, width=32, seed=1):
    return unit(np.random.default_rng(seed).standard_normal((n, width)))


def config(method="kmeans", **changes):
    return ClusterConfig(**{"method": method, "k": 3, "min_rows": 1} | changes)


HDBSCAN = {
    "hdbscan_min_cluster_size": 10, "hdbscan_dimensions": 5, "hdbscan_min_samples": 10,
    "hdbscan_selection": "eom",
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [config(), config(k="auto", k_range=(2, 6)), config("hdbscan", **HDBSCAN)],
    ids=["kmeans", "auto", "hdbscan"],
)
def test_planted_groups_are_found(settings):
    vectors, truth = blobs()
    found = cluster_rows(vectors, settings)
    assert adjusted_rand_score(truth, found.labels) == 1
    assert found.k == 3
    assert np.bincount(found.labels).tolist() == list(SIZES)  # numbered by falling size
    assert found.silhouette > 0.5
    assert found.centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1, rtol=1e-5)


def test_the_chosen_number_is_announced():
    found = cluster_rows(blobs()[0], config(k="auto", k_range=(2, 5)))
    assert any("K = 3 has the best silhouette" in notice for notice in found.notices)


@pytest.mark.parametrize("method", ["kmeans", "hdbscan", "random"])
def test_the_same_seed_gives_the_same_clusters(method):
    vectors, _ = blobs(spread=0.3)
    settings = config(method, **HDBSCAN | {"hdbscan_min_cluster_size": 5})
    if method == "hdbscan":
        vectors, _ = blobs()
    a, b = (cluster_rows(vectors, settings, seed=3) for _ in range(2))
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_array_equal(a.centroids, b.centroids)


@pytest.mark.parametrize("settings", [config(), config("hdbscan", **HDBSCAN)], ids=str)
def test_the_order_of_the_rows_does_not_matter(settings):
    vectors, _ = blobs()
    order = np.random.default_rng(5).permutation(len(vectors))
    here, there = cluster_rows(vectors, settings), cluster_rows(vectors[order], settings)
    np.testing.assert_array_equal(here.labels[order], there.labels)
    np.testing.assert_allclose(here.centroids, there.centroids, atol=1e-5)


def with_noise():
    """Three dense groups and eight rows that belong to none, too few for a group of their own."""
    vectors, truth = blobs(spread=0.02)
    return np.concatenate([vectors, scattered(8)]), truth


def test_noise_is_dropped_where_asked():
    vectors, truth = with_noise()
    found = cluster_rows(vectors, config("hdbscan", noise="drop", **HDBSCAN))
    outside = found.labels[len(truth) :]
    assert (outside == NOISE).sum() >= 4
    assert adjusted_rand_score(truth, found.labels[: len(truth)]) > 0.95
    assert any("were HDBSCAN noise and dropped" in notice for notice in found.notices)


def test_noise_goes_to_the_nearest_centroid_otherwise():
    vectors, _ = with_noise()
    dropped = cluster_rows(vectors, config("hdbscan", noise="drop", **HDBSCAN))
    kept = cluster_rows(vectors, config("hdbscan", noise="nearest", **HDBSCAN))
    assert (kept.labels != NOISE).all()
    noise = dropped.labels == NOISE
    assert any("assigned to the nearest centroid" in notice for notice in kept.notices)
    assert agreement(kept.labels[~noise], dropped.labels[~noise].astype(str))[0] == 1


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (scattered(60), "called every row noise among 60 rows"),
        (scattered(5), "must be at most the number of training rows \\(5\\), got 10"),
    ],
    ids=["all noise", "too few"],
)
def test_hdbscan_that_finds_nothing_is_an_error(vectors, message):
    with pytest.raises(DataError, match=message):
        cluster_rows(vectors, config("hdbscan", **HDBSCAN))


@pytest.mark.parametrize("sizes", [(400, 300, 200, 100), (30, 25, 20, 15)])
def test_hdbscan_finds_groups_of_any_size_by_default(sizes):
    vectors, truth = blobs(sizes, width=64, spread=0.06)
    found = cluster_rows(vectors, ClusterConfig(method="hdbscan", min_rows=1))
    assert 4 <= found.k <= 6  # a leaf may be part of a group
    assert homogeneity_score(truth, found.labels) > 0.98
    assert adjusted_rand_score(truth, found.labels) > 0.75


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_more_clusters_than_rows_is_an_error(method):
    with pytest.raises(DataError, match=r"cluster.k must be .* \(4\), got 5"):
        cluster_rows(scattered(4), config(method, k=5))


def test_no_candidate_for_k_is_an_error():
    with pytest.raises(DataError, match=r"at least one K between 2 and N-1 = 2"):
        cluster_rows(scattered(3), config(k="auto", k_range=(5, 9)))


def test_auto_is_for_kmeans_alone():
    (problem,) = clusterers["random"].check(config("random", k="auto"))
    assert "cluster.k must be a number with cluster.method: random" in problem
    assert [clusterers[name].check(config(name)) for name in clusterers] == [[]] * len(clusterers)


def test_one_cluster_is_allowed():
    found = cluster_rows(scattered(6), config(k=1))
    assert found.k == 1
    assert found.silhouette is None


def test_small_clusters_join_their_nearest_with_a_notice():
    angles = np.repeat([0.0, 0.3, 2.5], [30, 4, 20])
    rng = np.random.default_rng(0)
    angles = angles + 0.01 * rng.standard_normal(len(angles))
    vectors = unit(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    found = cluster_rows(vectors, config(min_rows=16))
    assert np.bincount(found.labels).tolist() == [34, 20]
    assert set(found.labels[:34]) == {0}
    assert found.notices == (
        "a cluster of 4 rows (fewer than cluster.min_rows = 16) was merged into its nearest",
    )


def test_everything_is_merged_where_no_cluster_is_large_enough():
    found = cluster_rows(scattered(12), config(k=4, min_rows=100))
    assert found.k == 1
    assert len(found.notices) == 3


def test_dropped_noise_is_not_merged_into_a_cluster():
    vectors, _ = with_noise()
    found = cluster_rows(vectors, config("hdbscan", noise="drop", **HDBSCAN))
    merged = cluster_rows(vectors, config("hdbscan", noise="drop", **HDBSCAN | {"min_rows": 35}))
    assert merged.k == 2
    np.testing.assert_array_equal(merged.labels == NOISE, found.labels == NOISE)


def test_random_groups_are_even_and_ignore_the_texts():
    vectors, truth = blobs()
    found = cluster_rows(vectors, config("random"))
    assert np.bincount(found.labels).tolist() == [44, 43, 43]
    assert abs(adjusted_rand_score(truth, found.labels)) < 0.1
    other = cluster_rows(vectors, config("random"), seed=1)
    assert (other.labels != found.labels).any()


def test_task_labels_as_clusters():
    vectors, truth = blobs()
    found = cluster_rows(vectors, config("task"), tasks=[f"task {t}" for t in truth])
    assert adjusted_rand_score(truth, found.labels) == 1


@pytest.mark.parametrize(
    ("tasks", "missing"), [(None, 4), (["a"] * 3 + [None], 1), ([None, float("nan"), "a", "b"], 2)]
)
def test_clusters_by_task_need_every_label(tasks, missing):
    with pytest.raises(DataError, match=f"every training row, {missing} lack one"):
        cluster_rows(scattered(4), config("task"), tasks=tasks)


def test_held_out_rows_go_where_their_clusterer_says():
    vectors, truth = blobs()
    tasks = [f"task {t}" for t in truth]
    seen = np.arange(len(truth)) % 4 > 0
    known = [task for task, row in zip(tasks, seen, strict=True) if row]
    new = vectors[~seen]
    near = cluster_rows(vectors[seen], config(), tasks=known)
    assert (near.assign(new) == assign(new, near.centroids)[0]).all()
    by_task = cluster_rows(vectors[seen], config("task"), tasks=known)
    elsewhere = np.roll(new, 1, axis=0)  # the label counts, not the text
    labels = [task for task, row in zip(tasks, seen, strict=True) if not row]
    own = dict(zip(known, by_task.labels.tolist(), strict=True))
    assert by_task.assign(elsewhere, labels).tolist() == [own[task] for task in labels]
    unlabelled = by_task.assign(new, ["unheard of"] * len(new))
    assert (unlabelled == assign(new, by_task.centroids)[0]).all()
    random = cluster_rows(vectors[seen], config("random"), seed=3)
    assert np.ptp(np.bincount(random.assign(new))) <= 1
    assert (random.assign(new) == random.assign(np.roll(new, 1, axis=0))).all()


def test_an_unknown_clusterer_is_named_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"got 'kmean'; did you mean kmeans\?"):
        cluster_rows(blobs()[0], config("kmean"))


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_a_fit_on_a_sample_labels_all_rows(method):
    vectors, truth = blobs((300, 200, 100))
    found = cluster_rows(vectors, config(method, fit_rows=120, **HDBSCAN))
    assert len(found.labels) == 600
    assert adjusted_rand_score(truth, found.labels) == 1
    if method == "hdbscan":
        assert any("fitted on 120 rows" in notice for notice in found.notices)


def test_assign_gives_nearest_and_its_cosine():
    centres = unit(np.array([[1.0, 0.0], [0.0, 1.0]]))
    nearest, similarity = assign(unit(np.array([[3.0, 4.0], [4.0, 3.0], [-1.0, 0.1]])), centres)
    assert nearest.tolist() == [1, 0, 1]
    np.testing.assert_allclose(similarity, [0.8, 0.8, 0.0995], atol=1e-4)


def test_centroids_leave_noise_out():
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]]))
    found = centroids(vectors, np.array([0, 0, NOISE, 1]))
    np.testing.assert_allclose(found, [[1, 0], [0, 1]], atol=1e-6)


def test_silhouette_is_defined_only_between_two_and_n_minus_one_clusters():
    vectors = scattered(6)
    assert silhouette(vectors, np.zeros(6, dtype=int)) is None
    assert silhouette(vectors, np.arange(6)) is None
    assert silhouette(vectors, np.array([0, 0, 0, 1, 1, 1])) is not None
    assert silhouette(vectors, np.array([0, 0, NOISE, NOISE, NOISE, NOISE])) is None


def test_agreement_counts_labelled_rows_alone():
    labels = np.array([0, 0, 1, 1, NOISE])
    assert agreement(labels, ["a", "a", "b", None, "b"]) == (1.0, 1.0)
    assert agreement(labels, [None] * 5) is None
    ari, nmi = agreement(labels, ["a", "b", "a", "b", "a"])
    assert ari < 0.1
    assert nmi == pytest.approx(0, abs=1e-9)


def test_the_map_keeps_groups_apart():
    vectors, truth = blobs()
    points = map_2d(vectors)
    assert points.shape == (len(vectors), 2)
    means = np.stack([points[truth == k].mean(axis=0) for k in range(3)])
    spread = max(points[truth == k].std() for k in range(3))
    gaps = [np.linalg.norm(means[i] - means[j]) for i in range(3) for j in range(i)]
    assert min(gaps) > 2 * spread
    np.testing.assert_array_equal(map_2d(vectors[:2]), np.zeros((2, 2)))
