from tclora.data.rewording import rewordings

SUMS = [f"State the answer to the following problem: {a} + {a + 8} =" for a in (17, 20, 31)]
LISTS = [
    f"Solve the problem.\n\nReverse this list of words: {words}\n"
    for words in ("river, stone", "paper, list", "candle, moon")
]
KIN = [
    f"{a} is married to {b}. Who is {b} to {a}? {end}"
    for a, b, end in (
        ("Ada", "Max", "One word."), ("Eve", "Tom", "Briefly."), ("Ida", "Jon", "Say it."),
    )
]  # fmt: skip


def test_what_prompts_begin_or_end_with_is_their_wording():
    assert rewordings(SUMS)[0] == [
        f"Hi, could you help me with this? {SUMS[0]} Thanks a lot!",
        "state answer problem: 17 + 25 =",
        "17 + 25",
    ]
    assert [made[-1] for made in rewordings(LISTS)] == [
        "river, stone", "paper, list", "candle, moon",
    ]  # fmt: skip


def test_words_in_the_middle_stay_though_all_prompts_have_them():
    assert all("married" in text for made in rewordings(KIN) for text in made)


def test_rewordings_are_distinct_and_say_something():
    for prompts in (SUMS, LISTS, KIN, ["x"], ["same", "same"], ["  \n"]):
        for prompt, made in zip(prompts, rewordings(prompts), strict=True):
            assert len(set(made)) == len(made)
            assert prompt not in made
            assert all(any(c.isalnum() for c in text) for text in made)
        assert rewordings(prompts) == rewordings(prompts)
