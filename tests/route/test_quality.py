import numpy as np
import pandas as pd
import pytest

from tclora.route.quality import reliability, router_figures, true_clusters


def rows():
    return pd.DataFrame(
        [("a", "train", 0)] * 3
        + [("a", "train", 1), ("b", "train", 1), ("b", "train", -1), ("b", "train", -1)]
        + [("a", "test", 1), ("b", "test", 0), ("c", "ood", 0), (None, "test", 1)],
        columns=["task", "split", "cluster"],
    )


def test_a_tasks_true_cluster_holds_most_of_its_training_rows():
    found = true_clusters(rows())
    held_out = found[rows()["split"] != "train"]
    assert held_out.tolist()[:2] == [0, 1]
    assert held_out.isna().tolist() == [False, False, True, True]


def test_without_labels_there_is_no_truth():
    assert true_clusters(rows().assign(task=None)).isna().all()


def test_a_calibrated_router_has_its_confidence_as_accuracy():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 20_000).astype("float32")
    curve = reliability(confidence, rng.random(20_000) < confidence)
    assert curve["n"].sum() == 20_000
    assert curve["accuracy"].tolist() == pytest.approx(curve["confidence"].tolist(), abs=0.03)


def test_figures_are_accuracy_calibration_and_coverage():
    routing = pd.DataFrame(
        {
            "split": ["test"] * 4 + ["ood"] * 2,
            "nearest": [0, 1, 1, 0, 0, 1],
            "true": pd.array([0, 1, 0, None, None, None], dtype="Int64"),
            "known": [True, True, True, False, False, True],
            "confidence": [0.95, 0.95, 0.95, 0.5, 0.5, 0.5],
        }
    )
    figures = router_figures(routing)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["calibration_error"] == pytest.approx(0.95 - 2 / 3)
    assert figures["coverage_test"] == 0.75
    assert figures["coverage_ood"] == 0.5
    assert "accuracy" not in router_figures(routing.assign(true=pd.NA))
