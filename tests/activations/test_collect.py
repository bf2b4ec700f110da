import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tclora.activations import ActivationStatistics, collect
from tclora.errors import AdapterError, LibraryError
from tclora.merge import merge
from tclora.model.tokens import TokenRow
from tests.merge.examples import make_adapter

LAYER = "model.layers.{}.{}"
PARTS = {
    "self_attn.q_proj": (16, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
MODULES = {LAYER.format(i, part): shape for i in range(2) for part, shape in PARTS.items()}
ROWS = [TokenRow((3, 4, 5, 6, 7), (8, 2)), TokenRow((9,), (10, 2)), TokenRow((5, 5), (2,))]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def statistics(model):
    return collect(model, ROWS, "law", list(MODULES), pad_id=0, token_budget=16)


def test_matrices_are_those_of_unpadded_rows(model, statistics):
    name = LAYER.format(1, "mlp.down_proj")
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    with torch.inference_mode():
        for row in ROWS:
            model(torch.tensor([row.prompt + row.response]))
    handle.remove()
    x = torch.cat(seen)
    assert statistics.tokens == {"law": 13}
    assert len(x) == 13
    torch.testing.assert_close(
        statistics.of(name, ["law"])[0], (x.mT @ x / 13).double(), atol=1e-6, rtol=1e-4
    )


def test_modules_that_read_the_same_input_share_a_matrix(statistics):
    q, v, o = (LAYER.format(0, f"self_attn.{p}_proj") for p in "qvo")
    up, gate = (LAYER.format(0, f"mlp.{p}_proj") for p in ("up", "gate"))
    groups = statistics.groups
    assert groups[v] == groups[q] == q
    assert groups[up] == groups[gate] == gate
    assert groups[o] == o
    assert len(statistics.grams["law"]) == 8


def test_hooks_are_gone_afterwards(model, statistics):
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_batching_does_not_matter(model, statistics):
    one_by_one = collect(model, ROWS[::-1], "law", list(MODULES), pad_id=0, token_budget=1)
    for module in MODULES:
        torch.testing.assert_close(
            one_by_one.of(module, ["law"]), statistics.of(module, ["law"]), atol=1e-6, rtol=1e-4
        )


def test_files_of_several_clusters_are_loaded_as_one(model, statistics, tmp_path):
    other = collect(model, ROWS[:1], "prose", list(MODULES), pad_id=0)
    statistics.save(tmp_path / "law.safetensors")
    other.save(tmp_path / "prose.safetensors")
    both = ActivationStatistics.load(tmp_path / "law.safetensors", tmp_path / "prose.safetensors")
    assert both.tokens == {"law": 13, "prose": 7}
    for module in MODULES:
        read, written = both.of(module, ["prose"]), other.of(module, ["prose"])
        torch.testing.assert_close(read.float(), written.float())
    adapters = [make_adapter(n, modules=MODULES, seed=k) for k, n in enumerate(("prose", "law"))]
    merged = merge(adapters, "regmean", statistics=both, rank=2)
    assert all(torch.isfinite(f.B).all() for f in merged.adapter.modules.values())


def test_equal_statistics_are_equal_bytes(statistics, tmp_path):
    for number in range(16):
        statistics.save(tmp_path / f"{number}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_what_was_not_seen_is_named(model, statistics, tmp_path):
    with pytest.raises(AdapterError, match="must cover clusters poetry, got clusters law"):
        statistics.of(next(iter(MODULES)), ["law", "poetry"])
    with pytest.raises(AdapterError, match="must cover module lm_head"):
        statistics.of("lm_head", ["law"])
    with pytest.raises(ValueError, match="rows of law must be at least one"):
        collect(model, [], "law", list(MODULES), pad_id=0)
    with pytest.raises(ValueError, match=r"got 'model\.layers\.9\.x'"):
        collect(model, ROWS, "law", ["model.layers.9.x"], pad_id=0)
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(LibraryError, match="cannot be read"):
        ActivationStatistics.load(tmp_path / "x.safetensors")
