"""The whole pipeline on a tiny model and someone's own file: real jobs, Prefect and MLflow."""

import json
from pathlib import Path
from urllib.parse import urlparse

import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from peft import PeftModel
from transformers import LlamaForCausalLM

import tclora
from flows.pipeline import pipeline
from tasks.provenance import source_sha256
from tclora.adapter import read_adapter
from tclora.config import parse_config
from tclora.data.readers import source_digest
from tclora.errors import ConfigError, JobError
from tclora.evaluate.tables import flat_figures
from tclora.library.manifest import read_manifest, verify
from tclora.library.published import library_folder
from tclora.model.tokens import encode
from tests.flows.examples import ADAPTER_FILES, environment, settings, stamps_of
from tests.reference import row_nll

__all__ = ["environment", "settings"]
pytestmark = [
    pytest.mark.usefixtures("prefect_server", "environment"),
    pytest.mark.timeout(900),  # a dozen jobs, each of which loads torch and transformers
]


@pytest.fixture(scope="module")
def failed(settings, environment, prefect_server):
    """A first run in which one training job cannot write its adapter; then the cause is gone."""
    staging = Path(settings["output"]) / ".mine.staging"
    obstacle = staging / "adapters" / "cluster-1"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the adapter's folder should be")
    with pytest.raises(JobError) as caught:
        pipeline(settings)
    assert not (staging.parent / "mine").exists()
    stamps = stamps_of(staging)
    obstacle.unlink()
    return str(caught.value), stamps


@pytest.fixture(scope="module")
def finished(settings, failed):
    """The second, complete run."""
    return pipeline(settings)


@pytest.fixture
def library(finished):
    return Path(finished["library"])


def test_a_failing_job_is_named_and_its_siblings_are_kept(failed, library):
    message, stamps = failed
    assert message.startswith("1 of 3 train jobs failed")
    assert "cluster-1: " in message
    assert "NotADirectoryError" in message
    assert "cluster-0" not in message
    now = stamps_of(library)
    kept = [name for name in stamps if name.startswith(("adapters/cluster-0", "adapters/joint"))]
    assert len(kept) == 4
    assert all(now[name] == stamps[name] for name in kept)


def test_a_failed_run_is_marked_in_mlflow(failed, finished):
    client = MlflowClient(finished["mlflow_uri"])
    runs = client.search_runs([finished["mlflow_experiment"]])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    first = min(parents, key=lambda run: run.info.start_time)
    assert first.info.status == "FAILED"
    children = {
        run.info.run_name: run.info.status
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == first.info.run_id
    }
    assert children == {"cluster-0": "FINISHED", "cluster-1": "FAILED", "joint": "FINISHED"}


def test_the_library_is_published(library, settings, finished):
    place = f"{settings['publish_to']}/mine"
    copy = library_folder(place)
    assert copy != library
    assert verify(copy) == []
    assert (copy / "library.json").read_bytes() == (library / "library.json").read_bytes()
    run = MlflowClient(finished["mlflow_uri"]).get_run(finished["mlflow_run"])
    assert run.data.tags["tclora.published"] == place
    answers = tclora.load(place).generate(["Add the two numbers 12 and 34."], max_new_tokens=2)
    assert answers == tclora.load(library).generate(
        ["Add the two numbers 12 and 34."], max_new_tokens=2
    )


def test_the_library_is_complete(library):
    assert verify(library) == []
    manifest = read_manifest(library)
    folders = ("adapters/cluster-0", "adapters/cluster-1", "adapters/joint", "merged/tc-lora",
               "merged/tc-lora-unrefitted", "merged/uniform", "routed")  # fmt: skip
    assert set(manifest.digests) == {
        *(f"{folder}/{file}" for folder in folders for file in ADAPTER_FILES),
        "centroids.safetensors", "clusters.parquet", "evaluation/cross.parquet",
        "evaluation/harm.parquet", "evaluation/winners.parquet", "interference_modules.parquet",
        "evaluation/items.parquet", "interference.parquet", "shared_structure.parquet",
        "evaluation/recovery.parquet", "evaluation/summary.parquet", "explained_variance.parquet",
        "factors.safetensors", "routed/gates.safetensors", "routed/routed.json",
        "routed/router.safetensors", "routing.parquet", "training/cluster-0.json",
        "training/cluster-1.json", "training/joint.json",
    }  # fmt: skip
    assert manifest.clustering.k == 2
    assert manifest.profile["rows_test"] == 11
    assert manifest.factors.rank == 2
    report = (library / "report.html").read_text()
    assert "tc-lora" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_the_two_tasks_became_the_two_clusters(library):
    table = pd.read_parquet(library / "clusters.parquet")
    kind = table["prompt"].str.startswith("Add")
    assert table.groupby(kind)["cluster"].nunique().tolist() == [1, 1]
    assert table["cluster"].nunique() == 2


def test_every_method_measured_every_held_out_row(library):
    items = pd.read_parquet(library / "evaluation" / "items.parquet")
    assert items.groupby("method").size().to_dict() == {
        "base": 11, "own": 11, "joint": 11, "tc-lora": 11, "tc-lora-unrefitted": 11, "uniform": 11,
        "routed": 11,
    }  # fmt: skip
    totals = items.groupby("method")["nll"].sum()
    assert totals["own"] < totals["base"]
    recovery = pd.read_parquet(library / "evaluation" / "recovery.parquet")
    assert set(recovery["method"]) == {
        "joint", "tc-lora", "tc-lora-unrefitted", "uniform", "routed",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["tc-lora", "uniform", "joint", "base"])
def test_stock_peft_reproduces_the_measured_nll(library, tiny_model_dir, tokenizer, method):
    items = pd.read_parquet(library / "evaluation" / "items.parquet").query("method == @method")
    examples = pd.read_parquet(library / "work" / "examples.parquet").set_index("id")
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    if method != "base":
        folder = "adapters" if method == "joint" else "merged"
        model = PeftModel.from_pretrained(model, library / folder / method)
    chosen = examples.loc[items["id"]]
    rows = encode(
        tokenizer, chosen["prompt"].tolist(), chosen["response"].tolist(), template="plain"
    )
    found = [row_nll(model.eval(), row) for row in rows]
    assert items["nll"].tolist() == pytest.approx(found, rel=1e-4)


def test_own_is_each_clusters_own_adapter(library, tiny_model_dir, tokenizer):
    items = pd.read_parquet(library / "evaluation" / "items.parquet").query("method == 'own'")
    examples = pd.read_parquet(library / "work" / "examples.parquet").set_index("id")
    assert items["cluster"].nunique() == 2
    for cluster, part in items.groupby("cluster"):
        model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
        model = PeftModel.from_pretrained(model, library / "adapters" / f"cluster-{cluster}")
        chosen = examples.loc[part["id"]]
        rows = encode(
            tokenizer, chosen["prompt"].tolist(), chosen["response"].tolist(), template="plain"
        )
        found = [row_nll(model.eval(), row) for row in rows]
        assert part["nll"].tolist() == pytest.approx(found, rel=1e-4)


def test_the_routed_library_reproduces_its_measured_nll(library, tiny_model_dir):
    """Each held-out prompt, routed by itself in a loaded library, has the NLL of the table."""
    items = pd.read_parquet(library / "evaluation" / "items.parquet").query("method == 'routed'")
    examples = pd.read_parquet(library / "work" / "examples.parquet").set_index("id")
    routed = tclora.load(library, tiny_model_dir, dtype="float32")
    chosen = examples.loc[items["id"]]
    rows = encode(
        routed.tokenizer, chosen["prompt"].tolist(), chosen["response"].tolist(), template="plain"
    )
    found = []
    for prompt, row in zip(chosen["prompt"], rows, strict=True):
        with routed.routed(routed.route([prompt])):
            found.append(row_nll(routed.model, row))
    assert items["nll"].tolist() == pytest.approx(found, rel=1e-4)


def test_the_routing_of_held_out_prompts_is_recorded(library):
    routing = pd.read_parquet(library / "routing.parquet")
    clusters = pd.read_parquet(library / "clusters.parquet").set_index("id")
    assert len(routing) == 11
    assert (routing["nearest"] == clusters.loc[routing["id"], "cluster"].to_numpy()).all()
    assert routing[["cluster-0", "cluster-1"]].sum(axis=1).tolist() == [1.0] * 11


def test_the_routed_library_is_a_pyfunc_model(finished, library, tiny_model_dir):
    import mlflow

    client = MlflowClient(finished["mlflow_uri"])
    version = client.get_model_version_by_alias("mine-routed", "current")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLORA_BASE_MODEL", str(tiny_model_dir))
        model = mlflow.pyfunc.load_model(version.source)
        prompts = ["Add the two numbers 31 and 42.", "Write this list of words in reverse order."]
        found = model.predict(pd.DataFrame({"prompt": prompts}), params={"max_new_tokens": 4})
    wanted = tclora.load(library, tiny_model_dir).generate(prompts, max_new_tokens=4)
    assert found["completion"].tolist() == [answer.text for answer in wanted]
    assert found["known"].tolist() == [answer.known for answer in wanted]
    assert found["belonging"].tolist() == [answer.belonging for answer in wanted]


def test_fallback_and_abstention_are_chosen_by_loss(library):
    routed = read_manifest(library).routed
    found = json.loads((library / "work" / "routing.json").read_text())
    assert routed.fallback_spread == found["fallback"]["rule"]["spread"]
    assert routed.abstain_at == found["abstention"]["rule"]["at"]
    losses = [loss for _, loss in found["fallback"]["losses"]]
    chosen = [rule for rule, loss in found["fallback"]["losses"] if loss == min(losses)]
    assert found["fallback"]["rule"] in chosen
    assert routed.probes_loss <= max(routed.probes_never, routed.probes_always)
    assert {probe["kind"] for probe in found["probes"]} == {"own", "reworded", "foreign"}


def test_the_uniform_merge_is_the_mean_of_the_adapters(library):
    from tclora.adapter import read_adapter

    parts = [read_adapter(library / "adapters" / f"cluster-{k}").modules for k in range(2)]
    merged = read_adapter(library / "merged" / "uniform").modules
    for name, factors in merged.items():
        mean = sum(part[name].delta() for part in parts) / 2
        assert torch.allclose(factors.delta(), mean, atol=1e-5)


def test_the_primary_merge_has_its_component_weights_refitted(library):
    before = read_adapter(library / "merged" / "tc-lora-unrefitted").modules
    after = read_adapter(library / "merged" / "tc-lora").modules
    changed = 0
    for name, (B, A) in after.items():
        assert torch.equal(A, before[name].A)
        scaled = (B * before[name].B).sum(0) / before[name].B.square().sum(0)
        assert torch.allclose(B, before[name].B * scaled, atol=1e-6)  # a factor per component
        changed += int(not torch.allclose(scaled, torch.ones(1)))
    assert changed > 0
    merges = read_manifest(library).merges
    assert "component weights refitted in 2 steps on 8 rows per cluster" in merges["tc-lora"].notes
    assert "refitted" not in merges["tc-lora-unrefitted"].notes
    assert "uniform-unrefitted" not in merges
    measured = pd.read_parquet(library / "evaluation" / "recovery.parquet")["method"]
    assert {"tc-lora", "tc-lora-unrefitted"} < set(measured)


def test_mlflow_has_nested_runs_linked_to_prefect(finished, library):
    from prefect.client.orchestration import get_client

    client = MlflowClient(finished["mlflow_uri"])
    parent = client.get_run(finished["mlflow_run"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["train.r"] == "2"
    assert {"tc-lora/test/nll", "factors/explained_variance", "rows_test"} <= set(
        parent.data.metrics
    )
    assert len(parent.inputs.dataset_inputs) == 2
    kind = client.get_experiment(finished["mlflow_experiment"]).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert parent.data.tags.get("prefect.flow_run_url", "http").startswith("http")
    flow_run_id = parent.data.tags["prefect.flow_run_id"]
    with get_client(sync_client=True) as api:
        assert api.read_flow_run(flow_run_id).name == parent.data.tags["prefect.flow_run_name"]
    assert read_manifest(library).links["mlflow_run"]
    children = {
        run.info.run_name
        for run in client.search_runs(
            [finished["mlflow_experiment"]],
            f"tags.`mlflow.parentRunId` = '{finished['mlflow_run']}'",
        )
    }
    assert children == {
        "cluster-0", "cluster-1", "joint", "evaluate-base", "evaluate-own", "evaluate-joint",
        "evaluate-tc-lora", "evaluate-tc-lora-unrefitted", "evaluate-uniform",
        "evaluate-routed",
    }  # fmt: skip
    artifacts = {entry.path for entry in client.list_artifacts(finished["mlflow_run"])}
    assert {"report.html", "library.json", "config.yaml", "evaluation", "figures"} <= artifacts


def test_merges_are_ranked_by_their_figures(finished, library):
    client = MlflowClient(finished["mlflow_uri"])
    order = [{"field_name": "metrics.test/nll", "ascending": True}]
    models = client.search_logged_models(
        [finished["mlflow_experiment"]], f"source_run_id = '{finished['mlflow_run']}'",
        order_by=order,
    )  # fmt: skip
    ranked = {m.name: {x.key: x.value for x in m.metrics or ()}.get("test/nll") for m in models}
    measured = {name: value for name, value in ranked.items() if value is not None}
    merges = ("merged-tc-lora", "merged-tc-lora-unrefitted", "merged-uniform")
    assert set(measured) == {*merges, "joint", "routed"}
    assert list(measured.values()) == sorted(measured.values())
    summary = pd.read_parquet(library / "evaluation" / "summary.parquet")
    wanted = flat_figures(summary[summary["method"] == "uniform"])["test/nll"]
    assert measured["merged-uniform"] == pytest.approx(wanted)


def test_the_primary_merge_is_registered(finished):
    client = MlflowClient(finished["mlflow_uri"])
    version = client.get_model_version_by_alias("mine-tc-lora", "current")
    assert Path(urlparse(version.source).path, "adapter_model.safetensors").is_file()


def artifacts_of_prefect():
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as api:
        return api.read_artifacts()


def test_prefect_links_to_mlflow(finished):
    found = [a for a in artifacts_of_prefect() if a.key == "mlflow-mine"]
    assert any(finished["mlflow_run"] in a.data for a in found)


def test_prefect_shows_methods_sizes_and_places(finished, library):
    tables = {a.key: json.loads(a.data) for a in artifacts_of_prefect() if a.type == "table"}
    methods = {row["method"]: row for row in tables["methods-mine"]}
    assert {"base", "own", "joint", "tc-lora", "uniform", "routed"} <= set(methods)
    summary = pd.read_parquet(library / "evaluation" / "summary.parquet")
    wanted = flat_figures(summary[summary["method"] == "uniform"])["test/nll"]
    assert methods["uniform"]["test NLL"] == pytest.approx(wanted, abs=1e-4)
    assert methods["base"]["recovery"] is None
    sizes = {row["what"]: row["bytes"] for row in tables["sizes-mine"]}
    assert 0 < sizes["merged/uniform"] < sizes["separate adapters"] < sizes["whole library"]
    places = {row["what"]: row["where"] for row in tables["places-mine"]}
    assert places["library"] == str(library)
    assert finished["mlflow_run"] in places["MLflow run"]


def test_prefect_shows_the_progress_of_jobs(finished):
    shown = [a.description for a in artifacts_of_prefect() if a.type == "progress"]
    assert any(text.startswith("cluster-0: ") for text in shown)
    assert any(text.startswith("routed: ") for text in shown)


def test_from_a_run_of_mlflow_back_to_all_it_was_made_of(finished, library, settings):
    client = MlflowClient(finished["mlflow_uri"])
    (nested,) = client.search_runs(
        [finished["mlflow_experiment"]],
        f"tags.`mlflow.parentRunId` = '{finished['mlflow_run']}' "
        "AND attributes.run_name = 'evaluate-uniform'",
    )
    # Every run has a parent, which has everything; what a method was measured on is its own.
    parent = client.get_run(nested.data.tags["mlflow.parentRunId"])
    tags, manifest = parent.data.tags, read_manifest(library)
    config = yaml.safe_load(
        Path(client.download_artifacts(parent.info.run_id, "config.yaml")).read_text()
    )
    assert parse_config(config) == parse_config(settings)
    assert tags["tclora.version"] == tclora.__version__
    assert tags["tclora.source_sha256"] == source_sha256()
    assert tags["tclora.data_sha256"] == source_digest(parse_config(settings).data)
    assert tags["tclora.base_model_digest"] == manifest.base_model.digest
    assert tags["tclora.embedding_model_digest"] == manifest.embedding_model.digest
    assert tags["prefect.flow_run_id"]
    assert "environment.yaml" in {a.path for a in client.list_artifacts(parent.info.run_id)}
    rows = {entry.dataset.name: entry.dataset.digest for entry in parent.inputs.dataset_inputs}
    assert set(rows) == {"mine-train", "mine-test"}
    (held_out,) = nested.inputs.dataset_inputs
    assert (held_out.dataset.name, held_out.dataset.digest) == ("mine-test", rows["mine-test"])
    models = client.search_logged_models(
        [finished["mlflow_experiment"]], "metrics.`test/nll` > 0",
        datasets=[{"dataset_name": "mine-test", "dataset_digest": rows["mine-test"]}],
    )  # fmt: skip
    assert {"merged-uniform", "routed"} <= {model.name for model in models}


def test_what_a_run_and_its_jobs_use_is_among_the_system_metrics(finished):
    client = MlflowClient(finished["mlflow_uri"])
    parent = client.get_run(finished["mlflow_run"]).data.metrics
    for place in ("system", "system/evaluate_adapters-uniform"):
        assert parent[f"{place}/process_memory_usage_megabytes"] > 100
    (trained,) = client.search_runs(
        [finished["mlflow_experiment"]],
        f"tags.`mlflow.parentRunId` = '{finished['mlflow_run']}' "
        "AND attributes.run_name = 'cluster-1'",
    )
    assert trained.data.metrics["system/process_memory_usage_megabytes"] > 100


def test_a_run_can_stop_early(settings, tmp_path):
    outcome = pipeline(settings | {"output": str(tmp_path)}, until="prepare")
    assert outcome["until"] == "prepare"
    assert not (tmp_path / "mine").exists()
    names = {path.stem for path in Path(outcome["library"]).rglob("*") if path.is_file()}
    assert names == {
        "examples", "tokens", "embeddings", "clusters", "centroids", "cluster-0", "cluster-1",
        "joint", "evaluation",
    }  # fmt: skip


def test_problems_are_found_before_anything_is_done(settings, tmp_path):
    bad = settings | {
        "output": str(tmp_path / "runs"),
        "base_model": str(tmp_path / "none"),
        "merge": {"methods": ["tc-lora", "magic"]},
        "embed": {"model": str(tmp_path / "nowhere")},
        "factorise": {"target_recovery": 0.9},
    }
    bad["merge"] |= {"primary": "uniform", "methods": ["uniform", "magic"]}
    with pytest.raises(ConfigError, match="4 problem") as caught:
        pipeline(bad)
    for wanted in ("base_model: ", "embed.model: ", "must be a registered name, got 'magic'",
                   "target_recovery needs a merge.primary whose rank is the CP rank"):  # fmt: skip
        assert wanted in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_step_is_refused(settings):
    with pytest.raises(ConfigError, match=r"until must be one of prepare, train, .*, got 'tea'"):
        pipeline(settings, until="tea")
