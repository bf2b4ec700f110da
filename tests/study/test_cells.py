import pytest

from tclora.config import Config, parse_config
from tclora.errors import ConfigError
from tclora.study.cells import make_cells, parse_axis
from tclora.study.registry import studies


def labels(cells):
    return [cell.config.name for cell in cells]


def test_every_combination_is_a_cell_with_a_library_of_its_own(tmp_path):
    axes = {"cluster.method": ["kmeans", "random"], "cluster.k": [4, 8]}
    cells = make_cells(Config(seed=3), axes, tmp_path)
    assert labels(cells) == ["kmeans_k4", "kmeans_k8", "random_k4", "random_k8"]
    assert [(c.config.cluster.method, c.config.cluster.k) for c in cells] == [
        ("kmeans", 4), ("kmeans", 8), ("random", 4), ("random", 8),
    ]  # fmt: skip
    assert {cell.layout.root.parent for cell in cells} == {tmp_path}
    assert {cell.config.data.seed for cell in cells} == {3}  # the same rows in every cell


def test_a_number_of_clusters_that_does_not_count_makes_no_cell(tmp_path):
    axes = {"cluster.method": ["hdbscan", "task", "kmeans"], "cluster.k": [4, 8]}
    cells = make_cells(Config(), axes, tmp_path)
    assert labels(cells) == ["hdbscan_kNone", "task_kNone", "kmeans_k4", "kmeans_k8"]
    assert cells[0].values == {"cluster.method": "hdbscan", "cluster.k": None}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.path", ["v1/train.jsonl", "v2/train.jsonl"]),
        ("embed.model", ["a/mpnet", "b/mpnet", "c/mpnet"]),
        ("route.abstain_at", [-1, 1]),
    ],
)
def test_values_that_look_alike_in_short_are_cells_of_their_own(tmp_path, key, values):
    cells = make_cells(Config(), {key: values, "seed": [0, 1]}, tmp_path)
    assert [cell.values[key] for cell in cells] == [value for value in values for _ in range(2)]
    assert len(set(labels(cells))) == len({cell.layout.root for cell in cells}) == len(cells)
    again = make_cells(Config(), {key: values[::-1], "seed": [1, 0]}, tmp_path)
    assert labels(again) == labels(cells)[::-1]  # a cell is found again, whatever its place


def test_a_value_that_is_given_twice_makes_one_cell(tmp_path):
    assert labels(make_cells(Config(), {"cluster.k": [4, 8, 4]}, tmp_path)) == ["k4", "k8"]


def test_keys_that_change_together_share_an_axis(tmp_path):
    cells = make_cells(Config(), {"train.r,train.alpha": [[4, 8], [8, 16]]}, tmp_path)
    assert [(c.config.train.r, c.config.train.alpha) for c in cells] == [(4, 8), (8, 16)]


def test_the_datas_own_seed_stays(tmp_path):
    config = parse_config({"data": {"seed": 7}})
    (cell,) = make_cells(config, {"seed": [5]}, tmp_path)
    assert (cell.config.seed, cell.config.data.seed) == (5, 7)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"cluster.kk": [1]}, r"axis must be a key, got 'cluster.kk'; did you mean cluster.k"),
        (
            {"train.r,train.alpha": [8, 16]},
            r"axis train.r,train.alpha must have lists of 2 values, one per key, got 8; write",
        ),
        ({"train.r,train.alpha": [[4, 8], [8]]}, r"must have lists of 2 values, .* got \[8\]"),
        ({"train.r,train.alpha": ["ab"]}, r"must have lists of 2 values, .* got 'ab'"),
        ({"cluster.k": ["many"]}, r"cell many has [\s\S]*cluster\.k"),
    ],
)
def test_an_axis_that_does_not_fit_is_named(tmp_path, axes, message):
    with pytest.raises(ConfigError, match=message):
        make_cells(Config(), axes, tmp_path)


def test_axes_are_read_from_the_command_line():
    assert parse_axis("cluster.k=[4, 8]") == ("cluster.k", [4, 8])
    assert parse_axis("train.r, train.alpha=[[4, 8]]") == ("train.r,train.alpha", [[4, 8]])
    for text in ("cluster.k", "cluster.k=4", "cluster.k=[]", "cluster.k=[4"):
        with pytest.raises(ConfigError, match="axis must be KEY="):
            parse_axis(text)


@pytest.mark.parametrize("name", studies)
def test_every_registered_study_has_cells(tmp_path, name):
    study = studies[name]
    cells = make_cells(Config(), study.axes, tmp_path)
    assert len(cells) > 3
    assert len(set(labels(cells))) == len(cells)
    assert set(study.control) <= set(study.axes)
