"""Everyday rewordings of the demo's task families, 20 each: ``rewordings.jsonl``.

Wordings are written by hand, from near to the trained one to far from it; what they are about is
drawn by a seed, and answers are computed, in the form the families have.
Usage: ``python benchmarks/rewordings.py``, which writes the file again.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

FILE = Path(__file__).with_name("rewordings.jsonl")
Content = dict[str, str]

_WORDS = (
    "apple|river|stone|candle|market|window|garden|paper|yellow|winter|bottle|circle|hammer|"
    "island|jacket|kitten|lemon|mirror|needle|orange|pencil|rabbit|silver|tiger|velvet"
)
_WOMEN = ("Alma", "Celia", "Edda", "Greta", "Ines", "Klara")
_MEN = ("Boris", "Dario", "Felix", "Hugo", "Jonas", "Ludwig")
_LIKES = "tulips|old maps|jazz|chess|pancakes|sailing|origami|thunderstorms|cheese|poetry"
_KINDS = ("birds", "cats", "poets", "bakers", "pilots", "fish", "judges", "robots", "singers")

ARITHMETIC = """
What is {a} {op} {b}?
Compute {a} {op} {b}.
{a} {op} {b} =
Please work out {a} {op} {b}.
Calculate this: {a} {op} {b}
How much is {a} {op} {b}?
Tell me the result of {a} {op} {b}
State the final answer: {a} {op} {b} =
Give the answer to the arithmetic problem {a} {op} {b}.
Solve {a} {op} {b} and reply with the number only.
{a}{op}{b}=?
Quick maths: {a} {op} {b}
Evaluate the expression {a} {op} {b}.
I need to know what {a} {op} {b} comes to.
My homework says "{a} {op} {b} = ___". What goes in the blank?
Can you do {a} {op} {b} for me?
what's {a} {op} {b}
Arithmetic: {a} {op} {b}. Result?
If I type {a} {op} {b} into a calculator, what does it show?
Find the value of {a} {op} {b}.
"""

FILTERING = """
{Keep} all numbers {than} in this list: {list}
From the list {list}, {keep} the numbers {than}.
{Keep} every number {than} from {list} and return the list.
Here is a list: {list}. {Keep} what is {than}.
Please {keep} all numbers {than}: {list}
{list}
{Keep} the ones {than}.
Filter this list, {keep} the values {than}: {list}
Given {list}, {keep} everything {than} and give me the new list in the same format.
In {list} {keep} the entries {than}.
Return the list {list} after you {keep} the numbers {than}.
I have these numbers: {list}. I want you to {keep} those {than}.
{Keep} numbers {than} in {list}
Could you {keep} the items {than} in {list}?
Look at {list}. What is left if you {keep} all numbers {than}?
List: {list}. Task: {keep} numbers {than}. Answer:
Take {list} and {keep} each number that is {than}.
Process the array {list}: {keep} elements {than}.
{Keep} numbers {than}. The numbers are {list}.
What remains of {list} when you {keep} the numbers {than}?
Write the list {list} again, but {keep} the numbers {than}.
"""

KINSHIP = """
{story} How is {p} related to {q}?
{story} What is {p} to {q}?
{story} What relation is {p} to {q}? One word.
{story} Tell me who {p} is to {q}.
Family: {story} Question: what is {p} to {q}?
{story} So {p} is {q}'s what?
In one word, how is {p} related to {q}? {story}
{story}
{p} is the ... of {q}?
Read this: {story} Then say how {p} is related to {q}.
{story} Name the relationship of {p} to {q}.
Who is {p} to {q}? {story}
{story} What would {q} call {p}: mother, father, son, daughter or something else?
{story} Describe {p}'s relation to {q} with a single word.
{story} {q} introduces {p} as "my ...". Which word?
About a family: {story} What is {p}'s relationship to {q}?
{story} Fill in: {p} is {q}'s ___.
{story} Please give the kinship term for {p} as seen from {q}.
Given that {story} what kin is {p} to {q}?
{story} I wonder how {p} and {q} are related. {p} is the what of {q}?
{story} Relationship of {p} to {q}:
"""

LIST_REVERSAL = """
Reverse this list: {list}
Reverse the list of words {list}.
Write these words in reverse order: {list}
Put this list backwards: {list}
Reverse this list of words, comma-separated: {list}
Give me {list} in the opposite order.
{list}. Now backwards, please.
List the words from last to first: {list}
What is the reverse of the list {list}?
Reorder {list} so that the last comes first.
Turn this word list around: {list}
Please reverse: {list}
reverse {list}
Starting with the last, repeat these words: {list}
I have the words {list}. Reverse their order.
Return the words of "{list}" in reversed sequence.
Flip the order of {list}
If you read {list} from the end, which words do you get?
Can you say {list} in reverse order?
The list is: {list}. The reversed list is:
"""

RETRIEVAL = """
{facts} Who likes {x}?
{facts} Who is the one that likes {x}?
{facts} Which person likes {x}? Name only.
{facts} Tell me who likes {x}.
{facts}
Name the person who likes {x}.
Facts: {facts} Question: who likes {x}?
Who likes {x}? {facts}
Read and answer. {facts} Who likes {x}?
{facts} I am looking for somebody who likes {x}. Who is it?
{facts} {x}: whose favourite?
{facts} Find the name of the person that likes {x}.
Here are some notes: {facts} Based on the notes, who likes {x}?
{facts} Give the name: likes {x}.
{facts} If I bring {x}, who will be glad?
Given the statements "{facts}", who likes {x}?
{facts} Whom would you ask about {x}?
{facts} who likes {x}
From this text, find who likes {x}: {facts}
{facts} Only one of them likes {x}. Which one?
{facts} Reply with a name. Who likes {x}?
"""

SYLLOGISM = """
{one}. {two}. Does it follow that {end}?
Statements: {one}; {two}. Does it logically follow that {end}?
If {one} and {two}, is it true that {end}? Yes or No.
Suppose {one}. Suppose also that {two}. Can we conclude that {end}?
{one}. {two}. Therefore {end}. Is this valid?
Given that {one} and that {two}, must it be that {end}?
Premise 1: {one}. Premise 2: {two}. Conclusion: {end}. Valid, yes or no?
Is this argument right? {one}. {two}. So {end}.
Consider: {one}, {two}. Is "{end}" a consequence?
We know that {one}. We know that {two}. Is it then certain that {end}?
Logic puzzle: {one} and {two}. Does {end} follow?
Yes or no: from "{one}" and "{two}" it follows that {end}.
{one}
{two}
Follows: {end}?
Tell me whether "{end}" follows from "{one}" and "{two}".
Let {one}. Let {two}. Then {end}, yes or no?
My friend says {end} because {one} and {two}. Is the reasoning correct?
Assume {one}, and assume {two}. Is the conclusion "{end}" justified? (Yes/No)
Can I infer {end} if {one} and {two}?
{one}, and {two}. Is it necessarily so that {end}?
Check this syllogism: {one}; {two}; hence {end}.
"""


def _sum(rng: random.Random) -> tuple[Content, str]:
    a, b, op = rng.randint(10, 99), rng.randint(10, 99), rng.choice("+-")
    return {"a": str(a), "b": str(b), "op": op}, str(a + b if op == "+" else a - b)


def _filter(rng: random.Random) -> tuple[Content, str]:
    numbers = [rng.randint(-99, 99) for _ in range(rng.randint(3, 4))]
    limit = rng.choice([n for n in range(-60, 61) if n not in numbers])
    keep, larger = rng.random() < 0.5, rng.random() < 0.5
    left = [n for n in numbers if ((n > limit) == larger) == keep]
    verb = "keep" if keep else "remove"
    content = {
        "keep": verb, "Keep": verb.capitalize(), "list": str([str(n) for n in numbers]),
        "than": f"{'larger' if larger else 'smaller'} than {limit}",
    }  # fmt: skip
    return content, str([str(n) for n in left])


def _kin(rng: random.Random) -> tuple[Content, str]:
    born = rng.choice(["son", "daughter"])
    wife, daughter = rng.sample(_WOMEN, 2)
    husband, son = rng.sample(_MEN, 2)
    child = son if born == "son" else daughter
    story = f"{husband} is married to {wife}. They have a {born} called {child}."
    asked = rng.choice(
        [(wife, child, "mother"), (husband, child, "father"), (child, wife, born),
         (child, husband, born), (wife, husband, "wife"), (husband, wife, "husband")]
    )  # fmt: skip
    return {"story": story, "p": asked[0], "q": asked[1]}, asked[2]


def _reversal(rng: random.Random) -> tuple[Content, str]:
    words = rng.sample(_WORDS.split("|"), rng.randint(3, 5))
    return {"list": ", ".join(words)}, ", ".join(reversed(words))


def _retrieval(rng: random.Random) -> tuple[Content, str]:
    names, things = rng.sample(_WOMEN + _MEN, 3), rng.sample(_LIKES.split("|"), 3)
    chosen = rng.randrange(3)
    facts = " ".join(f"{n} likes {t}." for n, t in zip(names, things, strict=True))
    return {"facts": facts, "x": things[chosen]}, names[chosen]


def _syllogism(rng: random.Random) -> tuple[Content, str]:
    a, b, c = rng.sample(_KINDS, 3)
    forms = [
        (f"all {a} are {b}", f"all {b} are {c}", f"all {a} are {c}", "Yes"),
        (f"no {b} are {c}", f"all {a} are {b}", f"no {a} are {c}", "Yes"),
        (f"some {a} are {b}", f"all {b} are {c}", f"some {a} are {c}", "Yes"),
        (f"all {a} are {b}", f"some {b} are {c}", f"all {a} are {c}", "No"),
        (f"some {a} are {b}", f"some {b} are {c}", f"no {a} are {c}", "No"),
        (f"all {a} are {b}", f"all {b} are {c}", f"no {a} are {c}", "No"),
    ]
    one, two, end, answer = rng.choice(forms)
    return {"one": one, "two": two, "end": end}, answer


_FAMILIES: dict[str, tuple[str, Callable[[random.Random], tuple[Content, str]]]] = {
    "arithmetic": (ARITHMETIC, _sum),
    "filtering": (FILTERING, _filter),
    "kinship": (KINSHIP, _kin),
    "list_reversal": (LIST_REVERSAL, _reversal),
    "retrieval": (RETRIEVAL, _retrieval),
    "syllogism": (SYLLOGISM, _syllogism),
}
# The prompts that the README and users try first stand as they are.
_FIXED = {
    "What is {a} {op} {b}?": ({"a": "17", "op": "+", "b": "25"}, "42"),
    "Compute {a} {op} {b}.": ({"a": "17", "op": "+", "b": "25"}, "42"),
    "{a} {op} {b} =": ({"a": "17", "op": "+", "b": "25"}, "42"),
    "Reverse this list: {list}": ({"list": "a, b, c"}, "c, b, a"),
}


def wordings(text: str) -> list[str]:
    """Return the wordings of a family: one a line, but a line without a question joins the next."""
    lines = text.strip().splitlines()
    joined: list[str] = []
    for line in lines:
        if joined and joined[-1] in _OPENINGS:
            joined[-1] = f"{joined[-1]}\n{line}"
        else:
            joined.append(line)
    return joined


_OPENINGS = {"{list}", "{story}", "{facts}", "{one}", "{one}\n{two}"}


def rows() -> Iterator[dict[str, str]]:
    """Yield the rows of the file: task, prompt, response."""
    for task, (text, draw) in _FAMILIES.items():
        rng = random.Random(f"rewordings of {task}")
        for wording in wordings(text):
            content, answer = _FIXED.get(wording) or draw(rng)
            yield {"task": task, "prompt": wording.format(**content), "response": answer}


if __name__ == "__main__":
    lines = [json.dumps(row, ensure_ascii=False) for row in rows()]
    FILE.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
