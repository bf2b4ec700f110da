"""lm-eval's tasks through our engine, with lm-eval's own model as the referee."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

pytest.importorskip("lm_eval")

from tclora.config import LmEvalConfig, MeasureConfig
from tclora.errors import ConfigError
from tclora.evaluate.evaluation import Plan, Results, evaluate_target
from tclora.evaluate.lm_eval import run_lm_eval
from tclora.evaluate.lm_eval_tasks import check_lm_eval
from tclora.evaluate.targets import BaseChoice, open_target
from tclora.library.layout import Layout


def referee(model, tokenizer, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=tasks,
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    samples = [s for name in sorted(found["samples"]) for s in found["samples"][name]]
    return found["results"], samples


def test_choices_and_texts_equal_lm_evals_to_the_item(tiny_model, tokenizer, yaml_tasks):
    figures, samples = referee(tiny_model, tokenizer, yaml_tasks)
    found = run_lm_eval(tiny_model, tokenizer, yaml_tasks, token_budget=150)
    items = found.items.sort_values("task", kind="stable").to_dict("records")
    assert len(items) == len(samples) == 36
    for item, sample in zip(items, samples, strict=True):
        assert item["prompt"] == sample["arguments"][0][0]
        if item["task"] == "mine_choices":
            wanted = [float(resps[0][0]) for resps in sample["resps"]]
            assert item["logprobs"] == pytest.approx(wanted, abs=1e-3)
            assert (item["correct"], item["correct_norm"]) == (sample["acc"], sample["acc_norm"])
        else:
            assert item["generated"] == sample["filtered_resps"][0]
            assert item["correct"] == sample["exact_match"]
    assert {item["correct"] for item in items} == {0.0, 1.0}
    assert any("e" in item["generated"] or item["generated"] for item in items[18:])
    mine = found.figures.set_index(["task", "metric"])["value"]
    assert mine["mine_choices", "acc"] == figures["mine_choices"]["acc,none"]
    assert mine["mine_choices", "acc_norm"] == figures["mine_choices"]["acc_norm,none"]


def test_a_routed_library_is_measured_by_route(trained, yaml_tasks, tmp_path, tiny_model_dir):
    """Every context by its own route: what the oracle gives for one cluster, its adapter gives."""
    results = Results(tmp_path / "results")
    target = open_target(str(trained), results.embeddings)
    named = LmEvalConfig(lm_eval=tuple(yaml_tasks), lm_eval_limit=6)
    config = MeasureConfig(token_budget=150)
    plan = Plan(target.choose(["base", "own", "routed", "oracle"]), {}, named, config, "here")
    items = evaluate_target(target, plan, results)
    assert items.groupby("method").size().to_dict() == {"base": 12, "routed": 12, "oracle": 12}
    asked = items[items["method"] == "oracle"].drop_duplicates("prompt")
    nearest = target.places.nearest(asked)
    choice = BaseChoice(str(tiny_model_dir), "plain", "float32")
    for number in set(nearest):
        alone = open_target(str(trained / "adapters" / f"cluster-{number}"), tmp_path, choice)
        plan = Plan(alone.choose([f"cluster-{number}"]), {}, named, config, "here")
        wanted = evaluate_target(alone, plan, results).set_index("id")
        mine = items[items["method"] == "oracle"].set_index("id")
        chosen = [
            i for i, p in mine["prompt"].items() if p in set(asked["prompt"][nearest == number])
        ]
        logprobs = [np.array(frame["logprobs"][i]) for i in chosen if "choices" in i
                    for frame in (mine, wanted)]  # fmt: skip
        for one, two in zip(logprobs[::2], logprobs[1::2], strict=True):
            assert one == pytest.approx(two, rel=1e-3)
        for i in chosen:
            assert mine["generated"][i] == wanted["generated"][i] or pd.isna(wanted["generated"][i])


def test_a_task_is_in_domain_where_the_library_was_trained_on_it(
    trained, yaml_tasks, tmp_path, tiny_model_dir
):
    named = LmEvalConfig(lm_eval=tuple(yaml_tasks), lm_eval_limit=2)
    config, results = MeasureConfig(token_budget=150), Results(tmp_path / "results")

    def splits(spec):
        target = open_target(str(spec), tmp_path, BaseChoice(None, "plain", "float32"))
        plan = Plan(target.choose(["base"]), {}, named, config, "here")
        events = []
        items = evaluate_target(target, plan, results, events.append)
        return items.groupby("task")["split"].unique().map(list).to_dict(), events

    assert splits(trained)[0] == {"mine_choices": ["ood"], "mine_texts": ["ood"]}
    rows = pd.read_parquet(Layout(trained).clusters)
    rows.assign(task=rows["task"].replace("sums", "mine_choices")).to_parquet(
        Layout(trained).clusters
    )
    found, events = splits(trained)
    assert found == {"mine_choices": ["test"], "mine_texts": ["ood"]}
    assert all(event.get("kept") for event in events)
    assert splits(tiny_model_dir)[0] == {"mine_choices": ["ood"], "mine_texts": ["ood"]}


def test_limits_and_rows_to_show_are_those_asked_for(yaml_tasks, tmp_path, tiny_model_dir):
    file = Path(yaml_tasks[0])
    task = yaml.safe_load(file.read_text())
    del task["num_fewshot"]
    file.write_text(yaml.safe_dump(task))
    target = open_target(str(tiny_model_dir), tmp_path)
    named = LmEvalConfig(lm_eval=tuple(yaml_tasks), lm_eval_limit=3)
    results, methods = Results(tmp_path / "results"), target.choose([])

    def measured(**options):
        plan = Plan(methods, {}, named, MeasureConfig(), "here", **options)
        items = evaluate_target(target, plan, results)
        shown = items["prompt"].str.count("Q: ").groupby(items["task"]).max() - 1
        return items.groupby("task").size().to_dict(), shown.to_dict()

    assert measured() == (
        {"mine_choices": 3, "mine_texts": 3},
        {"mine_choices": 0, "mine_texts": 0},
    )
    sizes, _ = measured(lm_eval_limits={yaml_tasks[1]: 2})
    assert sizes == {"mine_choices": 3, "mine_texts": 2}
    _, shown = measured(lm_eval_few_shot=2)
    assert shown == {"mine_choices": 2, "mine_texts": 0}


@pytest.mark.parametrize("change", ["nothing", "file", "included", "function", "version"])
def test_a_changed_task_file_or_lm_eval_is_measured_anew(
    yaml_tasks, tmp_path, tiny_model_dir, monkeypatch, change
):
    target = open_target(str(tiny_model_dir), tmp_path)
    results = Results(tmp_path / "results")
    whole = Path(yaml_tasks[0])
    texts = {
        "file": (whole.with_name("mine.yaml"), f"include: {whole.name}\ndescription: 'Do! '\n"
                 "process_docs: !function utils.kept\n"),
        "included": (whole, whole.read_text()),
        "function": (whole.with_name("utils.py"), "def kept(docs):\n    return docs\n"),
    }  # fmt: skip
    for file, text in texts.values():
        file.write_text(text)
    named = LmEvalConfig(lm_eval=(str(texts["file"][0]),), lm_eval_limit=2)
    plan = Plan(target.choose([]), {}, named, MeasureConfig(), "here")
    evaluate_target(target, plan, results)
    if change in texts:
        file, text = texts[change]
        changed = text.replace("Do!", "Act!").replace("Q: ", "Ask: ")
        file.write_text(changed.replace("return docs", "return docs.select([3, 2, 1])"))
    elif change == "version":
        monkeypatch.setattr("tclora.evaluate.evaluation.version", lambda _: "0")
    events = []
    items = evaluate_target(target, plan, results, events.append)
    assert [bool(event.get("kept")) for event in events] == [change == "nothing"]
    start = {"file": "Act! Q: apple", "included": "Do! Ask: apple", "function": "Do! Q: cloud"}
    assert items["prompt"][0].startswith(start.get(change, "Do! Q: apple"))


def test_what_lm_eval_does_not_know_is_refused(yaml_tasks):
    check_lm_eval(yaml_tasks)
    (found,) = check_lm_eval(["arc_easy"])["arc_easy"]
    assert found["output_type"] == "multiple_choice"
    tagged = check_lm_eval(["ai2_arc"])["ai2_arc"]
    assert [part["task"] for part in tagged] == ["arc_challenge", "arc_easy"]
    assert len(check_lm_eval(["mmlu"])["mmlu"]) == 57
    with pytest.raises(ConfigError, match="or one of lm-eval's, got 'arc_eazy'; did you mean arc_"):
        check_lm_eval(["arc_eazy"])


def test_perplexity_of_texts_is_refused_by_name(yaml_tasks, tmp_path, tiny_model, tokenizer):
    with pytest.raises(ConfigError, match="task 'wikitext' measures the perplexity of whole texts"):
        check_lm_eval(["wikitext"])
    rolling = yaml.safe_load(Path(yaml_tasks[0]).read_text()) | {
        "task": "mine_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{asked}}", "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    file = tmp_path / "rolling.yaml"
    file.write_text(yaml.safe_dump(rolling))
    group = tmp_path / "group.yaml"
    group.write_text(yaml.safe_dump({"group": "mine", "task": [rolling]}))
    for named in (file, group):
        with pytest.raises(ConfigError, match="perplexity"):
            check_lm_eval([str(named)])
    with pytest.raises(ConfigError, match="task 'mine_rolling' measures the perplexity"):
        run_lm_eval(tiny_model, tokenizer, [str(file)])
