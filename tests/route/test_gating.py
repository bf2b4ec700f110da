import _thread
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

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
    assert torch.allclose(logits(tiny_model), static, atol=1e-4)  # outside of the context


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


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(30)


def test_every_thread_has_gates_of_its_own(gating, tiny_model):
    static = logits(tiny_model)
    with gating.applied(torch.eye(3)[1:2]):
        second = logits(tiny_model)

    def other():
        with gating.applied(torch.eye(3)[1:2]):
            return logits(tiny_model)

    with gating.applied(torch.eye(3)[:1]):
        first = logits(tiny_model)
        assert torch.equal(in_thread(other), second)
        assert torch.equal(in_thread(lambda: logits(tiny_model)), static)
        assert torch.equal(logits(tiny_model), first)
    assert torch.equal(logits(tiny_model), static)


def in_foreign_thread(function):
    """Run a function in a thread that Python's `threading` did not start, as autograd's are."""
    found, done = [], threading.Event()

    def body():
        try:
            found.append(function())
        except RuntimeError as error:
            found.append(error)
        done.set()

    _thread.start_new_thread(body, ())
    assert done.wait(30)
    return found[0]


def test_a_thread_of_autograd_takes_the_gates_of_the_one_context(gating, tiny_model):
    static = logits(tiny_model)
    assert torch.equal(in_foreign_thread(lambda: logits(tiny_model)), static)
    with gating.applied(torch.eye(3)[:1]):
        wanted = logits(tiny_model)
        assert torch.equal(in_foreign_thread(lambda: logits(tiny_model)), wanted)

        def from_a_second():
            with gating.applied(torch.eye(3)[1:2]):
                return in_foreign_thread(lambda: logits(tiny_model))

        error = in_thread(from_a_second)
    assert "must not run in several gated threads" in str(error)


def test_what_would_take_unit_components_for_an_update_is_refused(tiny_model, gated, tmp_path):
    """After a merge routing would stop without a word."""
    model = loaded(tiny_model, gated.adapter, tmp_path / "static")
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"must not be merged .* call unmerge_adapter"):
        Gating(model, gated)
    model.unmerge_adapter()
    gating = Gating(model, gated)
    with gating.applied(torch.eye(3)[:1]):
        before = logits(model)
    for action in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"apart from the base weights .* to_peft"):
            action()
    with pytest.raises(AdapterError, match="to_peft"):
        model.save_pretrained(tmp_path / "saved")
    with gating.applied(torch.eye(3)[:1]):
        assert torch.equal(logits(model), before)


def test_an_exception_leaves_the_static_merge(gating, tiny_model):
    before = logits(tiny_model)
    with pytest.raises(ZeroDivisionError), gating.applied(torch.eye(3)[:1]):
        raise ZeroDivisionError
    assert torch.equal(logits(tiny_model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_be_cast_after_its_gates_are_set(gating, tiny_model, dtype):
    before = {}
    contexts = {
        "rows": lambda: gating.applied(torch.eye(3)[:1]),
        "tokens": gating.applied_per_token,
        "static": nullcontext,
    }
    for name, context in contexts.items():
        with context():
            before[name] = logits(tiny_model)
    tiny_model.to(dtype)
    for name, context in contexts.items():
        with context():
            after = logits(tiny_model)
            if dtype == torch.float64:  # PEFT's own pass too
                by_peft = tiny_model(input_ids=IDS).logits
                assert torch.allclose(by_peft, after)
        assert after.dtype == dtype
        share = 0.1 if dtype == torch.bfloat16 else 1e-4
        assert (after.float() - before[name]).norm() < share * before[name].norm()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(gating, value):
    weights = torch.tensor([[1.0, 0, 0], [0, value, 0]])
    with pytest.raises(ValueError, match="weights must be finite"):
        gating.applied(weights).__enter__()


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
