import json

import pandas as pd
import pytest

from tclora.config import DataConfig
from tclora.data import readers
from tclora.data.frame import canonical_rows
from tclora.data.readers import read_blocks, read_hub, read_table, source_digest
from tclora.errors import DataError

ROWS = [{"prompt": "a", "response": "1"}, {"prompt": "b", "response": "2"}]


def write(path, rows, form):
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif form == "csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        pd.DataFrame(rows).to_parquet(path)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_file_form_gives_the_same_rows(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    write(path, ROWS, form)
    table = read_table(str(path))
    assert table[["prompt", "response"]].to_dict("records") == ROWS
    assert len(set(table.index)) == 2


def test_text_is_utf8_whatever_the_form(tmp_path):
    rows = [{"prompt": "größe 漢字", "response": "né\u2028x"}]
    for form in ("jsonl", "json", "csv", "parquet"):
        write(tmp_path / f"rows.{form}", rows, form)
        assert read_table(str(tmp_path / f"rows.{form}")).to_dict("records") == rows


def test_a_json_file_may_hold_lines(tmp_path):
    path = tmp_path / "rows.json"
    write(path, ROWS, "jsonl")
    assert read_table(str(path)).to_dict("records") == ROWS


def test_blank_lines_keep_the_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a", "response": "1"}\r\n\n{"prompt": "b", "response": "2"}\n')
    table = read_table(str(path))
    assert list(table.index) == [2, 4]


def test_a_folder_is_read_in_sorted_order_and_other_files_are_left_alone(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[1:], "jsonl")
    write(tmp_path / "a.parquet", ROWS[:1], "parquet")
    (tmp_path / "README.md").write_text("not data")
    assert read_table(str(tmp_path)).to_dict("records") == ROWS


def test_csv_keeps_numbers_as_they_are_written(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,response\nwhat,007\n")
    assert read_table(str(tmp_path / "rows.csv"))["response"].tolist() == ["007"]


@pytest.mark.parametrize("word", ["NA", "None", "null", "nan"])
def test_csv_words_that_look_missing_are_text(tmp_path, word):
    (tmp_path / "rows.csv").write_text(f"prompt,response,task\nis it there?,{word},\n")
    row = read_table(str(tmp_path / "rows.csv")).iloc[0]
    assert row["response"] == word
    assert pd.isna(row["task"])


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, form):
    path = tmp_path / f"rows.{form}"
    write(path, ROWS, form)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_table(str(path)).to_dict("records") == ROWS


def test_rows_of_a_folder_are_numbered_by_file(tmp_path):
    write(tmp_path / "a.jsonl", ROWS, "jsonl")
    write(tmp_path / "b.csv", ROWS, "csv")
    numbers = ["a.jsonl:1", "a.jsonl:2", "b.csv:1", "b.csv:2"]
    assert list(read_table(str(tmp_path)).index) == numbers


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl' does not exist"),
        ("bad.jsonl", b'{"prompt": "a", "response": "b"}\n{"prompt": \n', "bad.jsonl, line 2"),
        (
            "list.jsonl",
            b'{"prompt": "a"}\n[1]\n3\n',
            "list.jsonl, line 2: must be an object",
        ),
        ("bad.json", b'[{"prompt": "a"}', "not a valid JSON array"),
        ("latin.json", b'[{"prompt": "a"},\n{"prompt": "\xe9"}]', "latin.json, line 2: must be"),
        (
            "latin.jsonl",
            b'{"prompt": "a"}\n{"prompt": "\xe9"}\n',
            "latin.jsonl, line 2: must be UTF-8",
        ),
        ("latin.csv", b"prompt,response\na,b\n\xe9,c\n", "latin.csv, line 3: must be UTF-8"),
        ("empty.csv", b"", "at least one row"),
        ("ragged.csv", b"prompt,response\na,b,c,d\n", "ragged.csv: is not valid CSV"),
        ("long.csv", b"prompt,response\na,b\na,b,c,d\n", "long.csv: is not valid CSV"),
        ("bad.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("rows.txt", b"a", "must end in one of"),
    ],
)
def test_unreadable_files_name_the_file_and_the_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_table(str(tmp_path / name))


def test_the_bad_line_of_a_utf8_file_is_the_line_of_the_bad_byte(tmp_path):
    path = tmp_path / "rows.csv"
    rows = "".join(f"p{i},r{i}\n" for i in range(5000)).encode()
    path.write_bytes(b"prompt,response\n" + rows + b"\xff,x\n")
    with pytest.raises(DataError, match="line 5002: must be UTF-8"):
        read_table(str(path))


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no file ending in"):
        read_table(str(tmp_path))


def test_a_name_that_cannot_be_reached_says_so_offline():
    with pytest.raises(DataError, match="neither a file or folder nor a dataset"):
        read_table("nobody/no-such-dataset")


def test_source_digest_follows_the_bytes_of_every_source(tmp_path):
    train, test = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write(train, ROWS, "jsonl")
    write(test, ROWS, "jsonl")
    config = DataConfig(path=str(train), test_path=str(test))
    before = source_digest(config)
    assert source_digest(config) == before
    write(test, ROWS[:1], "jsonl")
    assert source_digest(config) != before
    assert source_digest(DataConfig(path="demo")) != source_digest(DataConfig(path="org/name"))


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_blocks_cover_a_file_and_keep_its_row_numbers(tmp_path, monkeypatch, form):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 3)
    rows = [{"prompt": str(i), "response": "r"} for i in range(8)]
    write(tmp_path / f"rows.{form}", rows, form)
    blocks = list(read_blocks(str(tmp_path / f"rows.{form}")))
    assert [len(block) for block in blocks] == [3, 3, 2]
    assert [number for block in blocks for number in block.index] == list(range(1, 9))
    assert pd.concat(blocks)["prompt"].tolist() == [str(i) for i in range(8)]


def test_bad_lines_of_all_blocks_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 3)
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "response": "b"}\n'
    path.write_text(good + "3\n" + good * 5 + "{\n")
    told = {}
    for block in read_blocks(str(path)):
        told |= readers.broken_lines(block)
    assert list(told) == [2, 8]
    assert told[2] == "must be an object, got a number"
    assert told[8].startswith("is not valid JSON")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: must be an object"):
        read_table(str(path))


@pytest.fixture
def dataset(tmp_path):
    """A dataset repository on disk, which `datasets` builds or streams without a network."""
    folder = tmp_path / "flan"
    folder.mkdir()
    for part in range(2):
        rows = [
            {"source": f"question {part}-{i}", "target": str(i), "task_name": "sums"}
            for i in range(50)
        ]
        write(folder / f"part-{part}.jsonl", rows, "jsonl")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: flat\n  data_files: part-*.jsonl\n---\n"
    )
    return str(folder)


@pytest.mark.parametrize("stream", [False, True])
def test_a_dataset_is_read_in_blocks_and_streamed_where_asked(dataset, monkeypatch, stream):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 30)
    blocks = list(read_hub(dataset, "flat", "train", stream=stream))
    whole = pd.concat(blocks)
    assert max(len(block) for block in blocks) == 30
    assert whole.index.tolist() == list(range(1, 101))
    assert whole["source"].iloc[[0, 99]].tolist() == ["question 0-0", "question 1-49"]


def test_the_papers_collection_is_read_as_it_comes(dataset, tmp_path):
    """Columns source, target and task_name, beside rows of another form for composition."""
    frame, skipped = canonical_rows(
        read_hub(dataset, "flat", "train", stream=True), "flan", limit=20
    )
    assert not skipped
    assert len(frame) == 20
    assert set(frame["task"]) == {"sums"}
    assert frame["prompt"].str.startswith("question").all()
    write(tmp_path / "hard.jsonl", [{"input": "2 + 2", "code": "4", "target": 4.0}], "jsonl")
    hard, _ = canonical_rows(read_blocks(str(tmp_path / "hard.jsonl")), "hard")
    assert hard[["prompt", "answer", "scorer"]].to_numpy().tolist() == [["2 + 2", "4.0", "number"]]


def test_a_dataset_without_the_configuration_asked_for_says_so(dataset):
    with pytest.raises(DataError, match=r"config 'deep', split 'train'"):
        list(read_hub(dataset, "deep", "train"))
