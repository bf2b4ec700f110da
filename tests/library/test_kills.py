"""A publication that is killed at any change, and readers that come between: one whole library."""

import os
from pathlib import Path

import pytest

from tclora.errors import LibraryError
from tclora.library.layout import Layout
from tclora.library.manifest import read_manifest
from tclora.library.places import heal, retired, staging_area
from tclora.library.staging import begin, publish
from tests.library.staged import content, mark_of, prepare, root

__all__ = ["root"]
CHANGES = ("rename", "unlink", "rmdir", "link", "mkdir")


class KilledError(BaseException):
    """Stands for a SIGKILL: nothing of the code under test gets to handle it."""


@pytest.mark.parametrize("step", range(1, 40))
def test_a_kill_at_any_change_leaves_one_whole_library(root, monkeypatch, step):
    """Dies before the n-th change that `publish` makes to the file system."""
    staging = prepare(root, " second")
    died = dies_before(step, monkeypatch, lambda: publish(staging, root))
    found = mark_of(root)  # a reader heals before it looks
    assert found == " second" if not died else found in ("", " second")
    if died:
        publish(prepare(root, " third"), root)
        assert mark_of(root) == " third"
    assert (root / "notes.txt").read_text() == "my notes"
    assert [path.name for path in root.parent.iterdir()] == ["demo"]


@pytest.mark.parametrize("step", range(1, 20))
def test_a_kill_at_the_beginning_leaves_nothing_half(root, monkeypatch, step):
    before = content(root)
    dies_before(step, monkeypatch, lambda: begin(root))
    assert content(root) == before
    staging = begin(root)
    assert len(content(staging)) == 6
    assert content(root) == before


def test_the_steps_reach_over_the_whole_publication(root, monkeypatch):
    staging = prepare(root, " second")
    assert not dies_before(39, monkeypatch, lambda: publish(staging, root))


def test_readers_find_the_library_between_the_renames(root):
    prepare(root, " second")
    root.rename(retired(root))
    assert heal(root)
    assert mark_of(root) == " second"
    assert not heal(root)


def test_the_former_library_is_the_way_back(root):
    root.rename(retired(root))
    assert read_manifest(root).name == "x"
    assert mark_of(root) == ""


def test_what_is_being_removed_is_never_taken_for_a_library(root):
    root.rename(retired(root))
    Layout(retired(root)).manifest.unlink()
    assert not heal(root)
    with pytest.raises(LibraryError, match="is not a tclora library"):
        read_manifest(root)


def test_a_reader_that_comes_between_helps(root, monkeypatch):
    staging = prepare(root, " second")
    rename = Path.rename

    def rename_then_read(path, target):
        rename(path, target)
        if target == retired(root):
            assert mark_of(root) == " second"

    monkeypatch.setattr(Path, "rename", rename_then_read)
    publish(staging, root)
    assert mark_of(root) == " second"
    assert not staging_area(root).exists()


def dies_before(step, monkeypatch, action):
    """Run an action that dies before its n-th change of the file system; say whether it did."""
    count = 0

    def dying(change):
        def changed(*arguments, **options):
            nonlocal count
            count += 1
            if count == step:
                raise KilledError
            return change(*arguments, **options)

        return changed

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            action()
        except KilledError:
            return True
    return False
