from transformers import GenerationConfig

from tclora.model.generation import only_end_tokens, plain_generation


def test_the_defaults_of_a_checkpoint_are_left_out_but_for_the_end(tiny_model, tokenizer):
    kept = GenerationConfig(
        repetition_penalty=1.3, do_sample=True, temperature=0.6, min_new_tokens=9,
        suppress_tokens=[5], eos_token_id=[2, 7], pad_token_id=3, bos_token_id=1,
    )  # fmt: skip
    tiny_model.generation_config = kept
    with plain_generation(tiny_model, tokenizer):
        given = tiny_model.generation_config.to_diff_dict()
    assert given.pop("eos_token_id") == sorted({2, 7, tokenizer.eos_token_id})
    assert {key: given[key] for key in ("pad_token_id", "bos_token_id")} == {
        "pad_token_id": 3, "bos_token_id": 1,
    }  # fmt: skip
    assert set(given) <= {"pad_token_id", "bos_token_id", "transformers_version"}
    assert tiny_model.generation_config is kept


def test_a_checkpoint_that_names_no_end_gets_the_tokenizers(tiny_model, tokenizer):
    tiny_model.generation_config = GenerationConfig()
    assert only_end_tokens(tiny_model, tokenizer).eos_token_id == [tokenizer.eos_token_id]
