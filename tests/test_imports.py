"""Imports that collect no garbage: off within, on again behind, whatever happens."""

import gc

import pytest

from tclora.imports import lasting


def test_garbage_is_collected_again_after_imports():
    frozen = gc.get_freeze_count()
    with lasting():
        assert not gc.isenabled()
        made = [[] for _ in range(10_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(made)


def test_garbage_is_collected_again_after_an_import_that_fails():
    with pytest.raises(ModuleNotFoundError), lasting():
        import no_such_module  # noqa: F401
    assert gc.isenabled()
