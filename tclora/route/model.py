"""A routed library in use: base model, shared adapter, gates, and the router that sets them."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.errors import ModelError
from tclora.library.identity import ModelIdentity
from tclora.library.published import library_folder
from tclora.model.generation import only_end_tokens
from tclora.model.locate import (
    choose_dtype,
    default_device,
    load_base_model,
    load_tokenizer,
    locate_base_model,
    locate_embedder,
    model_digest,
)
from tclora.model.tokens import collate, encode
from tclora.registry import load_plugins
from tclora.route.gating import Gating
from tclora.route.routing import Routing
from tclora.route.storage import RoutedLibrary, read_library

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Completion:
    """One generated answer.

    Attributes
    ----------
    text : str
        The answer without special tokens.
    tokens : tuple of int
        Its token ids, the end-of-sequence token included if it was reached.
    weights : dict of str to float
        Routing weight of every cluster.
    known : bool
        Whether the prompt was near enough to a cluster to be routed.
    by_token : bool
        Whether every token chose its clusters itself, whatever the weights.
    belonging : float
        Share of the clusters' gates in the answer (0–1), the fallback gate being the rest.
    """

    text: str
    tokens: tuple[int, ...]
    weights: dict[str, float]
    known: bool
    by_token: bool = False
    belonging: float = 1.0


class RoutedModel:
    """A base model whose LoRA update depends on the prompt; see `load`.

    Attributes
    ----------
    model : PeftModel
        For direct use; outside of `routed` it is the static merge. Of the checkpoint's generation
        defaults it keeps the end tokens only.
    tokenizer : PreTrainedTokenizerBase
        The base model's tokenizer.
    library : RoutedLibrary
        Shared factors, gates, router.
    gating : Gating
        Sets the gates of `model`.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        library: RoutedLibrary,
        embedder: "SentenceTransformer",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.library = library
        base: Any = model.get_base_model()
        base.generation_config = only_end_tokens(model, tokenizer)
        self.gating = Gating(model, library.gated)
        self._embedder = embedder

    def route(self, prompts: Sequence[str]) -> Routing:
        """Return the routing of prompts, each a user's text without template."""
        return self.library.router.route(embed_prompts(self._embedder, prompts))

    def routed(self, routing: Routing) -> AbstractContextManager[None]:
        """Gate the rows of `model`'s batches by a routing while the context lasts.

        See `Routing.context`. Backward passes belong inside the context too.
        """
        return routing.context(self.gating)

    @contextmanager
    def routed_per_token(
        self, *, temperature: float = 1.0, top_k: int | None = None
    ) -> Iterator[None]:
        """Gate every token by itself instead; see `Gating.applied_per_token`."""
        with self.gating.applied_per_token(temperature=temperature, top_k=top_k):
            yield

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 64,
        routing: Routing | None = None,
        **options: Any,  # noqa: ANN401
    ) -> list[Completion]:
        """Answer prompts in one batch, each routed by itself.

        Parameters
        ----------
        prompts : sequence of str
            Users' texts; the library's template is put around them.
        max_new_tokens : int
            Longest answer (tokens).
        routing : Routing, optional
            Of these prompts, where `route` has been asked already.
        **options
            Of ``transformers``' ``generate``; greedy by default, whatever the checkpoint's
            generation defaults are. One sequence per prompt.

        Returns
        -------
        list of Completion
            In the order of the prompts.

        Raises
        ------
        ValueError
            If there is no prompt.
        """
        if not prompts:
            raise ValueError("prompts must be at least one, got none")
        if (copies := options.get("num_return_sequences", 1)) != 1:
            raise ValueError(f"num_return_sequences must be 1, got {copies}; repeat the prompts")
        routing = routing or self.route(prompts)
        inputs = self.encode(prompts, room=max_new_tokens)
        generate: Any = self.model.generate
        with self.routed(routing):
            output = generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                **({"do_sample": False} | options),
            )
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._completion(answer, routing, row) for row, answer in enumerate(answers)]

    def encode(self, prompts: Sequence[str], room: int = 1) -> dict[str, torch.Tensor]:
        """Return prompts in the library's template, padded on the left, on the model's device.

        Prompts that leave less than `room` tokens for an answer lose their start.
        """
        info = self.library.info
        rows = encode(
            self.tokenizer,
            prompts,
            [""] * len(prompts),
            template=info.template,
            max_tokens=max(2, self.max_tokens - room + 1),
        )
        batch = collate(rows, range(len(rows)), self.tokenizer.pad_token_id, prompts_only=True)
        device = self.model.device
        return {
            "input_ids": batch.input_ids.to(device),
            "attention_mask": batch.attention_mask.to(device),
        }

    @property
    def max_tokens(self) -> int:
        """Tokens that the base model can attend to."""
        config: Any = self.model.config
        return int(getattr(config, "max_position_embeddings", 0) or self.library.info.max_tokens)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer; several in some chat models."""
        config: Any = self.model.generation_config
        named = config.eos_token_id if config else None
        several = named if isinstance(named, (list, tuple)) else [named]
        return frozenset(t for t in (*several, self.tokenizer.eos_token_id) if t is not None)

    def weights_of(self, routing: Routing, row: int) -> dict[str, float]:
        """Return one prompt's routing weight of every cluster by name."""
        names = self.library.gated.names
        return dict(zip(names, routing.weights[row].tolist(), strict=True))

    def decision(self, routing: Routing, row: int) -> dict[str, Any]:
        """Return where one prompt was routed: known, belonging, weights; see `Completion`."""
        return {
            "known": bool(routing.known[row]),
            "belonging": float(routing.shares[row]),
            "weights": self.weights_of(routing, row),
        }

    def _completion(self, answer: list[int], routing: Routing, row: int) -> Completion:
        ends = [place for place, token in enumerate(answer) if token in self.end_tokens]
        answer = answer[: ends[0] + 1] if ends else answer
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        by_token = routing.by_token is not None
        return Completion(text, tuple(answer), by_token=by_token, **self.decision(routing, row))


def load(
    library: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    embedder: str | None = None,
    router: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> RoutedModel:
    """Load a routed library on its base model.

    Parameters
    ----------
    library : str or Path
        A library directory, its folder ``routed/``, or a published library (``URL/NAME``).
    base : str, Path or PreTrainedModel, optional
        Path, id or built-in name of the base model, or the loaded model itself (its linear layers
        are wrapped in place); the one the library was made with by default.
    embedder : str, optional
        Path, id or built-in name of the embedding model; the library's own by default.
    router : str, optional
        Registered name of another router to make of the library's own; see `read_library`.
    device : str, optional
        For models loaded here; a GPU if there is one.
    dtype : str
        For a base loaded here, such as "bfloat16"; "auto" takes bf16 where it is fast, else fp32.

    Returns
    -------
    RoutedModel

    Raises
    ------
    LibraryError
        If the library is incomplete or corrupt, or its router needs a plugin.
    ModelError
        If base or embedding model cannot be found or are not those the library was made with.
    """
    load_plugins()
    read = read_library(library_folder(library), router=router)
    device = device or default_device()
    if isinstance(base, PreTrainedModel):
        location = str(base.config.name_or_path)
        if not location:
            raise ModelError(
                "the base model must have been loaded from a folder or hub id, so that it can be "
                "told from others, but its config.name_or_path is empty"
            )
        if any(hasattr(module, "lora_A") for module in base.modules()):
            raise ModelError(
                "the base model must be without adapters, but has LoRA layers; load it again"
            )
        _check_identity("base model", location, location, read.info.base_model)
        model = base
    else:
        spec = read.info.base_model.id if base is None else str(base)
        location = locate_base_model(spec)
        _check_identity("base model", spec, location, read.info.base_model)
        model = load_base_model(location, choose_dtype(dtype, device), device)
    spec = embedder or read.info.embedding_model.id
    place = locate_embedder(spec)
    _check_identity("embedding model", spec, place, read.info.embedding_model)
    adapted = PeftModel.from_pretrained(model, read.folder, autocast_adapter_dtype=False).eval()
    return RoutedModel(adapted, load_tokenizer(location), read, load_embedder(place, device))


def _check_identity(kind: str, spec: str, location: str, wanted: ModelIdentity) -> None:
    try:
        found = model_digest(location)
    except OSError as error:
        raise ModelError(f"the {kind} {spec!r} cannot be found: {error}") from error
    if found != wanted.digest:
        raise ModelError(
            f"the {kind} must be the library's own, {wanted.id!r} (digest {wanted.digest[:12]}), "
            f"got {spec!r} (digest {found[:12]}); pass the one it was made with or run the "
            "pipeline again"
        )
