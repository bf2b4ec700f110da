"""Clusterers that look at the base model, against the plain way to compute what they look at."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from tclora.adapter import read_adapter
from tclora.cluster.clusterers.by_model import mix
from tclora.cluster.features.gradients import projections
from tclora.cluster.features.probes import coordinates, shard_rows
from tclora.cluster.features.request import FeatureRequest, compute_features
from tclora.cluster.registry import Rows, clusterers
from tclora.cluster.rows import cluster_rows
from tclora.cluster.vectors import VectorFile
from tclora.config import AdapterConfig, ClusterConfig, FeatureConfig
from tclora.errors import DataError, ModelError
from tclora.model.base import Base
from tclora.model.loss import response_nll
from tclora.model.tokens import collate
from tclora.train.lora import B_WEIGHT, attach_lora, module_of
from tests.cluster.test_rows import blobs, unit
from tests.merge.examples import make_adapter

BY_MODEL = ("gradients", "hidden-states", "lora-parameters")
N = 24


@pytest.fixture
def request_of(tmp_path, tiny_model_dir):
    """Two kinds of rows whose prompts are alike and whose responses are not, and a held-out one."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "prompt": [f"word {rng.integers(100)} " for _ in range(N)] + ["held out"],
            "response": [("aaaaaaaa", "zyxwvu")[i % 2] for i in range(N)] + ["x"],
            "task": [("a", "z")[i % 2] for i in range(N)] + ["a"],
            "split": ["train"] * N + ["test"],
        }
    )
    frame.to_parquet(tmp_path / "examples.parquet")
    vectors = unit(rng.standard_normal((N + 1, 8)))
    VectorFile.create(tmp_path / "vectors", N + 1, 8)[:] = vectors

    def make(**config):
        return FeatureRequest(
            base=Base(
                location=str(tiny_model_dir), digest="", dtype="float32", template="plain",
                max_tokens=64,
            ),
            examples=tmp_path / "examples.parquet",
            embeddings=tmp_path / "vectors",
            config=FeatureConfig(**config),
            adapter=AdapterConfig(r=2, lr=1e-2, batch_size=4, tokens_per_forward=100),
            seed=3,
            scratch=tmp_path / "scratch",
        )  # fmt: skip

    return make


def computed(name, request, tmp_path, on_event=lambda _: None):
    target = tmp_path / "features" / "file"
    width = compute_features(name=name, request=request, target=target, on_event=on_event)
    found = np.asarray(VectorFile.open(target))
    assert found.shape == (N, width)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-4)
    return found


@pytest.mark.parametrize("name", BY_MODEL)
def test_rows_that_the_model_learns_from_alike_are_together(request_of, tmp_path, name):
    request = request_of(probe_shards="task", probe_steps=2)
    features = computed(name, request, tmp_path)
    vectors = request.vectors()
    config = ClusterConfig(method=name, k=2, min_rows=1)
    found = cluster_rows(vectors, config, features=features)
    truth = request.frame()["task"]
    assert adjusted_rand_score(truth, found.labels) == 1
    assert adjusted_rand_score(truth, cluster_rows(vectors, ClusterConfig(k=2)).labels) < 0.5
    again = computed(name, request, tmp_path)
    np.testing.assert_array_equal(features, again)


def test_hidden_states_are_those_that_predict_the_response(request_of, tmp_path, tiny_model):
    request = request_of()
    features = computed("hidden-states", request, tmp_path)
    loaded, states = request.base.load(), []
    for row in loaded.encode(request.frame()):
        ids = torch.tensor([[*row.prompt, *row.response]])
        with torch.no_grad():
            out = tiny_model(ids, output_hidden_states=True).hidden_states[-1][0]
        states.append(out[len(row.prompt) - 1 : -1].mean(0).numpy())
    centred = np.stack(states) - np.mean(states, axis=0)
    np.testing.assert_allclose(features, unit(centred), atol=1e-4)


def test_sketches_are_projections_of_the_gradients_of_b(request_of, tmp_path, tiny_model_dir):
    request = request_of()
    features = computed("gradients", request, tmp_path)
    omegas = projections(LlamaForCausalLM.from_pretrained(tiny_model_dir), request)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    adapted = attach_lora(model, request.adapter, request.seed)
    rows = request.base.load().encode(request.frame())
    for index in (0, 1, 17):
        adapted.zero_grad()
        batch = collate(rows, [index], pad_id=0)
        (response_nll(adapted, batch).sum() / batch.supervised).backward()
        gradients = {
            module_of(name): weight.grad
            for name, weight in adapted.named_parameters()
            if name.endswith(B_WEIGHT)
        }
        scale = request.adapter.alpha / request.adapter.r
        wanted = [omegas[m][1] @ gradients[m] / scale for m in omegas]
        wanted = torch.cat([part.flatten() for part in wanted]).numpy()
        np.testing.assert_allclose(features[index], wanted / np.linalg.norm(wanted), atol=1e-4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_sketches_are_of_linear_layers_alone(request_of):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    request = request_of()
    adapter = request.adapter.model_copy(update={"target_modules": ("c_attn",)})
    with pytest.raises(ModelError, match=r"train\.target_modules must .* 'transformer\.h\.0\.attn"):
        projections(model, request.model_copy(update={"adapter": adapter}))


def test_sketches_leave_the_model_as_it_was(request_of, tmp_path, tiny_model):
    from tclora.cluster.features.gradients import Sketcher

    request = request_of()
    weights = {name: w.clone() for name, w in tiny_model.named_parameters()}
    sketcher = Sketcher(tiny_model, projections(tiny_model, request))
    tiny_model.requires_grad_(True)  # placing an adapter to draw A_0 has frozen it
    rows = request.base.load().encode(request.frame())
    whole = sketcher.sketch(collate(rows, [0, 1, 2], pad_id=0))
    for place in range(3):  # what a batch holds beside a row does not matter
        alone = sketcher.sketch(collate(rows, [place], pad_id=0))
        np.testing.assert_allclose(alone[0], whole[place], rtol=1e-3, atol=1e-6)
    for name, weight in tiny_model.named_parameters():
        assert weight.requires_grad
        assert weight.grad is None
        assert torch.equal(weight, weights[name])
        assert not tiny_model.get_submodule(name.rpartition(".")[0])._forward_hooks


def test_coordinates_have_the_cosines_of_the_updates():
    adapters = [make_adapter(str(k), seed=k) for k in range(4)]
    dense = np.stack(
        [
            np.concatenate(
                [(f.B.double() @ f.A.double()).flatten().numpy() for f in a.modules.values()]
            )
            for a in adapters
        ]
    )
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    found = coordinates(adapters)
    np.testing.assert_allclose(found @ found.T, dense @ dense.T, atol=1e-5)


def test_probes_come_from_one_start_and_each_from_its_own_rows(request_of, tmp_path):
    request = request_of(probe_shards="task", probe_steps=2)
    events = []
    features = computed("lora-parameters", request, tmp_path, events.append)
    assert len(np.unique(features.round(5), axis=0)) == 2
    assert events[-1] == {"done": 4, "of": 4}
    probes = [read_adapter(request.scratch / f"probe-{i}") for i in range(2)]
    assert features[0] @ features[1] == pytest.approx(
        float(np.prod(coordinates(probes), axis=0).sum()), abs=1e-5
    )
    alone = pd.read_parquet(request.scratch / "probe-0.parquet")
    assert set(alone["response"]) == {"aaaaaaaa"}


def test_probes_of_a_few_rows_take_all_their_steps_whatever_the_run_holds_out(request_of, tmp_path):
    request = request_of(probe_shards=N, probe_steps=3)
    run = request.adapter.model_copy(
        update={"validation_fraction": 0.5, "validation_steps": 1, "patience": 1, "lr": 0.5}
    )
    events = []
    compute_features(
        name="lora-parameters",
        request=request.model_copy(update={"adapter": run}),
        target=tmp_path / "features",
        on_event=events.append,
    )
    assert events[-1] == {"done": 3 * N, "of": 3 * N}


def test_shards_without_labels_are_groups_of_similar_prompts(request_of):
    request = request_of(probe_shards=5)
    shards = shard_rows(request, request.frame())
    assert set(shards) == set(range(5))
    vectors = np.asarray(request.vectors())
    same = shards[:, None] == shards
    cosines = vectors @ vectors.T
    assert cosines[same].mean() > cosines[~same].mean() + 0.2


def test_shards_by_task_need_labels(request_of):
    request = request_of(probe_shards="task")
    frame = request.frame()
    frame.loc[:2, "task"] = None
    with pytest.raises(DataError, match="needs a task label on every training row, 3 lack one"):
        shard_rows(request, frame)


def test_features_that_are_not_finite_are_refused(request_of, tmp_path, monkeypatch):
    from tclora.cluster.features import hidden

    monkeypatch.setattr(hidden, "mean_states", lambda model, batch: np.nan)
    with pytest.raises(ModelError, match="'hidden-states' got features that are not finite"):
        compute_features(name="hidden-states", request=request_of(), target=tmp_path / "file")
    with pytest.raises(ValueError, match="name must be a clusterer that looks at the model"):
        compute_features(name="kmeans", request=request_of(), target=tmp_path / "file")


def test_the_mixture_weighs_the_cosines():
    features, _ = blobs(width=5, seed=1)
    vectors, _ = blobs(width=7, seed=2)
    for weight in (0.0, 0.3, 1.0):
        mixed = mix(features, vectors, weight)
        wanted = (1 - weight) * features @ features.T + weight * vectors @ vectors.T
        np.testing.assert_allclose(mixed @ mixed.T, wanted, atol=1e-5)


@pytest.mark.parametrize("name", BY_MODEL)
def test_text_alone_is_k_means_on_the_text(name):
    vectors, _ = blobs(spread=0.3)
    features = unit(np.random.default_rng(0).standard_normal((len(vectors), 4)))
    config = ClusterConfig(method=name, k=3, min_rows=1, mix=1.0)
    plain = cluster_rows(vectors, ClusterConfig(k=3, min_rows=1))
    np.testing.assert_array_equal(
        cluster_rows(vectors, config, features=features).labels, plain.labels
    )
    with pytest.raises(ValueError, match="rows must have features"):
        clusterers[name].function(Rows(vectors, [None] * len(vectors)), config, 0)
