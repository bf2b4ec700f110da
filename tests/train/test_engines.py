"""How engines divide adapters into jobs, and one of these jobs."""

import pytest

from tclora.config import AdapterConfig
from tclora.jobs.run import LocalExecutor
from tclora.train.engines import AdapterRequest, engines, train_adapters
from tests.train.several import (
    FAST,
    ROWS,
    assert_same_adapters,
    assert_same_results,
    base,
    rows,
    train,
)

__all__ = ["base", "rows", "train"]
SIZES = {"a": 5, "b": 50, "c": 30, "d": 20}


def test_in_a_job_of_its_own(base, rows, tmp_path):
    given = {
        "base": base,
        "config": AdapterConfig(**FAST | {"epochs": 3}),
        "checkpoint_steps": 5,
    }

    def requests(folder):
        return [
            AdapterRequest(
                name=name, rows=rows / name, target=tmp_path / folder / name,
                checkpoint=tmp_path / f"{folder}-{name}",
            )
            for name in ROWS
        ]  # fmt: skip

    events = []
    found = LocalExecutor().run_isolated(
        train_adapters, engine="together", requests=requests("job"), on_event=events.append, **given
    )
    wanted = train_adapters(engine="separate", requests=requests("here"), **given)
    assert_same_results(found, wanted)
    assert_same_adapters(tmp_path / "here", tmp_path / "job")
    assert len(events) == sum(result.steps for result in wanted.values())


@pytest.mark.parametrize(
    ("gpus", "slots", "wanted"),
    [
        ("", 4, [["b", "c", "d", "a"]]),
        ("0", 4, [["b", "c", "d", "a"]]),
        ("0,1", 1, [["b", "c", "d", "a"]]),
        ("0,1", 2, [["b", "a"], ["c", "d"]]),
        ("0,1,2,3,4,5", 6, [["b"], ["c"], ["d"], ["a"]]),
    ],
)
def test_jobs_share_adapters_by_device(monkeypatch, gpus, slots, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    assert engines["together"].divide(SIZES, slots) == wanted


def test_separate_has_a_job_for_each():
    assert engines["separate"].divide(SIZES, 2) == [["b"], ["c"], ["d"], ["a"]]
