import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.errors import AdapterError
from tclora.merge import MethodInfo, merge, methods, register
from tclora.merge.methods.elementwise import disjoint_mean, drop_and_rescale, magnitude_cutoff
from tclora.tensor import factorise
from tests.merge.examples import assert_same_updates, make_adapter


def test_methods_are_described():
    infos = methods()
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    for info in infos:
        assert isinstance(info, MethodInfo)
        assert info.summary
        assert info.paper
    assert {"uniform", "svd", "tc-lora", "regmean"} <= {info.name for info in infos}


def test_an_unknown_method_is_refused_with_a_suggestion(adapters):
    with pytest.raises(ValueError, match=r"'unifrom'; did you mean uniform\?"):
        merge(adapters, "unifrom")


def test_an_unknown_option_is_refused_with_a_suggestion(adapters):
    with pytest.raises(ValueError, match=r"'densty'; did you mean density\?"):
        merge(adapters, "ties", densty=0.5)
    with pytest.raises(ValueError, match="it takes no options"):
        merge(adapters, "uniform", density=0.5)


def test_a_name_can_be_registered_once():
    with pytest.raises(ValueError, match="'uniform', which is taken already"):
        register("uniform", summary="", paper="")


def test_base_models_must_agree_unless_forced():
    adapters = [make_adapter("a"), make_adapter("b", seed=1, base_model="other")]
    with pytest.raises(AdapterError, match=r"got base \(a\), other \(b\)"):
        merge(adapters, "uniform")
    assert merge(adapters, "uniform", force=True).adapter.base_model == "base"


def test_an_adapter_without_a_recorded_base_model_goes_with_any():
    merged = merge([make_adapter("a", base_model=None), make_adapter("b", seed=1)], "uniform")
    assert merged.adapter.base_model == "base"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "weights must be 3 numbers"),
        ([1, -1, 1], "none negative"),
        ([0, 0, 0], "not all zero"),
        ({"law": 1}, "weights must name every adapter"),
    ],
)
def test_weights_are_checked(adapters, weights, message):
    with pytest.raises(ValueError, match=message):
        merge(adapters, "uniform", weights=weights)


def test_weights_are_refused_where_they_mean_nothing(adapters):
    with pytest.raises(ValueError, match="ties, which takes none"):
        merge(adapters, "ties", weights=[1, 1, 1])


def test_what_a_method_needs_must_be_there(adapters):
    with pytest.raises(ValueError, match="statistics must be given for regmean"):
        merge(adapters, "regmean")
    with pytest.raises(ValueError, match="rank must be at least 1"):
        merge(adapters, "uniform", rank=0)
    with pytest.raises(ValueError, match=r"density must be above 0.*got 0"):
        merge(adapters, "ties", density=0)


def test_given_factors_are_used_in_the_adapters_order(adapters):
    factors = factorise(adapters, 4)
    merged = merge(adapters[::-1], "tc-lora-mean", factors=factors, weights=[0, 0, 1])
    assert_same_updates(merged.adapter, factors.reconstruct(adapters[0].name))
    assert "CP rank 4" in merged.notes[0]


def test_factors_of_other_adapters_are_refused(adapters):
    with pytest.raises(AdapterError, match="factors must cover adapters prose"):
        merge(adapters, "tc-lora-mean", factors=factorise(adapters[:2], 4))


def test_notes_name_the_scale(adapters):
    assert merge(adapters, "ties", rank=3).notes == ("scale 1 (default)",)
    assert merge(adapters, "ties", rank=3, scale=0.4).notes == ("scale 0.4",)


def test_half_precision_adapters_are_merged_in_single_precision():
    one = make_adapter("one")
    half = Adapter(
        "half", {m: LoraFactors(f.B.bfloat16(), f.A.bfloat16()) for m, f in one.modules.items()}
    )
    merged = merge([half], "uniform")
    assert all(f.B.dtype == torch.float32 for f in merged.adapter.modules.values())


def test_progress_ends_at_the_number_of_modules(adapters):
    seen = []
    merge(adapters, "uniform", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.77])
def test_magnitude_cutoff_is_the_order_statistic(density):
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    expected = x.abs().flatten().sort(descending=True).values[int(density * 1500) - 1]
    assert magnitude_cutoff(x, density) == float(expected)


def test_magnitude_cutoff_of_nothing_kept_and_of_zeros():
    assert magnitude_cutoff([torch.ones(3)], 0.1) == float("inf")
    assert magnitude_cutoff([torch.zeros(30)], 0.5) == 0


def test_disjoint_mean_ignores_losers_and_zeros():
    stack = torch.tensor([[1.0, -1.0, 0.0], [3.0, 2.0, -4.0], [-1.0, 0.0, -2.0]])
    assert disjoint_mean(stack).tolist() == [2.0, 2.0, -3.0]


def test_dropping_keeps_or_rescales():
    generator = torch.Generator().manual_seed(0)
    dropped = drop_and_rescale(torch.ones(1000), 0.25, generator)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert 200 < int((dropped > 0).sum()) < 300


def test_tc_lora_uses_activation_statistics_where_there_are_some(adapters, statistics):
    data_free = merge(adapters, "tc-lora", rank=4).adapter
    assert_same_updates(data_free, merge(adapters, "tc-lora-drift", rank=4).adapter)
    aware = merge(adapters, "tc-lora", rank=4, statistics=statistics)
    explicit = merge(adapters, "tc-lora-activation", rank=4, statistics=statistics)
    assert_same_updates(aware.adapter, explicit.adapter)
    assert not aware.notes  # no joint factors of the plain updates were computed
