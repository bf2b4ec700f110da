"""Trainings of several adapters that were stopped end with the bytes of those that were not."""

import shutil

import pytest

from tests.train.several import (
    ROWS,
    StopHereError,
    assert_same_adapters,
    base,
    digests,
    histories,
    observe_batches,
    rows,
    train,
)

__all__ = ["base", "rows", "train"]


@pytest.mark.timeout(600)
def test_a_team_goes_on_where_it_was_ended(train):
    def end(event):
        if event["step"] == 12:
            raise KeyboardInterrupt

    given = {"names": ("animals", "cars"), "data_parallel": 2, "dropout": 0.3}
    whole, _, one = train(folder="whole", **given)
    with pytest.raises(KeyboardInterrupt):
        train(on_event=end, **given)
    again, told, two = train(**given)
    assert digests(one, ("animals", "cars")) == digests(two, ("animals", "cars"))
    assert histories(again) == histories(whole)
    assert len(told) == sum(result.steps for result in whole.values())


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({}, ("animals", 12)),
        ({}, ("birds", 4)),
        ({}, ("cars", 14)),
        ({}, ("animals", 33)),
        ({"freeze_a": True}, ("birds", 9)),
        ({"dropout": 0.3}, ("birds", 11)),
        ({"adapters_at_once": 2}, ("cars", 7)),
        ({"adapters_at_once": 2}, ("animals", 50)),
        ({"adapters_at_once": 1, "dropout": 0.3}, ("birds", 11)),
        (
            {
                "adapters_at_once": 2,
                "validation_fraction": 0.3,
                "validation_steps": 2,
                "patience": 2,
            },
            ("cars", 3),
        ),
    ],
    ids=str,
)
def test_an_interrupted_training_ends_with_the_same_bytes(train, changes, stop):
    whole, _, undisturbed = train(folder="whole", **changes)

    def interrupt(event):
        if (event["name"], event["step"]) == stop:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(folder="cut", on_event=interrupt, **changes)
    resumed, events, again = train(folder="cut", **changes)
    assert digests(again) == digests(undisturbed)
    assert histories(resumed) == histories(whole)
    for name, result in resumed.items():
        assert [e["step"] for e in events if e["name"] == name] == list(range(result.steps))


@pytest.mark.parametrize("lost", [("birds",), ("animals", "cars")], ids=str)
def test_adapters_resume_at_unequal_steps(train, lost):
    whole, _, undisturbed = train(folder="whole")

    def interrupt(event):
        if (event["name"], event["step"]) == ("animals", 22):
            raise StopHereError

    with pytest.raises(StopHereError):
        train(folder="cut", on_event=interrupt)
    for name in lost:
        shutil.rmtree(undisturbed.parent / "cut" / "checkpoints" / name)
    resumed, _, again = train(folder="cut")
    assert digests(again) == digests(undisturbed)
    assert histories(resumed) == histories(whole)


def test_a_finished_training_is_written_again_from_its_checkpoints(train, tokenizer):
    whole, _, folder = train()
    wanted = digests(folder)
    for name in ROWS:
        shutil.rmtree(folder / name)
    seen = []
    handle = observe_batches(tokenizer, seen)
    again, _, _ = train()
    handle.remove()
    assert not any(seen)
    assert digests(folder) == wanted
    assert histories(again) == histories(whole)


def test_a_checkpoint_is_the_same_engines_alike(train):
    _, _, undisturbed = train("separate", "whole")

    def interrupt(event):
        if (event["name"], event["step"]) == ("birds", 12):
            raise StopHereError

    with pytest.raises(StopHereError):
        train("together", "cut", on_event=interrupt)
    _, _, again = train("separate", "cut")
    assert_same_adapters(undisturbed, again)
