"""Work-pool templates: rendered as their workers would, and held against what they are made for."""

import asyncio
import json
from pathlib import Path

import jsonschema
import pytest

pytestmark = pytest.mark.usefixtures("prefect_server")  # workers ask it for blocks
POOLS = Path(__file__).parents[2] / "deployments" / "pools"
TEMPLATES = sorted(POOLS.glob("*.json"))


def template(kind):
    return json.loads((POOLS / f"{kind}.json").read_text())


def rendered(configuration, kind, **values):
    return asyncio.run(configuration.from_template_and_values(template(kind), values))


def test_there_is_one_for_each_kind():
    assert [path.stem for path in TEMPLATES] == ["docker", "kubernetes", "process"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_variables_are_a_valid_schema_and_each_is_used(path):
    found = json.loads(path.read_text())
    schema = found["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    defaults = {n: v["default"] for n, v in schema["properties"].items() if "default" in v}
    jsonschema.validate({n: v for n, v in defaults.items() if v is not None}, schema)
    text = json.dumps(found["job_configuration"])
    assert [n for n in schema["properties"] if f"{{{{ {n} }}}}" not in text] == []
    assert schema["properties"]["env"]["default"]["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_process_job():
    from prefect.workers.process import ProcessJobConfiguration

    job = rendered(ProcessJobConfiguration, "process", env={"A": "b"})
    assert job.env["A"] == "b"


def test_a_docker_job_gets_its_gpu_and_no_rights():
    from docker.types import HostConfig
    from prefect_docker.worker import DockerWorkerJobConfiguration

    job = rendered(DockerWorkerJobConfiguration, "docker", gpu_ids=["3"], shm_size="16g")
    options = job.container_create_kwargs
    assert options["device_requests"] == [{"device_ids": ["3"], "capabilities": [["gpu"]]}]
    assert job.image == "tclora:latest"
    host = {name: value for name, value in options.items() if name != "user"}
    made = HostConfig(version="1.45", **host)  # the engine's own names and types
    assert made["ShmSize"] == 16 * 2**30
    assert made["CapDrop"] == ["ALL"]
    assert options["user"] == "1000:1000"


def test_a_kubernetes_job_is_one_by_the_api_and_asks_for_what_is_wanted():
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    job = rendered(
        KubernetesWorkerJobConfiguration,
        "kubernetes",
        gpu_count=2,
        node_selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        env_from=[{"secretRef": {"name": "tclora-store"}}],
        memory_request="8Gi",
    )
    # What the worker adds before it sends the job.
    manifest = job.job_manifest
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container["resources"]["requests"] == {"memory": "8Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "tclora-store"}}]
    assert pod["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"]
    container["env"] = [{"name": name, "value": value} for name, value in job.env.items()]
    container["command"] = ["prefect", "flow-run", "execute"]
    assert list(strange(manifest, "V1Job")) == []
    pod["nodeselector"] = {}
    container["resources"]["limits"] = "all"
    assert len(list(strange(manifest, "V1Job"))) == 2


def strange(value, kind, place="job"):
    """Yield what the Kubernetes API's schema, as its client has it, does not know of a manifest."""
    from kubernetes_asyncio.client import models

    if value is None:
        return
    if kind.startswith("list["):
        if not isinstance(value, list):
            yield f"{place} must be a list"
            return
        for number, item in enumerate(value):
            yield from strange(item, kind[5:-1], f"{place}[{number}]")
    elif kind.startswith("dict("):
        if not isinstance(value, dict):
            yield f"{place} must be a mapping"
    elif hasattr(models, kind):
        model = getattr(models, kind)
        known = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
        for name, item in value.items():
            if name not in known:
                yield f"{place} has no {name}"
            else:
                yield from strange(item, known[name], f"{place}.{name}")
    elif kind in {"str", "int", "bool"}:
        wanted = {"str": str, "int": int, "bool": bool}[kind]
        if not isinstance(value, wanted):
            yield f"{place} must be {kind}, got {value!r}"
