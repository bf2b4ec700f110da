"""Rows in tokens on disk: read back as they were, whole or a few, equal bytes for equal rows."""

import numpy as np
import pytest

from tclora.model.token_file import TokenFile, write_chosen, write_tokens
from tclora.model.tokens import TokenRow

ROWS = [
    TokenRow((5, 9, 7), (8, 6)),
    TokenRow((), (1,)),
    TokenRow((70_000, 2), (), truncated=True),
    TokenRow((3,), (4, 2**31 - 1)),
]


@pytest.fixture
def source(tmp_path):
    write_tokens([ROWS[:1], [], ROWS[1:]], tmp_path / "source")
    return tmp_path / "source"


def test_rows_are_read_as_they_were_written(source, tmp_path):
    write_chosen(source, np.arange(4), tmp_path / "all")
    found = TokenFile(tmp_path / "all")
    assert list(found) == ROWS
    assert [found[-1], *found[1:3]] == [ROWS[3], ROWS[1], ROWS[2]]
    with pytest.raises(IndexError):
        found[4]


def test_some_rows_are_taken_in_their_order(source, tmp_path):
    write_chosen(source, np.array([3, 0]), tmp_path / "some")
    assert list(TokenFile(tmp_path / "some")) == [ROWS[3], ROWS[0]]


def test_bytes_do_not_depend_on_other_rows_nor_on_blocks(source, tmp_path):
    write_tokens([[ROWS[2]], [ROWS[3], ROWS[0]]], tmp_path / "other")
    write_chosen(source, np.array([0, 3]), tmp_path / "one")
    write_chosen(tmp_path / "other", np.array([2, 1]), tmp_path / "two")
    write_tokens([[ROWS[0], ROWS[3]]], tmp_path / "three")
    one, two, three = ((tmp_path / name).read_bytes() for name in ("one", "two", "three"))
    assert one == two == three


def test_tokens_are_counted(tmp_path):
    assert write_tokens([ROWS[:2], ROWS[2:]], tmp_path / "rows") == (4, 11, 5, 1)


def test_tokens_are_not_copied_into_memory(source, tmp_path):
    write_chosen(source, np.arange(4), tmp_path / "all")
    found = TokenFile(tmp_path / "all")
    assert not found._tokens.flags.owndata
    assert not found._tokens.flags.writeable
