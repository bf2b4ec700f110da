import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from tclora.library.contents import read_contents
from tclora.report import write_report
from tclora.report.examples import MAX_TASKS
from tclora.report.render import render
from tests.report.frames import SCRIPT
from tests.report.library import build_library, edit_manifest, seal

MAX_BYTES = 3_000_000
N_FIGURES = 11
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Elements(HTMLParser):
    """Collects start tags and checks that every element is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(library):
    """Return the report of what is there, without its figures, which take most of the time."""
    seal(library)
    return render(read_contents(library), {})


def test_a_library_of_the_first_version_shows_no_interval_of_the_worst_cluster(library):
    path = library / "evaluation/recovery.parquet"
    first = pd.read_parquet(path).drop(columns="n")
    first.loc[first["cluster"] == "worst", ["low", "high"]] = [0.1234, 0.5678]
    first.to_parquet(path)
    page = written(library)
    assert "[12, 57]" not in page
    assert "worst cluster: " in page


def test_report_is_one_small_file_with_every_figure(page):
    assert len(page.encode()) < MAX_BYTES
    assert page.count("<svg") == N_FIGURES


def test_report_loads_nothing_from_elsewhere(page):
    for tag, attributes in Elements(page).found:
        assert tag not in {"link", "iframe", "img", "object", "embed"}
        assert "src" not in attributes
        if tag != "a":
            targets = (attributes.get("href"), attributes.get("xlink:href"))
            assert all(target is None or target.startswith("#") for target in targets)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_texts_of_users_are_escaped(page):
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(" in page
    assert "<b>bold" not in page
    assert "<i>units" not in page
    assert "<title>demo &lt;run&gt;" in page
    assert sum(tag == "script" for tag, _ in Elements(page).found) == 1


def test_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in Elements(page).found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_same_library_gives_the_same_bytes(library, page):
    path = write_report(library)
    assert path == library / "report.html"
    assert path.read_text(encoding="utf-8") == page


def test_verdict_names_the_best_merge_and_what_own_adapters_gain(page):
    assert re.search(r"tc-lora \(rank 16\), the best of 5 methods, recovers 94 % \[89, 98\]", page)
    assert re.search(r"One LoRA trained on all rows recovers \d+ % \[", page)
    assert "Own adapters lower the in-domain NLL from" in page


def test_verdict_names_the_primary_merge_where_another_is_better(library):
    path = library / "evaluation/recovery.parquet"
    rows = pd.read_parquet(path)
    rows.loc[rows["method"] == "uniform", "recovery"] = 0.99
    rows.to_parquet(path)
    page = written(library)
    assert "uniform (rank 16), the best of 5 methods, recovers 99 %" in page
    assert "The primary merge, tc-lora, recovers" in page


def test_verdict_says_when_own_adapters_do_not_help(library):
    path = library / "evaluation/summary.parquet"
    rows = pd.read_parquet(path)
    rows.loc[rows["method"] == "own", "nll"] = 9.0
    rows.to_parquet(path)
    assert "Own adapters do not lower the in-domain NLL" in written(library)


def test_best_merge_of_a_column_is_marked_and_references_never_are(page):
    tables = page.split("Negative log-likelihood")[1].split("</table>")[0]
    references, merges = tables.split('<tbody class="merges">')
    assert 'class="number best"' not in references
    n_columns = tables.count('<th scope="col">') - 1
    assert merges.count('class="number best"') == n_columns


def test_failed_jobs_are_shown_with_their_error(page):
    alert = page.split('role="alert"')[1].split("</div>")[0]
    assert "cluster-5 failed" in alert
    assert "loss became NaN at step 12 &lt;in batch 3&gt;" in alert


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("recovery", "Left out. Recovery was not measured."),
        ("items", "Left out: no answers were generated"),
        ("summary", "Left out: no test rows were evaluated"),
    ],
)
def test_missing_evaluation_leaves_its_section_out(library, file, reason):
    (library / f"evaluation/{file}.parquet").unlink()
    assert reason in written(library)


@pytest.mark.parametrize("split", ["test", "ood", "composition"])
def test_missing_split_leaves_its_tables_out(library, split):
    for name in ("clusters", "evaluation/items", "evaluation/summary"):
        path = library / f"{name}.parquet"
        rows = pd.read_parquet(path)
        rows[rows["split"] != split].to_parquet(path)
    assert f"Left out: no {split} rows were evaluated" in written(library)


def test_rows_without_tasks_are_reported_by_cluster(tmp_path):
    page = written(build_library(tmp_path, labelled=False))
    assert "the data has no task labels" in page
    assert ">cluster 3<" in page


def test_bare_library_is_reported(library):
    for file in [*(library / "evaluation").iterdir(), *(library / "training").iterdir()]:
        file.unlink()
    edit_manifest(library, merges={}, storage={}, training={}, versions={}, profile={})
    seal(library)
    page = write_report(library).read_text(encoding="utf-8")
    assert page.count("<svg") == 7
    assert "Recovery was not measured" in page
    assert "Loss curves are left out" in page


def test_undefined_recovery_is_told_from_an_unmeasured_one(library):
    path = library / "evaluation/recovery.parquet"
    pd.read_parquet(path).assign(recovery=float("nan")).to_parquet(path)
    assert "Recovery is undefined" in written(library)


def test_long_lists_of_tasks_show_the_first_examples(library):
    path = library / "evaluation/items.parquet"
    rows = pd.read_parquet(path)
    names = [f"task {number:03d}" for number in range(MAX_TASKS + 1)]
    pd.concat([rows.assign(task=name) for name in names]).to_parquet(path)
    page = written(library)
    assert f">{names[-2]} <" in page
    assert f">{names[-1]} <" not in page


def test_items_without_answer_or_score_are_shown(library):
    path = library / "evaluation/items.parquet"
    pd.read_parquet(path).assign(answer=None, correct=float("nan")).to_parquet(path)
    assert "✓" not in written(library)


def test_lm_eval_results_are_listed(library):
    row = {"method": "tc-lora", "task": "arc<easy>", "metric": "acc", "value": 0.5, "stderr": 0.01}
    pd.DataFrame([row]).to_parquet(library / "evaluation/lm_eval.parquet")
    assert "arc&lt;easy&gt;" in written(library)


def test_the_routing_of_every_task_is_shown(library):
    page = write_report(library).read_text()
    section = page[page.index('<section id="routing">') : page.index('<section id="results">')]
    assert "98.7 %" in section  # routing accuracy
    assert "17.3 %" in section  # bytes
    assert "80 to 90 %</th><td>12</td><td>87.0</td><td>75.0</td>" in section  # calibration
    assert section.count('<tr><th scope="row">') == 9 + 2  # tasks, bins of the calibration
    row = re.search(r"riddles \(OOD\)</th>(.*?)</tr>", section)[1]
    assert row.endswith('--share:1.000">100</td>')  # all of it to the static merge


def test_the_router_is_named_and_gates_by_token_are_told(library):
    page = write_report(library).read_text()
    assert "Router: nearest." in page
    assert "Every token chooses" not in page
    manifest = json.loads((library / "library.json").read_text())
    edit_manifest(library, routed=manifest["routed"] | {"router": "mine", "by_token": True})
    page = write_report(library).read_text()
    assert "Router: mine." in page
    assert "Every token chooses its gate" in page
    del manifest["routed"]["router"]  # as version 0.1.0 wrote it
    edit_manifest(library, routed=manifest["routed"] | {"mode": "softmax"})
    assert "Router: softmax." in write_report(library).read_text()


def test_a_library_without_router_says_so(library):
    edit_manifest(library, routed=None)
    (library / "routing.parquet").unlink()
    seal(library)
    assert "the library has no router" in write_report(library).read_text()


def test_ties_with_the_best_merge_are_marked_and_told(library):
    place = library / "evaluation/winners.parquet"
    rows = pd.read_parquet(place)
    mean = (rows["metric"] == "recovery") & (rows["group"] == "mean")
    rows["tie"] = mean & (rows["method"] == "regmean")
    rows.to_parquet(place)
    page = written(library)
    assert page.count("number tied") == 1
    assert "It is not told apart from regmean by these items." in page
    rows.assign(tie=False).to_parquet(place)
    page = written(library)
    assert "number tied" not in page
    assert "not told apart from regmean" not in page


def test_choices_have_a_table_of_their_own(library):
    assert "log-likelihood per character" not in written(library)
    path = library / "evaluation/summary.parquet"
    summary = pd.read_parquet(path)
    chosen = summary["group"] == "arithmetic"
    for end in ("", "_low", "_high"):
        summary[f"accuracy_norm{end}"] = summary[f"accuracy{end}"].where(chosen)
    assert summary["accuracy_norm"].notna().any()
    summary.to_parquet(path)
    assert "Accuracy of choices by log-likelihood per character (%)" in written(library)
