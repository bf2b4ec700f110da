import pandas as pd
import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from tclora.adapter import read_adapter, write_adapter
from tclora.config import MeasureConfig
from tclora.evaluate.cross import measure_cross
from tclora.evaluate.harm import summarise_cross
from tclora.model.base import Base
from tclora.model.tokens import encode
from tests.reference import row_nll
from tests.route.conftest import adapters  # noqa: F401

WORDS = ("one", "two", "three", "four", "five", "six")


@pytest.fixture
def rows(tmp_path):
    responses = list(WORDS)
    frame = pd.DataFrame(
        {
            "id": WORDS, "prompt": [f"say {word}" for word in WORDS], "response": responses,
            "answer": responses, "scorer": "exact", "metadata": None,
            "split": ["test"] * 5 + ["ood"], "task": None, "cluster": [1, 0, 1, 0, 1, 0],
        }
    )  # fmt: skip
    frame.to_parquet(tmp_path / "rows.parquet")
    return frame


def added_nll(tmp_path, rows, pair, model_dir, tokenizer):
    """NLL per token of every cluster under stock PEFT's concatenation of two adapters."""
    for place, adapter in enumerate(pair):
        write_adapter(adapter, tmp_path / f"stock-{place}")
    model = LlamaForCausalLM.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(model, tmp_path / "stock-0", "first")
    model.load_adapter(tmp_path / "stock-1", "second")
    model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    found = {}
    for cluster, part in rows[rows["split"] == "test"].groupby("cluster"):
        tokens = encode(tokenizer, part["prompt"].tolist(), part["response"].tolist(),
                        template="plain")  # fmt: skip
        total = sum(row_nll(model.eval(), row) for row in tokens)
        found[cluster] = total / sum(len(row.response) for row in tokens)
    return found


def test_every_cell_is_what_stock_peft_gives(
    tmp_path,
    rows,
    tiny_model_dir,
    tokenizer,
    adapters,  # noqa: F811
):
    paths = {}
    for number, adapter in enumerate(adapters[:2]):
        paths[f"cluster-{number}"] = tmp_path / f"cluster-{number}"
        write_adapter(adapter, paths[f"cluster-{number}"])
    base = Base(location=str(tiny_model_dir), digest="", dtype="float32", template="plain",
                max_tokens=64)  # fmt: skip
    events = []
    measured = measure_cross(
        base=base, rows=tmp_path / "rows.parquet", adapters=paths, per_cluster=3, seed=0,
        config=MeasureConfig(), file=tmp_path / "cross.parquet", on_event=events.append,
    )  # fmt: skip
    assert measured == 5  # the row out of domain does not count
    assert events[-1] == {"rows": 4, "of": 4}
    items = pd.read_parquet(tmp_path / "cross.parquet")
    summary = summarise_cross(items, resamples=50)
    alone, added = (summary[summary["added"] == flag] for flag in (False, True))
    table = alone.set_index(["adapter", "cluster"])
    assert table["n"].to_dict() == {
        (name, cluster): n for name in ("base", *paths) for cluster, n in ((0, 2), (1, 3))
    }
    assert sorted(zip(added["cluster"], added["adapter"], strict=True)) == [
        (0, "cluster-1"), (1, "cluster-0"),
    ]  # fmt: skip
    own = {0: table.loc[("cluster-0", 0), "nll"], 1: table.loc[("cluster-1", 1), "nll"]}
    for row in summary.to_dict("records"):
        assert row["change"] == pytest.approx(row["nll"] - own[row["cluster"]])
        assert row["change_low"] <= row["change"] <= row["change_high"]
    both = added_nll(tmp_path, rows, adapters[:2], tiny_model_dir, tokenizer)
    for row in added.to_dict("records"):
        assert row["nll"] == pytest.approx(both[row["cluster"]], rel=1e-4)
    for name in ("base", *paths):
        model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        if name in paths:
            model = PeftModel.from_pretrained(model, paths[name])
            assert read_adapter(paths[name]).modules
        for cluster, part in rows[rows["split"] == "test"].groupby("cluster"):
            tokens = encode(tokenizer, part["prompt"].tolist(), part["response"].tolist(),
                            template="plain")  # fmt: skip
            nll = sum(row_nll(model.eval(), row) for row in tokens)
            wanted = nll / sum(len(row.response) for row in tokens)
            assert table.loc[(name, cluster), "nll"] == pytest.approx(wanted, rel=1e-4)


def test_a_sample_of_the_rows_is_the_same_for_one_seed(tmp_path, rows, tiny_model_dir):
    base = Base(location=str(tiny_model_dir), digest="", dtype="float32", template="plain",
                max_tokens=64)  # fmt: skip

    def run(seed, name):
        measure_cross(base=base, rows=tmp_path / "rows.parquet", adapters={}, per_cluster=1,
                      seed=seed, config=MeasureConfig(), file=tmp_path / name)  # fmt: skip
        return pd.read_parquet(tmp_path / name)["nll"].tolist()

    first = run(0, "a")
    assert first == run(0, "b")
    assert any(run(seed, "c") != first for seed in range(1, 6))
