import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from tclora.library.contents import read_contents
from tclora.report import figures, write_report
from tclora.report.interference import conflict_by_layer, correlations, shared_facts
from tclora.tensor.interference import MEASURES
from tests.report.library import K, seal


def change(library, name, edit):
    path = library / f"{name}.parquet"
    edit(pd.read_parquet(path)).to_parquet(path)
    seal(library)


def section(page):
    return re.search(r'<section id="interference">.*?</section>', page, re.DOTALL)


def test_correlations_are_spearmans_over_clusters(finished):
    contents = read_contents(finished)
    recovery = contents.recovery.query("method == 'tc-lora'").set_index("cluster")["recovery"]
    pairs = contents.interference
    for found, measure in zip(correlations(contents), MEASURES, strict=True):
        means = [
            pairs[(pairs["first"] == name) | (pairs["second"] == name)][measure].mean()
            for name in (f"cluster-{k}" for k in range(K))
        ]
        own = [recovery[str(k)] for k in range(K)]
        assert found.rho == pytest.approx(spearmanr(means, own).statistic)
        assert found.mean == pytest.approx(pairs[measure].mean())
        assert found.n == K


def test_a_cluster_without_recovery_does_not_enter_the_correlation(library):
    change(
        library,
        "evaluation/recovery",
        lambda rows: rows.assign(recovery=rows["recovery"].mask(rows["cluster"] == "2")),
    )
    assert {found.n for found in correlations(read_contents(library))} == {K - 1}


def test_correlation_is_not_defined_without_recovery(library):
    (library / "evaluation/recovery.parquet").unlink()
    seal(library)
    found = correlations(read_contents(library))
    assert {one.n for one in found} == {0}
    assert all(np.isnan(one.rho) for one in found)
    assert section(write_report(library).read_text(encoding="utf-8"))


def test_correlation_of_equal_ranks_is_not_defined(library):
    change(library, "interference", lambda pairs: pairs.assign(cosine=0.5))
    cosine, *others = correlations(read_contents(library))
    assert np.isnan(cosine.rho)
    assert not any(np.isnan(one.rho) for one in others)


def test_the_section_states_every_measure_and_the_number_of_clusters(page):
    rows = re.findall(r'<tr><th scope="row">.*?</tr>', section(page)[0])
    assert 'href="#interference"' in page
    assert len(rows) == len(MEASURES)
    assert all(f"<td>{K}</td>" in row for row in rows)


def test_the_map_has_a_cell_for_every_two_clusters(finished):
    (axes,) = figures(finished)["interference"].axes
    assert len(axes.patches) == len(axes.texts) == K * (K - 1)


def test_shared_energy_is_drawn_by_layer(finished):
    shared = read_contents(finished).shared_structure
    (axes,) = figures(finished)["shared_energy"].axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [0, 1, 2, 3]
    first = shared.iloc[:2]
    assert line.get_ydata()[0] == pytest.approx(
        np.average(first["shared"], weights=first["energy"])
    )


def test_facts_tell_what_is_shared_and_how_unique_components_are(library):
    contents = read_contents(library)
    facts = {fact.name: fact.value for fact in shared_facts(contents)}
    shared = contents.shared_structure
    mean = np.average(shared["shared"], weights=shared["energy"])
    assert facts["shared energy"] == f"{100 * mean:.1f} %"
    assert facts["core consistency"] == "99 %"
    change(library, "shared_structure", lambda rows: rows.assign(core_consistency=np.nan))
    facts = {fact.name: fact.value for fact in shared_facts(read_contents(library))}
    assert facts["core consistency"] == "not defined"


def test_a_library_without_these_tables_has_no_such_section(library):
    for name in ("interference", "interference_modules", "shared_structure"):
        (library / f"{name}.parquet").unlink()
    seal(library)
    page = write_report(library).read_text(encoding="utf-8")
    assert section(page) is None
    assert 'href="#interference"' not in page


def test_the_map_of_layers_is_the_weighted_mean_over_pairs(library):
    modules = read_contents(library).module_interference
    table = conflict_by_layer(modules)
    assert list(table.index) == ["q", "up"]
    assert list(table.columns) == [0, 1, 2, 3]
    part = modules[modules["module"] == "model.layers.2.up"]
    wanted = np.average(part["sign_conflict"], weights=part["weight"])
    assert table.loc["up", 2] == pytest.approx(wanted)


def test_the_harm_is_drawn_and_foretold(library):
    drawn = figures(library)
    contents = read_contents(library)
    (axes,) = drawn["harm"].axes
    added = contents.cross[contents.cross["added"].eq(True)]
    assert len([text for text in axes.texts if text.get_text()]) == K * (K - 1) == len(added)
    apart = (added["change_low"] > 0) | (added["change_high"] < 0)
    assert len([text for text in axes.texts if text.get_weight() == "bold"]) == apart.sum() > 0
    found = {one.measure: one.harm for one in correlations(contents)}
    stored = contents.harm.set_index("measure")
    assert found["cosine of the updates"].rho == stored.loc["cosine", "rho"]
    assert {harm.n for harm in found.values()} == {K * (K - 1)}
    page = section(write_report(library).read_text(encoding="utf-8"))[0]
    assert "40 rows per cluster" in page
    assert "correlation with harm" in page


def test_a_library_whose_cross_table_is_of_an_earlier_version_opens(library):
    path = library / "evaluation/cross.parquet"
    pd.read_parquet(path)[["cluster", "adapter", "n", "nll"]].to_parquet(path)
    (library / "evaluation/harm.parquet").unlink()
    seal(library)
    assert "harm" not in figures(library)
    page = section(write_report(library).read_text(encoding="utf-8"))[0]
    assert "correlation with harm" not in page
