"""What runs on several libraries have in common is linked, not made again."""

from pathlib import Path

import pytest
from prefect import flow

from tasks.artifact import Artifact, Artifacts
from tasks.keys import stage
from tasks.progress import JobProgress
from tasks.shared import record, take_over
from tasks.where import Where
from tclora.jobs.run import LocalExecutor
from tclora.library.layout import Layout

MADE: list[Path] = []


def write(root, name, text):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@stage("shout")
def shout(source: Artifact, times: int, where: Where) -> Artifact:
    """Write a text in capitals."""
    MADE.append(where.layout.root)
    text = source.path.read_text().upper() * times
    file = write(where.layout.root, "folder/shout", text)
    return Artifact.of(where.layout.root, file.parent, info={"times": times})


@flow(name="shouting", validate_parameters=False)
def shouting(root, text, times, shared):
    where = Where(Layout(root), None, LocalExecutor(), JobProgress(), shared=shared)
    source = Artifact.of(root, write(root, "source", text))
    return shout(source, times, where)


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_is_done_once_for_all_who_share(tmp_path):
    shared = tmp_path / "shared"

    def made(name, text="hello", times=1, shared=shared):
        MADE.clear()
        found = shouting(tmp_path / name, text, times, shared)
        assert found.root == tmp_path / name
        assert (found.path / "shout").read_text() == text.upper() * times
        assert found.info == {"times": times}
        return bool(MADE)

    assert made("a")
    assert not made("b")
    same = [(tmp_path / name / "folder/shout").stat().st_ino for name in "ab"]
    assert same[0] == same[1]
    assert made("c", times=2)
    assert made("d", text="another")
    assert made("e", shared=None)
    (tmp_path / "a/folder/shout").unlink()  # the record's own files are gone
    assert made("f")
    assert not made("g")


def test_several_artifacts_and_files_replace_what_is_there(tmp_path):
    root, other = tmp_path / "one", tmp_path / "two"
    result: Artifacts = {
        name: Artifact.of(root, write(root, f"{name}/x", name), write(root, f"{name}.json", "{}"))
        for name in "ab"
    }
    record(tmp_path, "key", result)
    write(other, "a/x", "former")
    found = take_over(tmp_path, "key", other)
    assert {name: part.files for name, part in found.items()} == {
        name: part.files for name, part in result.items()
    }
    assert (other / "a/x").read_text() == "a"
    assert take_over(tmp_path, "another", other) is None
    assert take_over(tmp_path, "key", root) == result
