import pandas as pd
import pytest

from tclora.data.frame import COLUMNS, canonical_frame, canonical_rows
from tclora.errors import DataError


def read(*rows, **options):
    raw = pd.DataFrame(list(rows), dtype=object)
    raw.index = pd.RangeIndex(1, len(raw) + 1)
    return canonical_frame(raw, "rows.jsonl", **options)


def one(**row):
    frame, _ = read(row)
    return frame.iloc[0]


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_prompt_and_response():
    row = one(prompt=" a ", response="b\n")
    assert (row["prompt"], row["response"], row["answer"]) == ("a", "b", "b")
    assert row["scorer"] == "exact"
    assert pd.isna(row["task"])
    assert pd.isna(row["split"])
    assert tuple(row.index) == COLUMNS


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": " "}, {"input": None}], ids=str)
def test_alpaca_without_input_is_the_instruction_alone(extra):
    assert one(instruction="Do it.", output="done", **extra)["prompt"] == "Do it."


def test_alpaca_input_follows_the_instruction():
    row = one(instruction="Translate.", input="chat", output="cat")
    assert row["prompt"] == "Translate.\n\nchat"
    assert row["response"] == "cat"


def test_chat_with_one_turn_is_that_turn():
    row = one(messages=chat(("user", "hi"), ("assistant", "hello")))
    assert (row["prompt"], row["response"]) == ("hi", "hello")


def test_chat_with_more_turns_keeps_the_roles():
    turns = chat(("system", "Be kind."), ("user", "hi"), ("assistant", "hello"),
                 ("user", "bye"), ("assistant", "see you"))  # fmt: skip
    row = one(messages=turns)
    assert row["prompt"] == "system: Be kind.\n\nuser: hi\n\nassistant: hello\n\nuser: bye"
    assert row["response"] == "see you"


def test_chat_read_from_parquet(tmp_path):
    raw = pd.DataFrame({"messages": [chat(("user", "hi"), ("assistant", "hello"))]})
    raw.to_parquet(tmp_path / "chat.parquet")
    frame, _ = canonical_frame(pd.read_parquet(tmp_path / "chat.parquet"), "chat.parquet")
    assert frame["prompt"].tolist() == ["hi"]


def test_columns_map_names_and_the_mapped_column_wins():
    row, _ = read(
        {"question": "q", "response": "old", "gold": "a", "kind": "t"},
        columns={"prompt": "question", "response": "gold", "task": "kind"},
    )
    assert row.iloc[0][["prompt", "response", "task"]].tolist() == ["q", "a", "t"]


def test_the_name_of_a_task_is_its_label_where_there_is_no_other():
    assert one(source="p", target="r", task_name="sums")["task"] == "sums"
    assert one(source="p", target="r", task_name="sums", task="t")["task"] == "t"
    mapped, _ = read({"source": "p", "target": "r", "task_name": "s", "kind": "k"},
                     columns={"task": "kind"})  # fmt: skip
    assert mapped["task"].tolist() == ["k"]


def test_columns_may_swap_two_names():
    frame, _ = read(
        {"prompt": "p", "response": "r"}, columns={"prompt": "response", "response": "prompt"}
    )
    assert frame.iloc[0][["prompt", "response"]].tolist() == ["r", "p"]


def test_optional_columns_travel():
    row = one(prompt="p", response="It is 4.", answer="4", choices=["3", "4"], split="test",
              task="sums", scorer="exact", metadata={"a": 1})  # fmt: skip
    assert list(row["choices"]) == ["3", "4"]
    assert row["metadata"] == '{"a": 1}'
    assert (row["answer"], row["split"], row["task"]) == ("4", "test", "sums")


def test_a_row_without_scorer_gets_one_that_fits_its_answer():
    assert one(prompt="p", response="It is 1,204.", answer="1,204")["scorer"] == "number"
    assert one(prompt="p", response="four")["scorer"] == "exact"


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("prompt", "completion"), ("inputs", "targets"), ("input", "target"),
        ("source", "target"), ("question", "answer"),
    ],
)  # fmt: skip
def test_other_usual_column_names(prompt, response):
    row = one(**{prompt: "p", response: "r"})
    assert (row["prompt"], row["response"]) == ("p", "r")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "response": "b"}, "prompt must not be empty"),
        ({"prompt": "a", "response": "  "}, "response must not be empty"),
        ({"prompt": None, "response": "b"}, "prompt must be text, got nothing"),
        ({"prompt": float("nan"), "response": "b"}, "prompt must be text, got nothing"),
        ({"prompt": ["a"], "response": "b"}, "prompt must be text, got list"),
        ({"instruction": "", "output": "b"}, "instruction must not be empty"),
        ({"instruction": "a", "output": ""}, "output must not be empty"),
        ({"messages": []}, "messages must be a list of turns"),
        ({"messages": "hi"}, "messages must be a list of turns"),
        ({"messages": [{"role": "user"}]}, "must have role and content"),
        ({"messages": chat(("user", "hi"))}, "last turn must be the assistant's, got 'user'"),
        ({"messages": chat(("assistant", "hi"))}, "prompt must not be empty"),
        ({"messages": chat(("user", "hi"), ("assistant", ""))}, "must not be empty"),
    ],
    ids=str,
)
def test_a_bad_row_is_named_or_skipped(row, message):
    with pytest.raises(DataError, match=f"rows.jsonl, row 1: .*{message}"):
        read(row)
    good = dict(zip(row, ("good", "fine"), strict=False))
    if "messages" in row:
        good = {"messages": chat(("user", "good"), ("assistant", "fine"))}
    frame, skipped = read(row, good, on_bad_row="skip")
    assert frame["prompt"].tolist() == ["good"]
    assert len(skipped) == 1
    assert skipped[0].startswith("rows.jsonl, row 1: ")


def test_an_answer_of_nought_is_an_answer():
    bad = {"prompt": "q", "response": "yes", "choices": ["yes", "no"], "answer": 0}
    with pytest.raises(DataError, match=r"rows.jsonl, row 1: answer must be one .*, got '0'"):
        read(bad)
    good = bad | {"choices": ["0", "1"]}
    frame, skipped = read(bad, good, on_bad_row="skip")
    assert frame["answer"].tolist() == ["0"]
    assert len(skipped) == 1


def test_all_bad_rows_are_listed_up_to_ten():
    rows = [{"prompt": "", "response": "x"}] * 13 + [{"prompt": "a", "response": "x"}]
    with pytest.raises(DataError) as caught:
        read(*rows)
    text = str(caught.value)
    assert text.startswith("13 bad row(s)")
    assert "row 10:" in text
    assert "row 11:" not in text
    assert "and 3 more" in text
    assert "data.on_bad_row: skip" in text


def test_skipping_every_row_is_an_error():
    with pytest.raises(DataError, match="1 bad row"):
        read({"prompt": "", "response": "x"}, on_bad_row="skip")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "must hold at least one row, got none"),
        ([{"text": "a"}], {}, "columns must be prompt/response.*got \\['text'\\]"),
        ([{"prompt": "a", "response": "b"}], {"columns": {"task": "kind"}},
         "task must name a column of rows.jsonl, got 'kind'"),
        ([{"prompt": "a", "response": "b"}], {"columns": {"promt": "prompt"}},
         "'promt' must be one of"),
        ([{"prompt": "a", "response": "b", "split": "validation"}], {},
         "split must be one of .*got \\['validation'\\]"),
    ],
)  # fmt: skip
def test_a_table_of_unknown_form_is_refused(rows, options, message):
    with pytest.raises(DataError, match=message):
        read(*rows, **options)


def test_ids_depend_on_the_content_alone_and_are_unique():
    rows = [{"prompt": str(i % 3), "response": "r"} for i in range(7)]
    frame, _ = read(*rows)
    assert frame["id"].is_unique
    other, _ = read({"prompt": "new", "response": "n"}, *rows[::-1])
    assert set(frame["id"]) < set(other["id"])
    assert frame.loc[0, "id"] == one(prompt=" 0", response="r ", task="x")["id"]
    # The boundary between prompt and response counts.
    assert one(prompt="ab", response="c")["id"] != one(prompt="a", response="bc")["id"]


def blocks(rows, size):
    raw = pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1), dtype=object)
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def test_blocks_give_what_the_whole_gives():
    rows = [
        {
            "prompt": f"p{i % 7}",
            "response": "r" if i % 5 else "",
            "task": i % 3,
            "choices": ["r", "s"],
        }
        for i in range(40)
    ]
    whole = canonical_rows(blocks(rows, 40), "rows", on_bad_row="skip")
    parts = canonical_rows(blocks(rows, 6), "rows", on_bad_row="skip")
    pd.testing.assert_frame_equal(whole[0], parts[0])
    assert whole[1] == parts[1]
    assert whole[1][1] == "rows, row 6: response must not be empty, got ''"
    with pytest.raises(DataError, match="8 bad row"):
        canonical_rows(blocks(rows, 6), "rows")


def test_a_mapped_column_may_first_appear_in_a_later_block():
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "q", "response": "s", "kind": "sums"}]
    parts = [pd.DataFrame([row], index=[i]) for i, row in enumerate(rows, start=1)]
    frame, _ = canonical_rows(parts, "rows", {"task": "kind"})
    assert frame["task"].fillna("-").tolist() == ["-", "sums"]
    with pytest.raises(DataError, match="task must name a column of rows, got 'sort'"):
        canonical_rows(parts, "rows", {"task": "sort"})


def test_a_sample_is_uniform_ordered_and_the_same_for_any_blocks():
    rows = [{"prompt": f"p{i:03}", "response": "r"} for i in range(200)]
    one_block, _ = canonical_rows(blocks(rows, 200), "rows", limit=20, seed=3)
    assert len(one_block) == 20
    assert one_block["prompt"].is_monotonic_increasing
    for size in (7, 20, 90):
        again, _ = canonical_rows(blocks(rows, size), "rows", limit=20, seed=3)
        pd.testing.assert_frame_equal(again, one_block)
    drawn = [
        canonical_rows(blocks(rows, 50), "rows", limit=20, seed=seed)[0]["prompt"]
        for seed in range(200)
    ]
    counts = pd.concat(drawn).value_counts()
    assert len(counts) == 200  # every row is drawn, 20 times on average
    assert counts.max() < 40
    all_of_them, _ = canonical_rows(blocks(rows, 50), "rows", limit=300)
    assert len(all_of_them) == 200
