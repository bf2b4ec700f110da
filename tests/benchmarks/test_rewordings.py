import json
import re
from collections import Counter

from benchmarks.rewordings import FILE, rows

ROWS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def test_the_file_is_what_its_module_writes():
    assert list(rows()) == ROWS


def test_every_family_of_the_demo_is_reworded_twenty_times():
    from tclora.data.demo import FAMILIES

    families = {family.task for family in FAMILIES if family.split == "train"}
    assert Counter(row["task"] for row in ROWS) == dict.fromkeys(families, 20)
    assert len({row["prompt"] for row in ROWS}) == 120


def test_answers_are_right():
    """Each from the prompt's own text, another way than they were made."""
    for row in ROWS:
        prompt, answer = row["prompt"], row["response"]
        if row["task"] == "arithmetic":
            (sum_,) = re.findall(r"\d+ ?[+-] ?\d+", prompt)
            assert eval(sum_) == int(answer)  # noqa: S307
        elif row["task"] == "list_reversal":
            assert ", ".join(reversed(answer.split(", "))) in prompt
        elif row["task"] == "retrieval":
            liked = re.findall(rf"{answer} likes ([\w ]+)\.", prompt)
            assert prompt.count(liked[0]) == 2
