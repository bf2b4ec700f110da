"""The models of a run: where they are, and whether layers, templates and packages fit."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tclora.cluster.embed import embed_prompts, load_embedder
from tclora.cluster.given import given_width
from tclora.config import Config
from tclora.errors import ConfigError, DataError, ModelError
from tclora.model.locate import load_tokenizer, locate_base_model, locate_embedder, model_digest
from tclora.model.quantised import NEEDED, installed
from tclora.model.tokens import encode
from tclora.preflight.execution import execution_problems
from tclora.preflight.methods import lm_eval_problems, method_problems, variant_problems
from tclora.train.lora import attach_lora


@dataclass(frozen=True)
class Models:
    """Where the models of a run are, and which they are.

    Attributes
    ----------
    base, embedder : str
        Path or hub id to load from.
    base_digest, embedder_digest : str
        Their identities; see `tclora.model.locate.model_digest`.
    """

    base: str
    base_digest: str
    embedder: str
    embedder_digest: str


def check_models(config: Config) -> Models:
    """Find the models and check that the configuration fits them.

    Raises
    ------
    ConfigError
        With every problem found: unknown models, methods, routers or clusterers, a LoRA target
        that matches no layer, a missing chat template, missing packages, a cluster that
        does not answer, given embeddings of
        another width than those of the model that embeds the prompts to be routed.
    """
    problems = method_problems(config) + lm_eval_problems(config) + variant_problems(config)
    problems += execution_problems(config)
    if config.train.quantisation and config.execution.workers_here and not installed():
        problems.append(NEEDED)
    base = embedder = ""
    try:
        base = locate_base_model(config.base_model)
        problems += _base_model_problems(base, config)
    except ModelError as error:
        problems.append(f"base_model: {error}")
    try:
        embedder = locate_embedder(config.embed.model)
        if config.embed.vectors and config.route.enabled:
            problems += _width_problems(Path(config.embed.vectors), embedder)
    except ModelError as error:
        problems.append(f"embed.model: {error}")
    except DataError as error:
        problems.append(str(error))
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the run cannot start, {len(problems)} problem(s):\n{listing}")
    return Models(base, model_digest(base), embedder, model_digest(embedder))


def _width_problems(vectors: Path, embedder: str) -> list[str]:
    """Compare given embeddings with the model that embeds the prompts to be routed."""
    given = given_width(vectors)
    own = embed_prompts(load_embedder(embedder), ["a"]).shape[1]
    if given == own:
        return []
    return [
        f"embed.vectors: {vectors} must hold vectors of the width of embed.model, {own}, got "
        f"{given}; name the model that made them in embed.model, or set route.enabled=false"
    ]


def _target_problems(adapted: PeftModel, config: Config) -> list[str]:
    """Find targets that match nothing, or match what a plain update B @ A cannot express."""
    problems = []
    adapted_modules = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters()
                       if ".lora_A." in name}  # fmt: skip
    targets = config.train.target_modules
    for target in () if isinstance(targets, str) else targets:
        if not any(name.endswith(f".{target}") for name in adapted_modules):
            problems.append(f"train.target_modules: {target!r} matches no linear layer")
    if any(".lora_embedding_A" in name for name, _ in adapted.named_parameters()):
        problems.append("train.target_modules must be linear layers, not embeddings")
    return problems


def _base_model_problems(location: str, config: Config) -> list[str]:
    problems = []
    try:
        with torch.device("meta"):  # shapes without weights
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(location))
            adapted = attach_lora(model, config.train, seed=0)
        problems += _target_problems(adapted, config)
    except (OSError, ValueError, ModelError) as error:
        problems.append(f"base_model: {error}")
    try:
        tokenizer = load_tokenizer(location)
        if tokenizer.eos_token_id is None:
            problems.append("base_model: its tokenizer must have an end-of-sequence token")
        encode(tokenizer, ["a"], ["b"], template=config.train.template)
    except (OSError, ValueError) as error:
        problems.append(f"base_model: {error}")
    return problems
