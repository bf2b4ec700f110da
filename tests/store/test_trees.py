import hashlib

import pytest
from pydantic import ValidationError

from tclora.store.trees import Blob, Tree


def test_a_tree_describes_files_folders_and_nothing(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("abc")
    (tmp_path / "a" / "d").write_text("")
    blob = Blob(digest=hashlib.sha256(b"abc").hexdigest(), size=3)
    assert Tree.of(tmp_path / "a" / "b" / "c.txt") == Tree(file=blob)
    tree = Tree.of(tmp_path / "a")
    assert tree.files["b/c.txt"] == blob
    assert set(tree.files) == {"b/c.txt", "d"}
    assert tree.size == 3
    assert Tree.of(tmp_path / "none") is None
    assert Tree.model_validate_json(tree.model_dump_json()) == tree


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\b", "", ".", "a//b", "a\0"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name):
    with pytest.raises(ValidationError, match="must stay inside of its folder"):
        Tree(files={name: Blob(digest="0" * 64, size=0)})


def test_a_digest_is_no_path():
    with pytest.raises(ValidationError, match="pattern"):
        Blob(digest="../../etc/passwd", size=0)
