import json

import pytest

from tclora.config import parse_config
from tclora.errors import DataError
from tclora.preflight import check_data

ROWS = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(20)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def check(path, cluster=None, **data):
    check_data(parse_config({"data": {"path": path, **data}, "cluster": cluster or {"k": 2}}))


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"method": "random", "k": 19}, r"cluster.k must be at most .* \(18\), got 19"),
        ({"k": "auto", "k_range": [18, 19]}, r"cluster.k_range\[0\] must be .* \(17\), got 18"),
        (
            {"method": "hdbscan", "hdbscan_min_cluster_size": 8, "fit_rows": 7, "k": 2},
            r"hdbscan_min_cluster_size must be at most .* \(7\), got 8",
        ),
        ({"k": 1, "min_rows": 19}, r"cluster.min_rows must be at most .* \(18\), got 19"),
        ({"method": "task"}, "needs a task label on every training row, 18 lack one"),
    ],
)
def test_thresholds_are_held_against_the_training_rows(file, cluster, message):
    with pytest.raises(DataError, match=message):
        check(file, cluster)
    check(file, {"k": 18, "min_rows": 18})


@pytest.mark.parametrize("field", ["test_path", "ood_path", "composition_path"])
def test_every_file_is_read(file, tmp_path, field):
    with pytest.raises(DataError, match=f"data.{field} must name a file or folder that exists"):
        check(file, **{field: "none.csv"})
    empty = tmp_path / "empty.csv"
    empty.write_text("prompt,response\n")
    for path in (file, "demo", "someone/rows"):
        with pytest.raises(DataError, match=r"empty\.csv: must hold at least one row"):
            check(path, **{field: str(empty)})


@pytest.mark.parametrize("path", ["demo", "someone/rows"])
def test_given_embeddings_are_looked_at_first(path):
    config = parse_config({"data": {"path": path}, "embed": {"vectors": "none.parquet"}})
    with pytest.raises(DataError, match=r"embed\.vectors must name a file that exists, got 'none"):
        check_data(config)


def test_datasets_of_the_hub_are_left_to_the_run(file):
    check("someone/rows", {"k": 1000})
    check(file, test_path="someone/rows", ood_path="someone/more")


def test_the_demo_is_counted_without_being_made():
    check("demo", {"k": 1200})
    with pytest.raises(DataError, match=r"cluster.k must be at most .* \(1200\), got 1201"):
        check("demo", {"k": 1201})
    with pytest.raises(DataError, match=r"\(500\), got 501"):
        check("demo", {"k": 501}, ood_tasks=["kinship"], demo_train_rows=100)
    with pytest.raises(DataError, match=r"data\.ood_tasks must be task labels"):
        check("demo", ood_tasks=["cooking"])


def test_a_row_with_half_a_character_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud800", "response": "b"}\n')
    with pytest.raises(DataError, match="row 1: prompt must be Unicode text"):
        check(str(path))
