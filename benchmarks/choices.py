"""Items of a four-choice task and of a generative one against lm-eval: equal, and how much faster.

    python benchmarks/choices.py DATA [--items 500] [--texts 100] [--template plain]

DATA holds ``test/arc_easy.jsonl`` (rows with choices) and ``test/mawps.jsonl`` (a number as the
answer). Both engines get the same model object in fp32 and the same rows, in blocks by turns in one
process; the table is written anew after every block. Times are of the model's work, on both sides
from the texts to the numbers or texts that a model gives: of lm-eval its calls of ``loglikelihood``
and ``generate_until``, of ours all of ``evaluate_frame``, its scores as well. What lm-eval does
around that (data sets, tasks, scores, what it notes about the machine) is not in them. They are of
the processor (all threads) and of the clock; beside other work only the former says something.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

_NUMBER = r"(-?\d[\d,]*(?:\.\d+)?)"
_NEW_TOKENS = 24
_BATCH = 16  # sequences per forward pass of lm-eval
_BUDGET = 1024  # padded tokens per forward pass of ours; on a CPU larger ones are slower


def _rows(file: Path, count: int) -> pd.DataFrame:
    frame, _ = canonical_frame(read_table(str(file)), str(file))
    return frame.head(count).reset_index(drop=True)


def _timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return what work gives, and its seconds of processor and clock."""
    processor, clock = time.process_time(), time.perf_counter()
    return work(), time.process_time() - processor, time.perf_counter() - clock


class _Rival(HFLM):
    """lm-eval's own model, which adds up the time of its work.

    Attributes
    ----------
    spent : tuple of float
        Seconds of processor and clock since they were last set to zero.
    """

    spent = (0.0, 0.0)

    def loglikelihood(self, *given: Any, **named: Any) -> list[Any]:  # noqa: ANN401
        return self._add(lambda: super(_Rival, self).loglikelihood(*given, **named))

    def generate_until(self, *given: Any, **named: Any) -> list[Any]:  # noqa: ANN401
        return self._add(lambda: super(_Rival, self).generate_until(*given, **named))

    def _add(self, work: Callable[[], list[Any]]) -> list[Any]:
        found, *more = _timed(work)
        self.spent = _add(self.spent, more)
        return found


def _lm_eval(
    run: "_Run", frame: pd.DataFrame, task: dict[str, Any]
) -> tuple[list[Any], tuple[float, float]]:
    """Return lm-eval's samples in the order of the rows, and the seconds of the model's work."""
    columns = ["prompt", "choices", "answer"]
    rows = Dataset.from_list(json.loads(frame[columns].to_json(orient="records")))
    config = {"task": "rows", "custom_dataset": lambda **_: {"test": rows}, "test_split": "test"}
    run.rival.spent = (0.0, 0.0)
    results = simple_evaluate(
        model=run.rival,
        tasks=[config | task],
        task_manager=run.tasks,
        bootstrap_iters=0,
        apply_chat_template=run.chat,
    )
    samples = sorted(results["samples"]["rows"], key=lambda sample: sample["doc_id"])
    return samples, run.rival.spent


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


@dataclass
class _Sum:
    """What the blocks of one task have given so far."""

    name: str
    n: int = 0
    equal: dict[str, int] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    gap: float = 0.0
    mine: tuple[float, float] = (0.0, 0.0)  # s of processor and clock
    theirs: tuple[float, float] = (0.0, 0.0)

    def add(self, found: pd.DataFrame, samples: list[Any], columns: dict[str, str]) -> None:
        """Count the items on which both agree; columns are ours -> lm-eval's metric."""
        self.n += len(found)
        for mine, metric in columns.items():
            pairs = zip(found[mine], (sample[metric] for sample in samples), strict=True)
            self.equal[metric] = self.equal.get(metric, 0) + sum(a == b for a, b in pairs)
            self.scores[metric] = self.scores.get(metric, 0.0) + float(found[mine].sum())

    def line(self) -> dict[str, Any]:
        """Return the line of the table."""
        return {
            "rows": self.name,
            "n": self.n,
            "equal to the item": ", ".join(f"{n} {metric}" for metric, n in self.equal.items()),
            "score": ", ".join(f"{total / self.n:.3f}" for total in self.scores.values()),
            "processor s": self.mine[0],
            "lm-eval's": self.theirs[0],
            "ratio": self.mine[0] / self.theirs[0],
            "clock s": self.mine[1],
            "lm-eval's ": self.theirs[1],
        }


def _add(times: tuple[float, float], more: Sequence[float]) -> tuple[float, float]:
    return times[0] + more[0], times[1] + more[1]


def _choices(run: "_Run", frame: pd.DataFrame, total: _Sum) -> None:
    """Measure a block of the four-choice task."""
    found, *mine = _timed(
        lambda: evaluate_frame(run.model, run.tokenizer, frame, max_new_tokens=None, **run.options)
    )
    samples, theirs = _lm_eval(run, frame, _choices_task(run.chat))
    total.mine, total.theirs = _add(total.mine, mine), _add(total.theirs, theirs)
    total.add(found, samples, {"correct": "acc", "correct_norm": "acc_norm"})
    wanted = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    gaps = [
        np.abs(np.subtract(*pair)).max() for pair in zip(found["logprobs"], wanted, strict=True)
    ]
    total.gap = max(total.gap, *gaps)


def _texts(run: "_Run", frame: pd.DataFrame, total: _Sum) -> None:
    """Measure a block of the generative task."""
    frame = frame.assign(scorer=f"regex:{_NUMBER}")
    found, *mine = _timed(
        lambda: evaluate_frame(
            run.model, run.tokenizer, frame, max_new_tokens=_NEW_TOKENS, **run.options
        )
    )
    samples, theirs = _lm_eval(run, frame, _texts_task(run.chat))
    total.mine, total.theirs = _add(total.mine, mine), _add(total.theirs, theirs)
    texts = [sample | {"text": sample["resps"][0][0]} for sample in samples]
    total.add(found, texts, {"correct": "exact_match"})
    same = sum(a == b["text"] for a, b in zip(found["generated"], texts, strict=True))
    total.equal["texts"] = total.equal.get("texts", 0) + same


@dataclass(frozen=True)
class _Run:
    """The model that both engines measure, and how."""

    model: Any
    tokenizer: Any
    template: str
    rival: _Rival
    tasks: TaskManager

    @property
    def chat(self) -> bool:
        """Whether prompts are in the chat template."""
        return self.template == "chat"

    @property
    def options(self) -> dict[str, Any]:
        """Ours."""
        return {"template": self.template, "max_tokens": 1024, "token_budget": _BUDGET}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--template", choices=("plain", "chat"), default="plain")
    given = parser.parse_args()
    location = locate_base_model(BUILTIN_BASE)
    model, tokenizer = load_base_model(location, torch.float32), load_tokenizer(location)
    rival = _Rival(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH)
    run = _Run(model, tokenizer, given.template, rival, TaskManager(include_defaults=False))
    work = [
        (_choices, _rows(given.data / "test" / "arc_easy.jsonl", given.items), _Sum("arc_easy")),
        (_texts, _rows(given.data / "test" / "mawps.jsonl", given.texts), _Sum("mawps, generated")),
    ]
    # What only the first pass pays, neither engine does.
    first = _rows(given.data / "test" / "arc_easy.jsonl", 1)
    evaluate_frame(model, tokenizer, first, max_new_tokens=1, **run.options)
    _lm_eval(run, first, _choices_task(run.chat))
    for measure, frame, total in work:
        for start in range(0, len(frame), given.block):
            block = frame.iloc[start : start + given.block].reset_index(drop=True)
            measure(run, block, total)
            _write([line for _, _, line in work if line.n], given.template)


def _write(totals: list[_Sum], template: str) -> None:
    note = (
        f"{BUILTIN_BASE} in fp32, template {template}. lm-eval's batches hold {_BATCH} sequences, "
        f"ours {_BUDGET} padded tokens and the NLL of the response as well. Largest difference of "
        f"log-likelihoods {totals[0].gap:.1e} nats. Answers have at most {_NEW_TOKENS} tokens."
    )
    lines = pd.DataFrame([total.line() for total in totals])
    report("choices", "Choices and texts against lm-eval", lines, note)


if __name__ == "__main__":
    main()
