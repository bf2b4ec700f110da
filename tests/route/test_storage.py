import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tclora.adapter import read_adapter
from tclora.errors import LibraryError
from tclora.files import sha256_file
from tclora.route import read_library, routers, write_library
from tests.merge.examples import assert_same_updates
from tests.route.conftest import CLUSTERS


def test_what_is_written_comes_back(library, gated, router):
    for path in (library, library / "routed"):
        found = read_library(path)
        assert found.gated.names == CLUSTERS
        assert found.info.clusters == CLUSTERS
        assert type(found.router) is type(router)
        ours, theirs = found.router.clusters, router.clusters
        assert (ours.centroids == theirs.centroids).all()
        assert (ours.thresholds == theirs.thresholds).all()
        assert (ours.temperature, ours.top_k) == (theirs.temperature, None)
        for module, gate in gated.gates.items():
            assert torch.equal(found.gated.gates[module], gate)
        assert_same_updates(found.gated.adapter, gated.adapter)


def rewritten(library, metadata):
    """Give the router's file other metadata, as another version or machine wrote it."""
    folder = library / "routed"
    arrays = load_file(folder / "router.safetensors")
    save_file(arrays, folder / "router.safetensors", metadata=metadata)
    info = json.loads((folder / "routed.json").read_text())
    info["digests"]["router.safetensors"] = sha256_file(folder / "router.safetensors")
    (folder / "routed.json").write_text(json.dumps(info))


def test_the_router_of_the_previous_version_is_read(library):
    settings = {"temperature": 0.25, "mode": "softmax", "top_k": 2}
    rewritten(library, {"settings": json.dumps(settings)})
    found = read_library(library).router
    assert type(found) is routers["softmax"]
    assert (found.clusters.temperature, found.clusters.top_k) == (0.25, 2)


def test_a_router_of_a_missing_plugin_names_its_module(library):
    rewritten(library, {"router": "oracle", "module": "my.oracle", "settings": "{}"})
    with pytest.raises(LibraryError, match=r"'oracle' is registered by module 'my\.oracle'.*\$TC"):
        read_library(library)
    with pytest.raises(LibraryError, match="must have stored temperature"):
        read_library(library, router="nearest")


def test_another_router_is_made_of_the_stored_one(library):
    assert type(read_library(library, router="per-token").router) is routers["per-token"]
    with pytest.raises(ValueError, match="got 'pertoken'; did you mean per-token"):
        read_library(library, router="pertoken")


def test_a_library_of_the_first_version_stored_ratios_to_the_static_merge(library, gated):
    ratios = {m: (g / gated.static(m)).float().contiguous() for m, g in gated.gates.items()}
    older(library, ratios, gated.names, 1)
    found = read_library(library).gated
    for name in gated.names:
        assert_same_updates(found.cluster(name), gated.cluster(name), 1e-5)


def older(library, gates, names, version):
    """Give a library the gates of an earlier version."""
    file = library / "routed" / "gates.safetensors"
    save_file(gates, file, metadata={"names": json.dumps(names)})
    info = library / "routed" / "routed.json"
    values = json.loads(info.read_text()) | {"schema_version": version}
    values["digests"]["gates.safetensors"] = sha256_file(file)
    info.write_text(json.dumps(values))


def test_the_fallback_gate_comes_back(library, gated, router, tmp_path):
    generator = torch.Generator().manual_seed(0)
    fallback = {m: torch.randn(g.shape[1], generator=generator) for m, g in gated.gates.items()}
    given = replace(gated, fallback=fallback)
    write_library(tmp_path / "other", given, router, read_library(library).info)
    found = read_library(tmp_path / "other").gated
    for module in gated.gates:
        assert torch.equal(found.elsewhere(module).float(), fallback[module])
        assert torch.equal(found.gates[module], gated.gates[module])


def test_a_library_of_the_second_version_falls_back_to_the_static_merge(library, gated):
    older(library, {m: g.contiguous() for m, g in gated.gates.items()}, gated.names, 2)
    found = read_library(library).gated
    for module in gated.gates:
        assert torch.equal(found.gates[module], gated.gates[module])
        assert torch.allclose(found.elsewhere(module), gated.static(module), rtol=1e-5)


def test_stock_peft_loads_the_static_merge(library, gated, tiny_model):
    model = PeftModel.from_pretrained(tiny_model, library / "routed").eval()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == len(gated.gates)
    for name, layer in layers.items():
        delta = gated.adapter.modules[name.removeprefix("base_model.model.")].delta()
        assert torch.allclose(layer.get_delta_weight("default"), delta, atol=1e-5)


def test_a_cluster_and_a_mixture_become_plain_adapters(library, gated, tmp_path):
    found = read_library(library)
    one = found.to_peft(tmp_path / "one", "cluster-1")
    assert_same_updates(read_adapter(one), gated.cluster("cluster-1"))
    assert_same_updates(read_adapter(found.to_peft(tmp_path / "n", 1)), gated.cluster(1))
    mixed = found.to_peft(tmp_path / "mixed", weights={"cluster-0": 0.3, "cluster-2": 0.7})
    assert_same_updates(read_adapter(mixed), gated.mixed([0.3, 0, 0.7]))
    half = found.to_peft(tmp_path / "half", share=0.5)
    assert_same_updates(read_adapter(half), gated.blended(0.5).adapter)
    with pytest.raises(ValueError, match="exactly one of cluster, weights and share"):
        found.to_peft(tmp_path / "none")
    with pytest.raises(ValueError, match=r"weights must name clusters of .* got cooking"):
        found.to_peft(tmp_path / "none", weights={"cooking": 1.0})
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name",
    ["router.safetensors", "gates.safetensors", "adapter_model.safetensors", "adapter_config.json"],
)
def test_a_missing_or_corrupt_file_is_named(library, name):
    file = library / "routed" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + b"xyz")
    with pytest.raises(LibraryError, match=rf"{name} is corrupt or was changed"):
        read_library(library)
    file.unlink()
    with pytest.raises(LibraryError, match=rf"{name} is missing"):
        read_library(library)


def test_a_folder_without_a_routed_library_is_named(library, tmp_path):
    with pytest.raises(LibraryError, match="holds no routed library"):
        read_library(tmp_path)
    file = library / "routed" / "routed.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"schema_version": 4}))
    with pytest.raises(LibraryError, match="schema_version must be one of 1, 2, 3, got 4"):
        read_library(library)
    file.write_text("{")
    with pytest.raises(LibraryError, match=r"routed\.json cannot be read"):
        read_library(library)
