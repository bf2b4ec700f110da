import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import tclora
from tclora.errors import ModelError
from tclora.model.tokens import encode
from tests.route.conftest import CLUSTERS, FAR, PROMPTS

NEW_PROMPTS = [*(prompts[1] for prompts in PROMPTS.values()), FAR]


def plain_answer(tiny_model_dir, tokenizer, adapter_dir, prompt, n):
    """What stock PEFT generates greedily with a plain adapter, row by row."""
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    model = PeftModel.from_pretrained(model, adapter_dir).eval()
    (row,) = encode(tokenizer, [prompt], [""], template="plain")
    ids = torch.tensor([row.prompt])
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=n, do_sample=False)
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("as_path", [True, False])
def test_each_prompt_is_answered_by_its_clusters_adapter(
    library, tiny_model_dir, tiny_model, tokenizer, tmp_path, as_path
):
    routed = tclora.load(library, tiny_model_dir if as_path else tiny_model, dtype="float32")
    found = routed.generate(NEW_PROMPTS, max_new_tokens=8)
    assert [c.known for c in found] == [True, True, True, False]
    for cluster, prompt, answer in zip(CLUSTERS, NEW_PROMPTS, found, strict=False):
        assert answer.weights[cluster] == 1.0
        plain = routed.library.to_peft(tmp_path / cluster, cluster)
        wanted = plain_answer(tiny_model_dir, tokenizer, plain, prompt, 8)
        assert answer.tokens == wanted
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
    wanted = plain_answer(tiny_model_dir, tokenizer, library / "routed", FAR, 8)
    assert found[3].tokens == wanted
    assert len({c.tokens for c in found}) > 1


def test_beams_and_samples_follow_their_prompts_route(library):
    routed = tclora.load(library)
    beams = routed.generate(NEW_PROMPTS, max_new_tokens=5, num_beams=3)
    alone = [routed.generate([p], max_new_tokens=5, num_beams=3)[0] for p in NEW_PROMPTS]
    assert [c.tokens for c in beams] == [c.tokens for c in alone]
    assert routed.generate(PROMPTS["cluster-0"], max_new_tokens=3, do_sample=True)


def test_a_new_process_generates_identical_tokens(library):
    found = tclora.load(library).generate(NEW_PROMPTS, max_new_tokens=6)
    code = (
        "import sys, tclora\n"
        "found = tclora.load(sys.argv[1]).generate(sys.argv[2:], max_new_tokens=6)\n"
        "print([c.tokens for c in found])\n"
    )
    command = [sys.executable, "-c", code, str(library), *NEW_PROMPTS]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str([c.tokens for c in found])


def test_per_token_routing_generates_too(library):
    routed = tclora.load(library)
    inputs = routed.encode(NEW_PROMPTS)
    with routed.routed_per_token(top_k=1), torch.inference_mode():
        out = routed.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 4


def test_the_per_token_router_gates_known_prompts_by_token(library):
    routed = tclora.load(library, dtype="float32", router="per-token")
    found = routed.generate(NEW_PROMPTS, max_new_tokens=8)
    assert [c.known for c in found] == [True, True, True, False]
    assert all(c.by_token for c in found)
    inputs = routed.encode(NEW_PROMPTS)
    with torch.inference_mode():
        static = routed.model(**inputs).logits[:, -1]
        with routed.routed_per_token():
            wanted = routed.model(**inputs).logits[:, -1]
        with routed.routed(routed.route(NEW_PROMPTS)):
            logits = routed.model(**inputs).logits[:, -1]
    assert torch.allclose(logits[:3], wanted[:3], atol=1e-5)
    assert torch.allclose(logits[3], static[3], atol=1e-5)
    assert (wanted - static).abs().max() > 0.1
    alone = [routed.generate([p], max_new_tokens=8)[0] for p in NEW_PROMPTS]
    assert [c.tokens for c in found] == [c.tokens for c in alone]
    beams = routed.generate(NEW_PROMPTS, max_new_tokens=3, num_beams=2)
    assert len(beams) == len(NEW_PROMPTS)


def test_another_base_or_embedding_model_is_refused(library, tmp_path, tokenizer, tiny_model):
    other = tmp_path / "other"
    with torch.no_grad():
        tiny_model.lm_head.weight[0, 0] += 1
    tiny_model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelError, match="base model must be the library's own"):
        tclora.load(library, other)
    with pytest.raises(ModelError, match="base model must be the library's own"):
        tclora.load(library, LlamaForCausalLM.from_pretrained(other))
    with pytest.raises(ModelError, match="embedding model must be the library's own"):
        tclora.load(library, embedder=str(other))


def test_a_base_that_cannot_be_told_or_has_adapters_is_refused(library, tiny_model):
    unnamed = LlamaForCausalLM(tiny_model.config.__class__(**tiny_model.config.to_dict()))
    unnamed.config.name_or_path = ""
    with pytest.raises(ModelError, match=r"config\.name_or_path is empty"):
        tclora.load(library, unnamed)
    tclora.load(library, tiny_model)
    with pytest.raises(ModelError, match="has LoRA layers"):
        tclora.load(library, tiny_model)


def test_what_cannot_be_generated_is_refused(library):
    routed = tclora.load(library)
    with pytest.raises(ValueError, match="at least one"):
        routed.generate([])
    with pytest.raises(ValueError, match="num_return_sequences must be 1, got 2"):
        routed.generate(NEW_PROMPTS, num_return_sequences=2)


def test_an_answer_ends_at_any_end_token_of_the_model(library):
    routed = tclora.load(library)
    whole = routed.generate(NEW_PROMPTS[:1], max_new_tokens=8)[0].tokens
    routed.model.generation_config.eos_token_id = [routed.tokenizer.eos_token_id, whole[3]]
    ended = routed.generate(NEW_PROMPTS[:1], max_new_tokens=8)[0].tokens
    assert ended == whole[: whole.index(whole[3]) + 1]


def test_defaults_of_the_checkpoint_change_no_answer(library, tiny_model):
    plain = tclora.load(library, dtype="float32").generate(NEW_PROMPTS, max_new_tokens=12)
    tiny_model.generation_config.update(repetition_penalty=5.0, suppress_tokens=[*range(40, 90)])
    routed = tclora.load(library, tiny_model)
    assert routed.generate(NEW_PROMPTS, max_new_tokens=12) == plain
    asked = routed.generate(NEW_PROMPTS, max_new_tokens=12, suppress_tokens=[*range(40, 90)])
    assert asked != plain


def test_a_long_prompt_leaves_room_for_its_answer(library):
    routed = tclora.load(library)
    inputs = routed.encode(["x" * 2000], room=50)
    assert inputs["input_ids"].shape[1] + 50 == routed.max_tokens == 512
