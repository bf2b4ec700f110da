"""Multiple choice, with lm-eval as the referee."""

import string

import pandas as pd
import pytest
import torch
from tokenizers import pre_tokenizers

from tclora.evaluate.measure import evaluate_frame
from tclora.evaluate.scorers import CHOICES
from tclora.model.tokens import TokenRow, encode, render
from tests.conftest import BYTES, make_tokenizer
from tests.reference import row_nll

OPTIONS = {"template": "plain", "max_tokens": 200, "token_budget": 300, "max_new_tokens": 4}
ROWS = [
    ("Which is red?", ["rose", "sky", "a very long leaf of grass", "sea"], "sky"),
    ("Is it?", ["Yes", "No"], "No"),
    ("Name one of these, please:", ["x", "y", "z"], "z"),
    ("And now?", ["(A) one", "(B) two", "(C) three hundred", "(D) 4"], "(C) three hundred"),
]


# Tokenizers that see an option alone otherwise than behind its prompt, by name: their letters, what
# they merge, and how they part a text before.
TOKENIZERS = {
    "words of bytes": (BYTES, [("Ċ", "Ċ")], pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes": (
        BYTES, [("?", "Ċ"), ("Ċ", "Ċ")],
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    "spaces before words": (
        [*string.printable, "▁"], [("▁", "s"), ("▁", "Y")], pre_tokenizers.Metaspace()
    ),
}  # fmt: skip


def make_frame(rows=tuple(ROWS), repeats=6, ends=("",)):
    rows = [(f"{p} {n}{ends[n % len(ends)]}", options, a)
            for n in range(repeats) for p, options, a in rows]  # fmt: skip
    prompts, options, answers = zip(*rows, strict=True)
    return pd.DataFrame(
        {
            "id": [f"id{i}" for i in range(len(rows))], "prompt": prompts, "response": answers,
            "answer": answers, "choices": options, "scorer": CHOICES, "metadata": None,
        }
    )  # fmt: skip


def referee(model, tokenizer, frame, *, chat=False):
    """lm-eval's log-likelihoods, acc and acc_norm of every row, in order."""
    datasets = pytest.importorskip("datasets")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = datasets.Dataset.from_list(frame[["prompt", "choices", "answer"]].to_dict("records"))
    task = {
        "task": "mine", "custom_dataset": lambda **_: {"test": rows}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{choices.index(answer)}}",
        "target_delimiter": "" if chat else "\n",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=[task],
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
        apply_chat_template=chat,
    )  # fmt: skip
    samples = sorted(results["samples"]["mine"], key=lambda sample: sample["doc_id"])
    logprobs = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    return logprobs, [s["acc"] for s in samples], [s["acc_norm"] for s in samples]


def equal_to_lm_eval(model, tokenizer, frame, template):
    """Return what is measured, once it is the referee's."""
    found = evaluate_frame(model, tokenizer, frame, **OPTIONS | {"template": template})
    logprobs, accuracy, normalised = referee(model, tokenizer, frame, chat=template == "chat")
    for mine, theirs in zip(found["logprobs"], logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert found["correct"].tolist() == accuracy
    assert found["correct_norm"].tolist() == normalised
    return found


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_options_equal_lm_evals_to_the_item(tiny_model, tokenizer, template):
    frame = make_frame()
    found = equal_to_lm_eval(tiny_model, tokenizer, frame, template)
    assert found["correct"].tolist() != found["correct_norm"].tolist()  # lengths count here
    assert 0 < found["correct"].mean() < 1


@pytest.mark.parametrize("template", ["plain", "chat"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_options_equal_lm_evals_whatever_a_prompt_ends_with(tiny_model, template, name):
    tokenizer = make_tokenizer(*TOKENIZERS[name])
    torch.manual_seed(0)
    tiny_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    frame = make_frame(ends=("?", "?\n", ": ", "\n\n", "? \n", " \t "))
    found = equal_to_lm_eval(tiny_model, tokenizer, frame, template)
    rows = encode(tokenizer, frame["prompt"], frame["response"], template=template, max_tokens=200)
    assert found["nll"].tolist() == pytest.approx([row_nll(tiny_model, r) for r in rows], rel=1e-5)


def test_the_response_of_a_choice_is_measured_as_any_other(tiny_model, tokenizer):
    frame = make_frame(repeats=1)
    found = evaluate_frame(tiny_model, tokenizer, frame, **OPTIONS)
    rows = encode(tokenizer, frame["prompt"], frame["response"], template="plain", max_tokens=200)
    assert found["nll"].tolist() == pytest.approx([row_nll(tiny_model, r) for r in rows], rel=1e-5)
    assert found["tokens"].tolist() == [len(row.response) for row in rows]
    assert found["generated"].isna().all()


def test_choices_and_texts_stand_in_one_frame_in_any_order(tiny_model, tokenizer):
    choices = make_frame(repeats=1)
    texts = choices.assign(choices=None, scorer="exact")
    mixed = pd.concat([choices, texts]).sample(frac=1, random_state=0)
    found = evaluate_frame(tiny_model, tokenizer, mixed, **OPTIONS)
    assert found["id"].tolist() == mixed["id"].tolist()
    for part, alone in ((mixed["scorer"] == CHOICES, choices), (mixed["scorer"] == "exact", texts)):
        wanted = evaluate_frame(tiny_model, tokenizer, alone, **OPTIONS).set_index("id")
        mine = found[part.to_numpy()].set_index("id").loc[wanted.index]
        assert mine["nll"].tolist() == pytest.approx(wanted["nll"].tolist(), rel=1e-5)
        assert mine["correct"].tolist() == wanted["correct"].tolist()
        assert mine["generated"].isna().tolist() == wanted["generated"].isna().tolist()


def test_contexts_get_the_numbers_of_the_frames_rows(tiny_model, tokenizer):
    from contextlib import nullcontext

    choices = make_frame(repeats=1)
    mixed = pd.concat([choices.assign(choices=None, scorer="exact"), choices])
    seen = set()
    evaluate_frame(
        tiny_model, tokenizer, mixed, **OPTIONS,
        context=lambda rows: seen.update(int(i) for i in rows) or nullcontext(),
    )  # fmt: skip
    assert seen == set(range(len(mixed)))


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_prompt_too_long_for_its_options_is_cut_as_other_rows_are(
    tiny_model, tokenizer, template
):
    frame = make_frame(repeats=1).assign(prompt="p" * 60 + "q" * 20)
    settings = OPTIONS | {"template": template, "max_tokens": 60}
    found = evaluate_frame(tiny_model, tokenizer, frame, **settings)
    rows = encode(tokenizer, frame["prompt"], frame["response"], template=template, max_tokens=60)
    assert all(row.truncated for row in rows)
    assert found["nll"].tolist() == pytest.approx([row_nll(tiny_model, r) for r in rows], rel=1e-5)
    for options, logprobs in zip(frame["choices"], found["logprobs"], strict=True):
        longest = max(options, key=len)
        # A response ends with a token more than an option.
        (row,) = encode(
            tokenizer, ["p" * 60 + "q" * 20], [longest], template=template, max_tokens=61
        )
        at = len(row.prompt) - (template == "plain")  # the newline is of the option
        wanted = [
            row_nll(tiny_model, TokenRow(row.prompt[:at], (*row.prompt[at:], *tokens)))
            for tokens in tokenizer(options, add_special_tokens=False).input_ids
        ]
        assert logprobs == pytest.approx([-value for value in wanted], rel=1e-5)


def test_shots_stand_before_the_prompt(tiny_model, tokenizer):
    shots = [("1 + 1", "2"), ("2 + 2", "4")]
    plain = render(tokenizer, ["3 + 3"], "plain", [shots])
    assert plain == ["1 + 1\n2\n\n2 + 2\n4\n\n3 + 3\n"]
    chat = render(tokenizer, ["3 + 3"], "chat", [shots])
    assert chat[0].count("<user>") == 3
    assert chat[0].count("<assistant>") == 3
    frame = make_frame(repeats=1)
    bare = evaluate_frame(tiny_model, tokenizer, frame, **OPTIONS)
    shown = frame.assign(prompt=[render(tokenizer, [p], "plain", [shots])[0].removesuffix("\n")
                                 for p in frame["prompt"]])  # fmt: skip
    wanted = evaluate_frame(tiny_model, tokenizer, shown, **OPTIONS)
    found = evaluate_frame(
        tiny_model, tokenizer, frame.assign(shots=[shots] * len(frame)), **OPTIONS
    )
    assert found["nll"].tolist() == pytest.approx(wanted["nll"].tolist(), rel=1e-5)
    assert found["nll"].tolist() != pytest.approx(bare["nll"].tolist(), rel=1e-3)
