import json

import pytest
import torch
from peft import PeftModel

from tclora.adapter import read_adapter
from tclora.errors import LibraryError
from tclora.route import read_library
from tests.merge.examples import assert_same_updates
from tests.route.conftest import CLUSTERS


def test_what_is_written_comes_back(library, gated, router):
    for path in (library, library / "routed"):
        found = read_library(path)
        assert found.gated.names == CLUSTERS
        assert found.info.clusters == CLUSTERS
        assert (found.router.centroids == router.centroids).all()
        assert (found.router.thresholds == router.thresholds).all()
        assert (found.router.temperature, found.router.mode, found.router.top_k) == (
            router.temperature, "nearest", None,
        )  # fmt: skip
        for module, gate in gated.gates.items():
            assert torch.equal(found.gated.gates[module], gate)
        assert_same_updates(found.gated.adapter, gated.adapter)


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
    with pytest.raises(ValueError, match="exactly one of cluster and weights"):
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
    file.write_text(json.dumps(values | {"schema_version": 2}))
    with pytest.raises(LibraryError, match="schema_version must be 1, got 2"):
        read_library(library)
    file.write_text("{")
    with pytest.raises(LibraryError, match=r"routed\.json cannot be read"):
        read_library(library)
