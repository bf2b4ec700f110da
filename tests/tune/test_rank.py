import pytest

from tclora.model.tokens import encode
from tclora.tune.rank import RoutedRecovery, smallest_rank
from tests.route.conftest import PROMPTS, adapters  # noqa: F401


@pytest.mark.parametrize("needed", [1, 3, 8, 13, 40])
def test_the_smallest_rank_is_found_by_few_trials(needed):
    tried = []

    def recovery(rank):
        tried.append(rank)
        return min(1.0, rank / needed)

    found = smallest_rank(recovery, 1.0, low=1, high=64)
    assert (found.rank, found.reached) == (needed, True)
    assert len(tried) == len(set(tried)) <= 12
    assert list(found.curve) == sorted(tried)


def test_a_target_out_of_reach_gives_the_largest_rank():
    found = smallest_rank(lambda rank: rank / 100, 0.95, low=4, high=48)
    assert (found.rank, found.reached) == (48, False)
    assert list(found.curve) == [4, 8, 16, 32, 48]


def test_the_step_bounds_the_effort():
    found = smallest_rank(lambda rank: rank / 13, 1.0, low=4, high=64, step=2)
    assert 13 <= found.rank <= 14
    with pytest.raises(ValueError, match="low ≤ high"):
        smallest_rank(float, 1.0, low=5, high=4)


def test_routed_recovery_is_whole_where_the_rank_is(tiny_model, tokenizer, adapters):  # noqa: F811
    """Responses the adapters themselves prefer: own adapters beat the base, rank 9 is exact."""
    rows = {
        name: encode(tokenizer, prompts, ["ok"] * 3, template="plain")
        for name, prompts in PROMPTS.items()
    }
    recovery = RoutedRecovery(tiny_model, adapters, rows, method="tc-lora-mean")
    better = [k for k in recovery._base if recovery._base[k] > recovery._own[k]]
    assert better
    assert recovery(9) == pytest.approx(1.0, abs=1e-3)
    assert recovery(1) != pytest.approx(1.0, abs=1e-2)
