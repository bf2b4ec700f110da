import re

import pandas as pd
import pytest
from scipy.stats import spearmanr

from tclora.library.contents import read_contents
from tclora.report import figures
from tclora.report.render import render
from tclora.report.structure import interference_correlations, structure_facts
from tests.report.library import K, seal


def section(library):
    page = render(read_contents(library), {})
    return re.search(r'<section id="structure">.*?</section>', page, re.DOTALL)


def change(library, name, edit):
    path = library / f"{name}.parquet"
    edit(pd.read_parquet(path)).to_parquet(path)
    seal(library)


def test_correlations_are_spearmans_over_clusters(finished):
    contents = read_contents(finished)
    recovery = contents.recovery.query("method == 'tc-lora'").set_index("cluster")["recovery"]
    found = interference_correlations(contents)
    assert [one.n for one in found] == [K] * 4
    measures = ["cosine", "input_overlap", "output_overlap", "sign_conflict"]
    for one, measure in zip(found, measures, strict=True):
        means = [
            contents.pairs.query("first == @name or second == @name")[measure].mean()
            for name in (f"cluster-{k}" for k in range(K))
        ]
        own = [recovery[str(k)] for k in range(K)]
        assert one.rho == pytest.approx(spearmanr(means, own).statistic)


def test_a_cluster_without_recovery_is_left_out_of_the_correlation(library):
    change(
        library,
        "evaluation/recovery",
        lambda rows: rows.assign(recovery=rows["recovery"].mask(rows["cluster"] == "2")),
    )
    assert {one.n for one in interference_correlations(read_contents(library))} == {K - 1}


def test_correlations_need_recovery(library):
    (library / "evaluation/recovery.parquet").unlink()
    seal(library)
    contents = read_contents(library)
    assert interference_correlations(contents) == []
    drawn = {"interference": figures(library)["interference"]}
    assert "not set against recovery" in render(contents, drawn)


def test_ranks_that_are_all_alike_do_not_correlate(library):
    change(library, "diagnostics/pairs", lambda pairs: pairs.assign(cosine=0.5))
    assert len(interference_correlations(read_contents(library))) == 3


def test_the_section_states_the_number_of_clusters_and_every_measure(finished):
    text = section(finished)[0]
    assert f"n = {K} clusters" in text
    assert text.count('<tr><th scope="row">') == 4


def test_facts_tell_what_is_shared_and_how_unique_components_are(finished):
    facts = {fact.name: fact for fact in structure_facts(read_contents(finished))}
    components = read_contents(finished).components
    energy = components["energy"] / components["energy"].sum()
    assert facts["shared energy"].value == f"{100 * (components['shared'] * energy).sum():.1f} %"
    assert facts["core consistency"].value == "99 %"
    assert facts["core consistency"].note == "median module, at rank 6"
    assert facts["not trilinear"].value == "2"
    assert facts["not trilinear"].note == "of 8 modules below 50 %"


def test_energy_is_drawn_by_layer_and_adds_up(finished):
    (axes,) = figures(finished)["shared_energy"].axes
    shared, own = axes.containers
    assert len(shared) == len(own) == 5  # four layers, and the head
    total = sum(bar.get_height() for bar in [*shared, *own])
    assert total == pytest.approx(1)
    labels = [axes.xaxis.get_major_formatter()(place, None) for place in (0, 1, 4, 5, 0.5)]
    assert labels == ["other", "0", "3", "", ""]


def test_every_measure_has_a_map_and_red_is_negative(library):
    change(library, "diagnostics/pairs", lambda pairs: pairs.assign(cosine=-0.25))
    maps = figures(library)["interference"].axes
    assert [len(axes.patches) for axes in maps] == [K * (K - 1)] * 4
    cosine, others = maps[0], maps[1:]
    (colour,) = {patch.get_facecolor()[:3] for patch in cosine.patches}
    assert colour not in {patch.get_facecolor()[:3] for axes in others for patch in axes.patches}
    assert {text.get_text() for text in cosine.texts} == {"\N{MINUS SIGN}.25"}


def test_many_clusters_are_drawn_without_numbers(library):
    def more(pairs):
        named = [f"cluster-{k}" for k in range(20)]
        rows = [(a, b, 0.1, 0.2, 0.3, 0.4) for i, a in enumerate(named) for b in named[i + 1 :]]
        return pd.DataFrame(rows, columns=pairs.columns)

    change(library, "diagnostics/pairs", more)
    axes = figures(library)["interference"].axes[0]
    assert len(axes.patches) == 380
    assert not axes.texts


def test_a_library_without_diagnostics_has_no_such_section(library):
    for table in (library / "diagnostics").iterdir():
        table.unlink()
    seal(library)
    assert section(library) is None
    assert 'href="#structure"' not in render(read_contents(library), {})
