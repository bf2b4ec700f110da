"""A finished library that a run works on, and which run's it is afterwards."""

import pytest

from tclora.library.layout import Layout
from tclora.library.manifest import verify, write_manifest
from tclora.library.staging import begin, publish
from tests.library.examples import NAMES, describe, replace, write_files


def prepare(root, mark=""):
    """Work in the staging area as a run does, up to the publication."""
    staging = begin(root)
    write_files(staging, mark)
    layout = Layout(staging)
    layout.examples.parent.mkdir(parents=True, exist_ok=True)
    replace(layout.examples, "examples" + mark)
    replace(layout.report, "report" + mark)
    write_manifest(staging, describe(), NAMES)
    return staging


@pytest.fixture
def root(tmp_path):
    """A finished library, and a user's own files in it."""
    root = tmp_path / "runs" / "demo"
    publish(prepare(root), root)
    (root / "adapters/mine").mkdir()
    (root / "adapters/mine/weights").write_text("my own")
    (root / "notes.txt").write_text("my notes")
    return root


def content(folder):
    """Name, bytes and place on disk of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_ino)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def mark_of(root):
    """Say which run's library is there, after checking that it is one run's as a whole."""
    assert verify(root) == []
    marks = {
        (root / "adapters/cluster-0/weights").read_text().removeprefix("cluster-0"),
        (root / "adapters/cluster-1/weights").read_text().removeprefix("cluster-1"),
        (root / "clusters.parquet").read_text().removeprefix("rows"),
        (root / "report.html").read_text().removeprefix("report"),
    }
    (mark,) = marks
    return mark
