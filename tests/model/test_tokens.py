import pytest
import torch

from tclora.model.tokens import IGNORED, TokenRow, batches, encode

ROWS = [TokenRow((5, 6, 7), (8, 1)), TokenRow((9,), (10, 11, 12, 1)), TokenRow((4, 5), (1,))]


def test_the_plain_template_is_prompt_newline_response_end(tokenizer):
    (row,) = encode(tokenizer, ["hi there"], ["yes"], template="plain")
    assert tokenizer.decode(row.prompt) == "hi there\n"
    assert tokenizer.decode(row.response[:-1]) == "yes"
    assert row.response[-1] == tokenizer.eos_token_id
    assert not row.truncated


def test_the_chat_template_is_the_tokenizers(tokenizer):
    (row,) = encode(tokenizer, ["hi"], ["yes"])
    turns = [{"role": "user", "content": "hi"}]
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert list(row.prompt) == whole


def test_a_tokenizer_without_chat_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"train\.template must be 'plain'"):
        encode(tokenizer, ["a"], ["b"])
    with pytest.raises(ValueError, match="must be 'chat' or 'plain', got 'alpaca'"):
        encode(tokenizer, ["a"], ["b"], template="alpaca")


def test_truncation_cuts_the_prompts_start_and_keeps_the_response(tokenizer):
    (row,) = encode(tokenizer, ["abcdefgh"], ["xyz"], template="plain", max_tokens=8)
    assert len(row) == 8
    assert row.truncated
    assert tokenizer.decode(row.prompt) == "fgh\n"
    assert tokenizer.decode(row.response) == "xyz</s>"


def test_a_row_of_exactly_the_limit_is_not_cut(tokenizer):
    (row,) = encode(tokenizer, ["abcd"], ["xyz"], template="plain", max_tokens=9)
    assert (len(row), row.truncated) == (9, False)


def test_a_response_longer_than_the_limit_loses_its_end(tokenizer):
    (row,) = encode(tokenizer, ["abc"], ["0123456789"], template="plain", max_tokens=6)
    assert len(row) == 6
    assert tokenizer.decode(row.response) == "01234"
    assert len(row.prompt) == 1


def test_a_response_that_fills_the_window_leaves_a_quarter_of_it_to_the_prompt(tokenizer):
    (row,) = encode(tokenizer, ["abcdefgh"], ["0" * 90], template="plain", max_tokens=20)
    assert tokenizer.decode(row.prompt) == "efgh\n"
    assert (len(row.response), row.truncated) == (15, True)
    (short,) = encode(tokenizer, ["ab"], ["0" * 90], template="plain", max_tokens=20)
    assert tokenizer.decode(short.prompt) == "ab\n"
    assert len(short) == 20


def test_what_a_template_begins_with_survives_truncation(tokenizer):
    prompt, response = "x" * 200 + "end", "yes"
    (whole,) = encode(tokenizer, [prompt], [response])
    (row,) = encode(tokenizer, [prompt], [response], max_tokens=100)
    head = tokenizer.decode(whole.prompt).split("x")[0]
    assert head
    cut = tokenizer.decode(row.prompt)
    assert cut.startswith(head + "x")
    assert cut.endswith(tokenizer.decode(whole.prompt).split("end")[1])
    assert len(row) == 100


def test_batches_are_padded_on_the_left_and_labelled_one_ahead():
    (batch,) = batches(ROWS, pad_id=0, token_budget=100)
    assert batch.rows == (0, 1, 2)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1], [9, 10, 11, 12, 1], [0, 0, 4, 5, 1]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1] * 5, [0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, no, 8, 1, no], [10, 11, 12, 1, no], [no, no, no, 1, no]]
    assert batch.supervised == 7


@pytest.mark.parametrize("token_budget", [1, 7, 10, 64])
@pytest.mark.parametrize("prompts_only", [False, True])
def test_the_budget_is_kept_and_every_row_comes_once(token_budget, prompts_only):
    rows = [TokenRow((3,) * (1 + 7 * i % 11), (4,) * (1 + i % 3)) for i in range(20)]
    seen, widths = [], []
    for batch in batches(rows, pad_id=0, token_budget=token_budget, prompts_only=prompts_only):
        seen += batch.rows
        widths.append(batch.input_ids.shape[1])
        assert batch.input_ids.numel() <= token_budget or len(batch.rows) == 1
        for place, index in enumerate(batch.rows):
            row = rows[index]
            sequence = row.prompt if prompts_only else row.prompt + row.response
            kept = batch.input_ids[place][batch.attention_mask[place] == 1]
            assert tuple(kept.tolist()) == sequence
    assert sorted(seen) == list(range(20))
    assert widths == sorted(widths, reverse=True)


def test_labels_of_any_batch_predict_the_next_token():
    for batch in batches(ROWS, pad_id=0, token_budget=8):
        width, columns = batch.input_ids.shape[1], batch.labels.shape[1]
        following = torch.nn.functional.pad(batch.input_ids, (0, 1), value=IGNORED)
        shifted = following[:, width - columns + 1 :]
        known = batch.labels != IGNORED
        assert torch.equal(batch.labels[known], shifted[known])
