from benchmarks.kills import drill
from tclora.model.base import Base


def test_a_killed_training_ends_with_the_bytes_of_the_undisturbed_one(tiny_model_dir, tmp_path):
    base = Base(
        location=str(tiny_model_dir), digest="", dtype="float32", template="plain", max_tokens=64
    )
    found = list(drill(base, tmp_path / "drill", kills=2))
    assert [record["same bytes"] for record in found] == [True, True]
