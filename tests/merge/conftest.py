import pytest

from tests.merge.examples import MODULES, NAMES, make_adapter, make_statistics
from tests.tune.small_model import make_model, make_model_adapters


@pytest.fixture
def adapters():
    return [make_adapter(name, seed=k) for k, name in enumerate(NAMES)]


@pytest.fixture
def mixed_adapters():
    """Adapters of different ranks; the second lacks a module."""
    some = {m: MODULES[m] for m in list(MODULES)[:2]}
    return [
        make_adapter(NAMES[0], rank=4, seed=0),
        make_adapter(NAMES[1], rank=2, seed=1, modules=some),
        make_adapter(NAMES[2], rank=3, seed=2),
    ]


@pytest.fixture
def statistics():
    return make_statistics()


@pytest.fixture
def small_model():
    """A language model with the modules of `small_adapters`."""
    return make_model()


@pytest.fixture
def small_adapters():
    return make_model_adapters()
