"""Items of a four-choice task and of a generative one against lm-eval: equal, and how much faster.

    python benchmarks/choices.py DATA [--items 500] [--texts 100] [--template plain]

DATA holds ``test/arc_easy.jsonl`` (rows with choices) and ``test/mawps.jsonl`` (a number as the
answer). Both engines get the same model object in fp32 and the same rows, one after the other in
one process. Times are of the processor (all threads) and of the clock; beside other work only the
former says something.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tables import report

from tclora.data.frame import canonical_frame
from tclora.data.readers import read_table
from tclora.evaluate.measure import evaluate_frame
from tclora.model.locate import BUILTIN_BASE, load_base_model, load_tokenizer, locate_base_model

_NUMBER = r"(-?\d[\d,]*\.?\d*)"
_NEW_TOKENS = 24
_BATCH = 16  # of lm-eval; larger ones were slower on a CPU


def _rows(file: Path, count: int) -> pd.DataFrame:
    frame, _ = canonical_frame(read_table(str(file)), str(file))
    return frame.head(count).reset_index(drop=True)


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what work gives, and its seconds of processor and clock."""
    processor, clock = time.process_time(), time.perf_counter()
    return work(), time.process_time() - processor, time.perf_counter() - clock


def _lm_eval(model: Any, tokenizer: Any, frame: pd.DataFrame, chat: bool, **task: Any) -> list[Any]:  # noqa: ANN401
    """Return lm-eval's samples in the order of the rows."""
    columns = ["prompt", "choices", "answer"]
    rows = Dataset.from_list(json.loads(frame[columns].to_json(orient="records")))
    config = {"task": "rows", "custom_dataset": lambda **_: {"test": rows}, "test_split": "test"}
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
        tasks=[config | task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    return sorted(results["samples"]["rows"], key=lambda sample: sample["doc_id"])


def _choices_task(chat: bool) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(answer)}}",
        "target_delimiter": "" if chat else "\n",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _texts_task(chat: bool) -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_text": lambda row: row["prompt"] + ("" if chat else "\n"),
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": _NEW_TOKENS, "do_sample": False},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": _NUMBER, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }


def _line(name: str, n: int, mine: Any, theirs: Any, **equal: Any) -> dict[str, Any]:  # noqa: ANN401
    (_, cpu, wall), (_, their_cpu, their_wall) = mine, theirs
    return {
        "rows": name,
        "n": n,
        **equal,
        "processor s": cpu,
        "lm-eval's": their_cpu,
        "ratio": cpu / their_cpu,
        "clock s": wall,
        "lm-eval's ": their_wall,
    }


def _agreeing(found: Any, wanted: Any, name: str) -> str:  # noqa: ANN401
    return f"{sum(a == b for a, b in zip(found, wanted, strict=True))} {name}"


def _choices(model: Any, tokenizer: Any, frame: pd.DataFrame, chat: bool, options: Any) -> Any:  # noqa: ANN401
    """Return the line of the four-choice task and the largest gap of a log-likelihood."""
    mine = _timed(lambda: evaluate_frame(model, tokenizer, frame, max_new_tokens=None, **options))
    theirs = _timed(lambda: _lm_eval(model, tokenizer, frame, chat, **_choices_task(chat)))
    found, samples = mine[0], theirs[0]
    logprobs = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    gaps = [np.subtract(a, b) for a, b in zip(found["logprobs"], logprobs, strict=True)]
    equal = [
        _agreeing(found["correct"], [s["acc"] for s in samples], "acc"),
        _agreeing(found["correct_norm"], [s["acc_norm"] for s in samples], "acc_norm"),
    ]
    score = f"{found['correct'].mean():.3f}, {found['correct_norm'].mean():.3f}"
    line = _line("four choices", len(frame), mine, theirs, equal=", ".join(equal), score=score)
    return line, max(np.abs(gap).max() for gap in gaps)


def _texts(model: Any, tokenizer: Any, frame: pd.DataFrame, chat: bool, options: Any) -> Any:  # noqa: ANN401
    """Return the line of the generative task."""
    frame = frame.assign(scorer=f"regex:{_NUMBER}")
    mine = _timed(
        lambda: evaluate_frame(model, tokenizer, frame, max_new_tokens=_NEW_TOKENS, **options)
    )
    theirs = _timed(lambda: _lm_eval(model, tokenizer, frame, chat, **_texts_task(chat)))
    found, samples = mine[0], theirs[0]
    equal = [
        _agreeing(found["generated"], [s["resps"][0][0] for s in samples], "texts"),
        _agreeing(found["correct"], [s["exact_match"] for s in samples], "exact_match"),
    ]
    score = f"{found['correct'].mean():.3f}"
    return _line("generated", len(frame), mine, theirs, equal=", ".join(equal), score=score)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--template", choices=("plain", "chat"), default="plain")
    given = parser.parse_args()
    chat, location = given.template == "chat", locate_base_model(BUILTIN_BASE)
    model, tokenizer = load_base_model(location, torch.float32), load_tokenizer(location)
    options = {"template": given.template, "max_tokens": 1024, "token_budget": 4096}
    chosen = _rows(given.data / "test" / "arc_easy.jsonl", given.items)
    line, gap = _choices(model, tokenizer, chosen, chat, options)
    written = _rows(given.data / "test" / "mawps.jsonl", given.texts)
    lines = [line, _texts(model, tokenizer, written, chat, options)]
    note = (
        f"arc_easy and mawps, {BUILTIN_BASE} in fp32, template {given.template}. lm-eval batches "
        f"hold {_BATCH} sequences, ours {options['token_budget']} padded tokens and the NLL "
        f"of the response as well. Largest difference of a log-likelihood {gap:.1e} nats. Answers "
        f"have at most {_NEW_TOKENS} tokens."
    )
    report("choices", "Choices and texts against lm-eval", pd.DataFrame(lines), note)


if __name__ == "__main__":
    main()
