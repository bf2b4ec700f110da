import pytest

from tclora.errors import ConfigError
from tclora.preflight.steps import STEPS, step_named


@pytest.mark.parametrize(("former", "step"), [("cluster", "prepare"), ("report", "publish")])
def test_stages_of_the_previous_version_name_their_step(former, step, caplog):
    assert step_named(former) == step
    assert f"until={former} is now until={step}" in caplog.text


def test_an_unknown_step_is_refused():
    assert [step_named(step) for step in STEPS] == list(STEPS)
    with pytest.raises(ConfigError, match=r"until must be one of prepare, .*, got 'tea'"):
        step_named("tea")
