"""Back ends whose package is missing, whose cluster does not answer; stores that are closed."""

import socket
import sys

import pytest

from tclora.config import load_config
from tclora.preflight import execution
from tclora.preflight.execution import execution_problems

PACKAGES = {"ray": "ray", "dask": "distributed"}
backends = pytest.mark.parametrize("backend", PACKAGES)


def config(backend, **execution):
    settings = {"execution": {"backend": backend, **execution}, "train": {"dtype": "float32"}}
    return load_config(settings)


@backends
def test_a_missing_package_is_named_with_its_extra(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[backend], None)  # as if it were not installed
    assert execution_problems(config(backend)) == [
        f"execution.backend: {backend!r} needs {PACKAGES[backend]}: pip install tclora[{backend}]"
    ]


@backends
def test_an_address_where_nobody_answers_is_named(backend):
    def problems(address):
        found = execution_problems(config(backend, **{f"{backend}_address": address}))
        return [problem for problem in found if "address" in problem]

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # it does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (problem,) = problems(address)
        assert problem.startswith(
            f"execution.{backend}_address must be reachable from here, got {address!r} ("
        )
        assert "start the cluster, correct the address, or leave it out" in problem
        taken.listen()
        assert problems(address) == []


@pytest.mark.parametrize("backend", ["local", "deployment"])
def test_other_back_ends_need_no_cluster(backend, tmp_path):
    given = config(backend, store=f"file://{tmp_path}/store", ray_address="127.0.0.1:1")
    assert execution_problems(given) == []


@pytest.mark.parametrize(("gpus", "wanted"), [("0,1", 1), ("0,1,2", 0), ("", 0)])
def test_a_team_has_no_more_processes_than_there_are_gpus(monkeypatch, gpus, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    found = execution_problems(load_config({"train": {"data_parallel": 3}}))
    message = "train.data_parallel must be at most the number of GPUs, got 3, 2 are visible; "
    assert found == [f"{message}lower it"] * wanted


@pytest.mark.parametrize("field", ["publish_to", "execution.store"])
def test_a_store_that_cannot_be_written_is_named(tmp_path, monkeypatch, field):
    def given(place):
        section, _, name = field.rpartition(".")
        value = {name: f"file://{tmp_path}/{place}"}
        return load_config({section: value} if section else value)

    monkeypatch.setattr(execution, "_PAUSES", ())
    (tmp_path / "file").write_text("no folder")
    (problem,) = execution_problems(given("file/store"))
    assert problem.startswith(f"{field}: store file://{tmp_path}/file/store must be writable")
    assert execution_problems(given("store")) == []
