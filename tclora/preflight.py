"""What can be checked before anything expensive starts: models, layers, methods, templates."""

import importlib.util
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tclora.cluster.registry import clusterers
from tclora.config import Config
from tclora.errors import ConfigError, ModelError
from tclora.evaluate.lm_eval import executes_code
from tclora.merge import methods
from tclora.model.locate import load_tokenizer, locate_base_model, locate_embedder, model_digest
from tclora.model.tokens import encode
from tclora.route.router import routers
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


def check(config: Config) -> Models:
    """Find the models and check that the configuration fits them.

    Raises
    ------
    ConfigError
        With every problem found: unknown models, methods, routers or clusterers, a LoRA target
        that matches no layer, a missing chat template, missing packages.
    """
    problems: list[str] = []
    problems += _method_problems(config) + _harness_problems(config)
    problems += _variant_problems(config)
    base = embedder = ""
    try:
        base = locate_base_model(config.base_model)
        problems += _base_model_problems(base, config)
    except ModelError as error:
        problems.append(f"base_model: {error}")
    try:
        embedder = locate_embedder(config.embed.model)
    except ModelError as error:
        problems.append(f"embed.model: {error}")
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise ConfigError(f"the run cannot start, {len(problems)} problem(s):\n{listing}")
    return Models(base, model_digest(base), embedder, model_digest(embedder))


def _method_problems(config: Config) -> list[str]:
    known = [info.name for info in methods()]
    unknown = [name for name in config.merge.methods if name not in known]
    problems = [f"merge.methods: {name!r} must be one of {known}" for name in unknown]
    needing = {info.name for info in methods() if info.needs == "statistics"}
    uninformed = [name for name in config.merge.methods if name in needing]
    if uninformed and not config.merge.calibration_rows:
        problems.append(
            f"merge.calibration_rows must be above 0 for {', '.join(uninformed)}, which need "
            "activation statistics, got 0"
        )
    ranked = {info.name for info in methods() if info.needs}
    if config.factorise.target_recovery is not None and config.merge.primary not in ranked:
        problems.append(
            f"factorise.target_recovery needs a merge.primary whose rank is the CP rank, of "
            f"{sorted(ranked)}, got {config.merge.primary!r}"
        )
    return problems


def _variant_problems(config: Config) -> list[str]:
    """Name a router or clusterer that is not registered, or that the settings do not suit."""
    method, problems = config.cluster.method, []
    if method in clusterers:
        problems += clusterers[method].check(config.cluster)
    else:
        problems.append(f"cluster.method: {clusterers.unknown(method)}")
    if config.route.router not in routers:
        problems.append(f"route.router: {routers.unknown(config.route.router)}")
    return problems


def _harness_problems(config: Config) -> list[str]:
    if not config.evaluate.harness:
        return []
    problems = []
    if importlib.util.find_spec("lm_eval") is None:
        problems.append("evaluate.harness needs lm-eval: pip install tclora[harness]")
    executing = [task for task in config.evaluate.harness if executes_code(task)]
    if executing and not config.evaluate.allow_code_execution:
        problems.append(
            f"evaluate.harness: {', '.join(executing)} run code written by the model; "
            "set evaluate.allow_code_execution: true to let them"
        )
    return problems


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
