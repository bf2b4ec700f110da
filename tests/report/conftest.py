import shutil

import pytest

from tclora.report import write_report
from tests.report.library import build_library


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A library with its report; not to be changed."""
    folder = build_library(tmp_path_factory.mktemp("finished"))
    write_report(folder)
    return folder


@pytest.fixture
def library(finished, tmp_path):
    """A library without a report, to be changed freely."""
    copied = shutil.copytree(finished, tmp_path / "library")
    (copied / "report.html").unlink()
    return copied


@pytest.fixture(scope="session")
def page(finished):
    return (finished / "report.html").read_text(encoding="utf-8")
