import numpy as np
import pytest
import torch

from tclora.adapter import Adapter, LoraFactors
from tclora.merge import merge
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder, model_digest
from tclora.route import (
    Abstention,
    ModelIdentity,
    RoutedInfo,
    fit_gates,
    fit_router,
    write_library,
)

CLUSTERS = ("cluster-0", "cluster-1", "cluster-2")
PROMPTS = {
    "cluster-0": ["Add 3 and 4.", "What is 12 plus 30?", "Compute the sum of 7 and 9."],
    "cluster-1": ["Reverse the word apple.", "Spell music backwards.", "Reverse the word stone."],
    "cluster-2": ["Is every cat a dog?", "If all birds fly, does a hen fly?", "Is a lie true?"],
}
FAR = "Quelle est la recette de la soupe aux poireaux de ma grand-mère normande ?"


def draw_adapters(model, rank=3, scale=0.4):
    """One adapter per cluster, large enough to change the tiny model's logits clearly."""
    shapes = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    adapters = []
    for k, cluster in enumerate(CLUSTERS):
        generator = torch.Generator().manual_seed(k)
        modules = {
            name: LoraFactors(
                scale * torch.randn(out, rank, generator=generator),
                scale * torch.randn(rank, into, generator=generator),
            )
            for name, (out, into) in sorted(shapes.items())
        }
        adapters.append(Adapter(cluster, modules, "tiny"))
    return adapters


@pytest.fixture
def adapters(tiny_model):
    return draw_adapters(tiny_model)


@pytest.fixture
def gated(adapters):
    """Gates on the components of a CP merge that has room for all three adapters."""
    return fit_gates(adapters, merge(adapters, "tc-lora-mean", rank=9).adapter)


@pytest.fixture(scope="session")
def embedder():
    from tclora.cluster.embed import load_embedder

    return load_embedder(locate_embedder(BUILTIN_EMBEDDER))


@pytest.fixture
def router(embedder):
    from tclora.cluster.embed import embed_prompts

    vectors = embed_prompts(embedder, [p for prompts in PROMPTS.values() for p in prompts])
    labels = np.repeat(np.arange(3), 3)
    return fit_router(vectors, labels, coverage=1.0, abstention=Abstention(width=0.0))


@pytest.fixture
def library(tmp_path, gated, router, tiny_model_dir):
    location = locate_embedder(BUILTIN_EMBEDDER)
    info = RoutedInfo(
        base_model=ModelIdentity(id=str(tiny_model_dir), digest=model_digest(str(tiny_model_dir))),
        embedding_model=ModelIdentity(id=BUILTIN_EMBEDDER, digest=model_digest(location)),
        template="plain",
        max_tokens=64,
        method="tc-lora-mean",
        clusters=CLUSTERS,
    )
    write_library(tmp_path / "library" / "routed", gated, router, info)
    return tmp_path / "library"
