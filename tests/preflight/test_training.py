"""The cost model of training, and the choice of an engine."""

from dataclasses import replace

import pytest

from tclora.config import AdapterConfig
from tclora.preflight import training
from tclora.preflight.rates import Rates
from tclora.preflight.sizes import BaseSize
from tclora.preflight.training import START, Workload, plan_training, training_slots
from tclora.preflight.training_cost import Lengths, training_seconds

BASE = BaseSize(
    parameters=134_000_000, trained=4_880_000, linear=106_000_000,
    layers=30, width=576, inner=1536, vocabulary=49152,
)  # fmt: skip
LENGTHS = Lengths(100.0, 20.0)
SIZES = {"joint": 400, "a": 100, "b": 100, "c": 200}
CONFIG = AdapterConfig(batch_size=10)
RATES = Rates(1e11, 1e9)


def plan(engine, sizes=SIZES, base=BASE, slots=2, config=CONFIG, rates=RATES):
    work = Workload(sizes, base, config, LENGTHS, slots=slots, itemsize=4)
    return plan_training(engine, work, rates)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(training, "device_memory", lambda: 64e9)


def seconds(base=BASE, config=CONFIG, tokens=10_000, steps=(10,), rates=RATES):
    return training_seconds(base, config, LENGTHS, tokens, steps, rates)


def test_time_is_at_least_that_of_the_products():
    per_token = 4 * BASE.linear + 6 * BASE.trained + 4 * BASE.vocabulary * BASE.width * 0.2
    least = 10_000 * per_token / 1e11
    assert least < seconds() < 3 * least


def test_time_grows_with_tokens_layers_steps_and_falls_with_the_rates():
    assert seconds(tokens=20_000, steps=(20,)) == pytest.approx(2 * seconds(), rel=0.01)
    assert seconds(steps=(20,)) > seconds()
    deeper = replace(BASE, layers=60, linear=2 * BASE.linear, trained=2 * BASE.trained)
    assert 1.7 * seconds() < seconds(base=deeper) < 2 * seconds()
    assert seconds(rates=Rates(2e11, 2e9)) < seconds()
    assert seconds(config=CONFIG.model_copy(update={"gradient_checkpointing": True})) > seconds()


def test_counts_are_those_of_the_jobs():
    found = plan("separate")
    assert [job.names for job in found.jobs] == [("joint",), ("c",), ("a",), ("b",)]
    assert [job.steps for job in found.jobs] == [40, 20, 10, 10]
    assert [job.rows for job in found.jobs] == [400, 200, 100, 100]
    (job,) = plan("together").jobs
    assert (job.steps, job.rows, job.tokens) == (80, 800, 80_000)


def test_jobs_beside_each_other_share_the_cores():
    found = plan("separate")
    for job in found.jobs:  # but call operators as fast
        assert 1.5 < job.loop / (job.seconds - START) < 2
    work = [START + job.loop for job in found.jobs]
    assert found.seconds == pytest.approx(max(work[0], sum(work[1:])))
    assert found.adapters["c"] == found.jobs[1].loop
    alone = plan("separate", slots=1)
    assert alone.seconds == pytest.approx(sum(job.seconds for job in alone.jobs))


def test_a_team_of_gpus_takes_its_share_of_the_time(monkeypatch):
    team = CONFIG.model_copy(update={"data_parallel": 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    wanted = plan("together", slots=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    found = plan("together", slots=training_slots("auto", 4, team), config=team)
    assert [job.names for job in found.jobs] == [job.names for job in wanted.jobs]
    assert [2 * job.loop for job in found.jobs] == pytest.approx([j.loop for j in wanted.jobs])
    assert [job.memory for job in found.jobs] == [job.memory for job in wanted.jobs]


@pytest.mark.parametrize(
    ("configured", "slots", "team", "wanted"),
    [("auto", 8, 1, 8), ("auto", 8, 3, 2), ("auto", 2, 4, 1), (2, 2, 2, 2)],
)
def test_jobs_of_several_processes_are_fewer_unless_they_are_counted(
    configured, slots, team, wanted
):
    config = CONFIG.model_copy(update={"data_parallel": team})
    assert training_slots(configured, slots, config) == wanted


def test_a_team_on_a_cpu_has_as_many_copies():
    team = CONFIG.model_copy(update={"data_parallel": 2})
    (alone,), (shared,) = plan("together").jobs, plan("together", config=team).jobs
    assert shared.memory == 2 * alone.memory
    assert shared.loop == alone.loop


def test_one_copy_of_the_base_is_less_memory():
    separate, together = plan("separate", slots=4), plan("together", slots=4)
    assert separate.memory > 3 * BASE.parameters * 4
    assert together.memory < separate.memory


def test_fewer_adapters_at_once_are_less_memory_and_may_be_more_steps():
    fewer = {n: CONFIG.model_copy(update={"adapters_at_once": n}) for n in (1, 2, 9)}
    all_at_once, found = plan("together"), {n: plan("together", config=fewer[n]) for n in fewer}
    assert found[9] == all_at_once
    own = BASE.trained * 24  # weight, gradient, master, its gradient, two moments
    assert all_at_once.memory - found[2].memory == 2 * own
    assert found[2].memory - found[1].memory == own
    assert all_at_once.seconds == found[2].seconds < found[1].seconds


def test_an_adapter_is_planned_for_as_long_as_it_is_held():
    sizes = {"c": 400, "b": 200, "a": 100}  # 40, 20, 10 steps
    (job,) = plan("together", sizes).jobs
    assert job.names == ("c", "b", "a")
    assert job.shares == pytest.approx((1.0, (3 * 10 + 2 * 10) / 70, 3 * 10 / 70))
    assert plan("together", sizes).adapters["b"] == job.shares[1] * job.loop
    one = CONFIG.model_copy(update={"adapters_at_once": 1})
    assert plan("together", sizes, config=one).jobs[0].shares == pytest.approx(
        (4 / 7, 2 / 7, 1 / 7)
    )
    two = CONFIG.model_copy(update={"adapters_at_once": 2})  # b beside c, then a beside c
    (job,) = plan("together", sizes, config=two).jobs
    assert job.shares == pytest.approx((1, 4 / 7, 2 / 7))


def test_a_long_job_alone_on_its_share_of_the_cores_speaks_for_together():
    found = plan("auto", slots=4)
    assert found.engine == "together"
    assert "auto is together: separate 1.00 of the time" in found.reason
    assert found.jobs == plan("together", slots=4).jobs


def test_what_does_not_fit_the_memory_is_not_chosen(monkeypatch):
    many = {f"c{k}": 10 for k in range(40)}
    together, separate = plan("together", many, slots=1), plan("separate", many, slots=1)
    assert separate.memory < together.memory
    monkeypatch.setattr(training, "device_memory", lambda: separate.memory * 1.1)
    assert plan("auto", many, slots=1).engine == "separate"
    monkeypatch.setattr(training, "device_memory", lambda: 1.0)  # too little for either
    assert plan("auto", many, slots=1).engine == "separate"


def test_a_named_engine_is_taken():
    assert plan("separate").reason == ""
    assert plan("separate").engine == "separate"
