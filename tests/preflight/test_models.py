import shutil

import pandas as pd
import pytest

from tclora.config import parse_config
from tclora.errors import ConfigError
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder, model_digest
from tclora.preflight import check, check_models


@pytest.fixture
def folder(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def configuration(tiny_model_dir, **sections):
    values = {"base_model": str(tiny_model_dir), "train": {"template": "plain"}}
    return parse_config(values | sections)


def test_a_fitting_configuration_passes(tiny_model_dir):
    models = check(configuration(tiny_model_dir))
    assert models.base == str(tiny_model_dir)
    assert models.base_digest == model_digest(models.base)
    assert models.embedder_digest == model_digest(locate_embedder(BUILTIN_EMBEDDER))


def test_settings_that_do_not_suit_a_clusterer_are_refused(tiny_model_dir):
    config = configuration(tiny_model_dir, cluster={"method": "random", "k": "auto"})
    with pytest.raises(ConfigError, match=r"cluster\.k must be a number with cluster\.method"):
        check(config)


def test_given_embeddings_are_of_the_width_of_the_model_that_routes(tiny_model_dir, tmp_path):
    file = str(tmp_path / "given.parquet")
    pd.DataFrame({"prompt": ["a"], "embedding": [[0.6, 0.8]]}).to_parquet(file)
    config = configuration(tiny_model_dir, embed={"vectors": file})
    with pytest.raises(ConfigError, match=r"embed\.vectors: .* of embed\.model, 384, got 2; name"):
        check_models(config)
    check_models(configuration(tiny_model_dir, embed={"vectors": file}, route={"enabled": False}))


def test_a_4_bit_base_needs_its_package_where_jobs_run_here(tiny_model_dir, monkeypatch):
    monkeypatch.setattr("tclora.preflight.models.installed", lambda: False)
    train = {"template": "plain", "quantisation": "nf4", "dtype": "float32", "engine": "separate"}
    with pytest.raises(ConfigError, match=r"train\.quantisation: .* pip install tclora\[qlora\]$"):
        check_models(configuration(tiny_model_dir, train=train))
    elsewhere = {"backend": "deployment", "store": "file:///nowhere"}
    check_models(configuration(tiny_model_dir, train=train, execution=elsewhere))


def test_tasks_lm_eval_does_not_know_or_cannot_answer_are_refused_before_training(tiny_model_dir):
    pytest.importorskip("lm_eval")
    config = configuration(tiny_model_dir, evaluate={"lm_eval": ["arc_eazy", "wikitext"]})
    with pytest.raises(ConfigError, match="cannot start, 2 problem") as caught:
        check(config)
    for wanted in (
        "got 'arc_eazy'; did you mean arc_easy",
        "'wikitext' measures the perplexity",
    ):
        assert wanted in str(caught.value)


def test_preflight_reports_every_problem(folder, tmp_path):
    (folder / "chat_template.jinja").unlink()
    config = configuration(
        folder,
        train={"target_modules": "query", "template": "chat"},
        merge={"methods": ["tc-lora", "magic", "more magic"]},
        embed={"model": str(tmp_path / "none")},
        evaluate={"lm_eval": ["humaneval"]},
        cluster={"method": "k-means"},
        route={"router": "softmx"},
    )
    with pytest.raises(ConfigError, match="cannot start, 8 problem") as caught:
        check(config)
    for wanted in (
        "merge.methods: a method must be a registered name, got 'magic'; known: cat, ",
        "got 'more magic'", "train.target_modules 'query'",
        "train.template must be 'plain'", "embed.model: ", "humaneval run code",
        "cluster.method: clusterer must be a registered name, got 'k-means'; did you mean kmeans",
        "route.router: router must be a registered name, got 'softmx'; did you mean softmax?",
    ):  # fmt: skip
        assert wanted in str(caught.value)
