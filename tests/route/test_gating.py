import pytest
import torch
from peft import PeftModel

from tclora.adapter import Adapter, LoraFactors, write_adapter
from tclora.errors import AdapterError
from tclora.merge import merge
from tclora.route import Gating, fit_gates
from tests.route.conftest import draw_adapters

IDS = torch.arange(40).reshape(4, 10) % 50 + 4


def loaded(model, adapter, folder):
    write_adapter(adapter, folder)
    return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


@pytest.fixture
def gating(tiny_model, gated, tmp_path):
    return Gating(loaded(tiny_model, gated.adapter, tmp_path / "static"), gated)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def plain_logits(tiny_model_dir, adapter, folder, ids=IDS):
    from transformers import LlamaForCausalLM

    return logits(loaded(LlamaForCausalLM.from_pretrained(tiny_model_dir), adapter, folder), ids)


def test_rows_of_one_batch_are_gated_each_by_its_own_mixture(
    gating, gated, tiny_model, tiny_model_dir, tmp_path
):
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.2, 0.5, 0.3], [0, 1, 0]])
    known = torch.tensor([True, True, True, False])
    with gating.applied(weights, known):
        found = logits(tiny_model)
    for row, mixture in enumerate(weights[:3]):
        wanted = plain_logits(tiny_model_dir, gated.mixed(mixture), tmp_path / f"m{row}")
        assert torch.allclose(found[row], wanted[row], atol=1e-4)
    static = plain_logits(tiny_model_dir, gated.adapter, tmp_path / "plain")
    assert torch.allclose(found[3], static[3], atol=1e-4)
    assert (found[0] - static[0]).abs().max() > 0.1  # routing matters here
    assert torch.allclose(logits(tiny_model), static, atol=1e-6)  # outside of the context


def test_one_row_serves_any_batch_and_beams_repeat_theirs(gating, tiny_model):
    weights = torch.eye(3)[:2]
    with gating.applied(weights[:1]):
        one = logits(tiny_model)
    with gating.applied(torch.eye(3)[[0, 0, 0, 0]]):
        assert torch.allclose(logits(tiny_model), one, atol=1e-6)
    with gating.applied(weights):  # two routed rows, two beams each
        beams = logits(tiny_model)
    with gating.applied(weights.repeat_interleave(2, 0)):
        assert torch.allclose(logits(tiny_model), beams, atol=1e-6)
    with gating.applied(weights), pytest.raises(ValueError, match="multiple of the 2 routed rows"):
        logits(tiny_model, IDS[:3])


def test_a_second_thread_waits_for_the_gates(gating, tiny_model):
    import threading

    with gating.applied(torch.eye(3)[1:2]):
        wanted = logits(tiny_model)
    found = []

    def other():
        with gating.applied(torch.eye(3)[1:2]):
            found.append(logits(tiny_model))

    thread = threading.Thread(target=other)
    with gating.applied(torch.eye(3)[:1]):
        before = logits(tiny_model)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert torch.equal(logits(tiny_model), before)
    thread.join(30)
    assert torch.equal(found[0], wanted)


def test_an_exception_leaves_the_static_merge(gating, tiny_model):
    before = logits(tiny_model)
    with pytest.raises(ZeroDivisionError), gating.applied(torch.eye(3)[:1]):
        raise ZeroDivisionError
    assert torch.equal(logits(tiny_model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type(tiny_model, gated, tmp_path, dtype):
    model = tiny_model.to(dtype)
    gating = Gating(loaded(model, gated.adapter, tmp_path / "static"), gated)
    with gating.applied(torch.eye(3)):
        found = logits(model, IDS[:3])
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_gradients_are_the_same_with_gradient_checkpointing(gating, tiny_model):
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]])
    B = [p for n, p in tiny_model.named_parameters() if "lora_B" in n]
    for parameter in B:
        parameter.requires_grad_(True)

    def gradients():
        tiny_model.train()
        with gating.applied(weights):
            tiny_model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found = [p.grad.clone() for p in B]
        for parameter in B:
            parameter.grad = None
        return found

    plain = gradients()
    tiny_model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, other in zip(gradients(), plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert max(float(g.abs().max()) for g in plain) > 0


def test_per_token_routing_is_arrow_on_the_gated_updates(gating, gated, tiny_model):
    """One module against its definition: prototypes are the updates' first right vectors."""
    name = next(iter(gated.gates))
    layer = tiny_model.get_submodule(name)
    A = gated.adapter.modules[name].A
    x = torch.randn(2, 5, A.shape[1], generator=torch.Generator().manual_seed(0))
    own = [gated.cluster(k).modules[name].delta() for k in range(3)]
    v = torch.stack([torch.linalg.svd(delta.double())[2][0] for delta in own]).float()
    scores = (x @ v.mT).abs()
    for top_k in (None, 1, 2):
        kept = scores
        if top_k:
            least = scores.topk(top_k, dim=-1).values[..., -1:]
            kept = scores.masked_fill(scores < least, -torch.inf)
        pi = (kept / 0.5).softmax(-1)
        wanted = sum(pi[..., k, None] * (x @ own[k].mT) for k in range(3))
        with gating.applied_per_token(temperature=0.5, top_k=top_k), torch.no_grad():
            found = layer(x) - layer.base_layer(x)
        assert torch.allclose(found, wanted, atol=1e-4)


def test_per_token_routing_refuses_what_means_nothing(gating):
    for options in ({"temperature": 0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="above 0 and top_k at least 1"):
            gating.applied_per_token(**options).__enter__()


def test_another_adapter_is_refused(tiny_model, gated, tmp_path):
    fewer = Adapter("fewer", dict(list(gated.adapter.modules.items())[1:]), "tiny")
    model = loaded(tiny_model, fewer, tmp_path / "fewer")
    with pytest.raises(AdapterError, match="differs in 1, such as"):
        Gating(model, gated)


def test_modules_may_have_ranks_of_their_own(tiny_model, tmp_path):
    adapters = draw_adapters(tiny_model)
    merged = merge(adapters, "tc-lora-mean", rank=9).adapter
    narrow = {
        module: LoraFactors(B[:, : 2 + i % 5], A[: 2 + i % 5])
        for i, (module, (B, A)) in enumerate(merged.modules.items())
    }
    gated = fit_gates(adapters, Adapter("narrow", narrow, "tiny"))
    gating = Gating(loaded(tiny_model, gated.adapter, tmp_path / "narrow"), gated)
    with gating.applied(torch.eye(3)[:2]):
        assert logits(tiny_model, IDS[:2]).isfinite().all()
