"""lm-eval's view of a model, measured by our engine: continuations share their context.

This module imports lm-eval; `tclora.evaluate.lm_eval` says so where it is missing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.errors import ConfigError
from tclora.evaluate.context import RowContext, plain
from tclora.evaluate.continuations import Fork, likelihoods
from tclora.evaluate.lm_eval_tasks import no_perplexity

Routes = Callable[[Sequence[str]], RowContext]
Request = tuple[tuple[str, str], list[int], list[int]]


class SharedContexts(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A model whose requests of one context are computed together.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
        The model as it is, adapters active.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    token_budget : int
        Padded tokens per forward pass of log-likelihoods.
    batch_size : int
        Sequences per batch of generation.
    routes : callable, optional
        From the contexts of a batch, in lm-eval's wording, to the context that its rows are
        computed in, such as their gates.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        token_budget: int,
        batch_size: int = 8,
        routes: Routes | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self._token_budget = token_budget
        self._routes: Routes = routes or (lambda _: plain)
        self._asked: list[str] = []

    def _loglikelihood_tokens(
        self,
        requests: list[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Compute all continuations of one context from one pass over it."""
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for number, (texts, context, _) in enumerate(requests):
            groups.setdefault((texts[0] or "", tuple(context)), []).append(number)
        forks = [
            self._fork(context, [tuple(requests[i][2]) for i in numbers])
            for (_, context), numbers in groups.items()
        ]
        found = likelihoods(
            self.model,
            forks,
            pad_id=self.tokenizer.pad_token_id,
            token_budget=self._token_budget,
            context=self._routes([text for text, _ in groups]),
        )
        answers: dict[int, tuple[float, bool]] = {}
        for numbers, values in zip(groups.values(), found, strict=True):
            for number, value in zip(numbers, values, strict=True):
                answers[number] = (value.total, value.greedy)
        return [answers[number] for number in range(len(requests))]

    def _fork(self, context: tuple[int, ...], continuations: list[tuple[int, ...]]) -> Fork:
        # lm-eval lets a context lose its start so that the whole fits, its last token not fed.
        room = self.max_length + 1 - max(map(len, continuations))
        return Fork(context[-max(1, room) :], tuple(continuations))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Refuse: windows of a text are no contexts that a prompt's route could be found for.

        Raises
        ------
        ConfigError
            Always.
        """
        raise ConfigError(no_perplexity(requests[0].task_name))

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Encode the contexts of a batch of generation, and remember them."""
        self._asked = list(strings)
        return super().tok_batch_encode(strings, *args, **kwargs)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Generate for the contexts encoded last."""
        numbers = range(len(self._asked))
        with self._routes(self._asked)(numbers):
            return super()._model_generate(context, *args, **kwargs)
