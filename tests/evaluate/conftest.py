"""A whole small library with all an evaluation looks at, rows of its own, walls for programs."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file

from tclora.adapter import write_adapter
from tclora.cluster.centroids import centroids
from tclora.cluster.embed import embed_prompts
from tclora.evaluate.sandbox.judge import SandboxError, check_isolation
from tclora.library.identity import LocatedModel, ModelIdentity
from tclora.library.layout import Layout
from tclora.library.manifest import write_manifest
from tclora.library.records import Merge, Training
from tclora.merge import merge
from tclora.model.locate import BUILTIN_EMBEDDER, locate_embedder, model_digest
from tests.library.examples import describe
from tests.route.conftest import *  # noqa: F403
from tests.route.conftest import CLUSTERS, PROMPTS

TASKS = ("sums", "reversal", "logic")  # of the three clusters
RESPONSES = ("7", "elppa", "No")
WORDS = ("apple", "river", "stone", "cloud", "green", "seven")


@pytest.fixture(scope="session")
def walls():
    """Skip where the machine does not offer what a sandbox is made of, such as in a container."""
    try:
        check_isolation()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def trained(library, adapters, embedder, tiny_model_dir):
    """The library of `tests.route` with its adapters, clusters, joint LoRA, merge and manifest."""
    layout = Layout(library)
    for adapter in adapters:
        write_adapter(adapter, layout.adapter(adapter.name))
    write_adapter(adapters[1], layout.adapter("joint"))
    write_adapter(merge(adapters, "uniform").adapter, layout.merged("uniform"))
    prompts = [prompt for own in PROMPTS.values() for prompt in own]
    labels = np.repeat(np.arange(3), 3)
    pd.DataFrame(
        {"id": [str(i) for i in range(9)], "prompt": prompts, "split": "train", "cluster": labels,
         "task": np.repeat(TASKS, 3)}
    ).to_parquet(layout.clusters)  # fmt: skip
    save_file({"centroids": centroids(embed_prompts(embedder, prompts), labels)}, layout.centroids)
    located = LocatedModel(
        id="tiny", digest=model_digest(str(tiny_model_dir)), location=str(tiny_model_dir)
    )
    job = Training(rows=3, steps=1, supervised_tokens=9, final_loss=0.5, seconds=1.0)
    config = describe().config
    config["train"] |= {"template": "plain", "max_tokens": 64, "dtype": "float32"}
    description = describe().model_copy(
        update={
            "name": "small", "config": config, "base_model": located,
            "embedding_model": ModelIdentity(
                id=BUILTIN_EMBEDDER, digest=model_digest(locate_embedder(BUILTIN_EMBEDDER))
            ),
            "training": dict.fromkeys((*CLUSTERS, "joint"), job),
            "merges": {"uniform": Merge(rank=9, parameters=4, bytes=16, truncation_loss=0.0)},
        }
    )  # fmt: skip
    names = ("adapters", "merged", "routed", "clusters.parquet", "centroids.safetensors")
    write_manifest(library, description, names)
    return library


@pytest.fixture
def task_files(tmp_path):
    """Rows of the trained tasks in one file, multiple-choice rows of a new one in another."""
    rows = [
        {"prompt": f"{prompt} Please.", "response": response, "task": task}
        for (task, response), own in zip(
            zip(TASKS, RESPONSES, strict=True), PROMPTS.values(), strict=True
        )
        for prompt in own
    ]
    colours = [
        {"prompt": f"Which is red, number {i}?", "response": answer,
         "choices": ["rose", "sky", "a long leaf of grass"]}
        for i, answer in enumerate(["rose", "sky", "rose", "a long leaf of grass"])
    ]  # fmt: skip
    files = {}
    for name, lines in {"known": rows, "colours": colours}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


@pytest.fixture
def yaml_tasks(tmp_path):
    """A four-choice and a generative task as files, as lm-eval's users write them."""
    rows = [
        {"asked": f"{word} and {i}?", "options": ["a", "bb c", word, f"{word} {i}"], "right": i % 4,
         "text": word} for i, word in enumerate(WORDS * 3)
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "test", "num_fewshot": 0,
              "dataset_kwargs": {"data_files": {"test": str(data)}}}  # fmt: skip
    tasks = {
        "mine_choices": {
            "output_type": "multiple_choice", "doc_to_text": "Q: {{asked}}\nA:",
            "doc_to_choice": "{{options}}", "doc_to_target": "{{right}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "mine_texts": {
            "output_type": "generate_until", "doc_to_text": "Q: {{asked}}\nA:",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    files = []
    for name, task in tasks.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({"task": name} | shared | task))
    return [str(file) for file in files]
