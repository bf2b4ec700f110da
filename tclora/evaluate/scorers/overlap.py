"""Scorers of free text by its overlap with the answer: F1 of words, ROUGE, chrF, BLEU.

ROUGE is Google's package, chrF and BLEU are sacreBLEU's, per row; a table gives the mean over
rows, not the figure of the whole corpus. sacreBLEU says of itself that BLEU of one sentence is
rough.
"""

import importlib
import re
import string
from collections import Counter
from functools import cache
from typing import Any

from tclora.errors import ConfigError
from tclora.evaluate.scorers.registry import Expected, register

_ROUGE = ("rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@register("f1")
def f1(generated: str, expected: Expected) -> float:
    """F1 of the words, without case, punctuation and articles, as SQuAD counts it."""
    found, wanted = _words(generated), _words(expected.answer)
    common = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted:
        return float(found == wanted)
    return 2 * common / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return _ARTICLES.sub(" ", plain).split()


def _check_rouge(expected: Expected) -> None:
    if expected.argument not in ("", *_ROUGE):
        raise ValueError(f"scorer 'rouge' must name one of {_ROUGE}, got {expected.argument!r}")
    _library("rouge_score.rouge_scorer")


@register("rouge", check=_check_rouge)
def rouge(generated: str, expected: Expected) -> float:
    """ROUGE F-measure, ``rouge:rougeL`` unless another is named (Google's package)."""
    kind = expected.argument or "rougeL"
    return float(_rouge_scorer(kind).score(expected.answer, generated)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str) -> Any:  # noqa: ANN401
    return _library("rouge_score.rouge_scorer").RougeScorer([kind])


def _check_sacrebleu(_: Expected) -> None:
    _library("sacrebleu")


@register("chrf", check=_check_sacrebleu)
def chrf(generated: str, expected: Expected) -> float:
    """Sentence-level chrF, 0 to 1 (sacreBLEU)."""
    return float(_library("sacrebleu").sentence_chrf(generated, [expected.answer]).score) / 100


@register("bleu", check=_check_sacrebleu)
def bleu(generated: str, expected: Expected) -> float:
    """Sentence-level BLEU, 0 to 1 (sacreBLEU)."""
    return float(_library("sacrebleu").sentence_bleu(generated, [expected.answer]).score) / 100


@cache
def _library(module: str) -> Any:  # noqa: ANN401
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"scorers of text overlap need {module.partition('.')[0]}: pip install tclora[metrics]"
        ) from error
