"""Claims about tables of metadata: which is for which split, what is read, and what is refused how."""
import pytest
from folders import captions_of, make_folder, nonempty

from parts.caption_tables import find_metadata, read_rows
from parts.errors import UserError
from parts.recordings import AudioFolder


def test_a_csv_of_something_else_beside_train_csv_leaves_no_clip_in_two_splits(tmp_path):
    rows = [(f"{k}.wav", f"sound {k}") for k in range(20)]
    make_folder(tmp_path, [name for name, _ in rows], rows, ("file_name", "caption"), "train.csv")
    alone = {split: set(captions_of(tmp_path, split)) for split in ("train", "val")}
    (tmp_path / "class_labels.csv").write_text("index,name\n0,rain\n")
    both = {split: set(captions_of(tmp_path, split)) for split in ("train", "val")}
    assert both == alone
    assert not both["train"] & both["val"] and len(both["train"] | both["val"]) == 20


def test_where_several_tables_may_be_meant_all_are_named(tmp_path):
    make_folder(tmp_path, ["x.wav"], [("x.wav", "a")], ("file_name", "text"), "one.csv")
    (tmp_path / "two.csv").write_text("file_name,text\nx.wav,b\n")
    with pytest.raises(UserError, match="several metadata files .one.csv, two.csv."):
        AudioFolder(tmp_path)


def test_the_val_table_stands_in_for_a_missing_test_table_and_the_other_way_round(tmp_path):
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).touch()
    assert find_metadata(tmp_path, "test") == (tmp_path / "val.csv", True)
    (tmp_path / "val.csv").rename(tmp_path / "evaluation.jsonl")
    assert find_metadata(tmp_path, "val") == (tmp_path / "evaluation.jsonl", True)
    assert find_metadata(tmp_path, "train") == (tmp_path / "train.csv", True)
    (tmp_path / "metadata.csv").touch()
    assert find_metadata(tmp_path, "val") == (tmp_path / "metadata.csv", False), "one for all splits"


def test_a_split_word_counts_in_a_name_of_any_language_and_only_as_a_whole_word(tmp_path):
    for name in ("prüfdaten_test.csv", "daten-train.csv"):
        (tmp_path / name).touch()
    assert find_metadata(tmp_path, "test") == (tmp_path / "prüfdaten_test.csv", True)
    (tmp_path / "prüfdaten_test.csv").rename(tmp_path / "datentest_übertest.csv")
    (tmp_path / "ütest.csv").touch()
    assert find_metadata(tmp_path, "test") == (tmp_path / "daten-train.csv", False)


def test_rows_carry_their_number(tmp_path):
    (tmp_path / "m.csv").write_text("file_name,caption\na.wav,x\nb.wav,y\n")
    (tmp_path / "m.jsonl").write_text('{"file_name": "a.wav"}\n\n{"file_name": "b.wav"}\n')
    assert [row["#"] for row in read_rows(tmp_path / "m.csv")] == [2, 3], "the header is row 1"
    assert [row["#"] for row in read_rows(tmp_path / "m.jsonl")] == [1, 3]


@pytest.mark.parametrize("name, content, message", [
    (None, "", "holds neither a table of captions nor a file that can be read"),
    ("metadata.csv", "file_name,caption\nx.wav,a,b\n", "row 2: more fields"),
    # Two rows with a quote left open would be one row of a long caption.
    ("metadata.csv", 'file_name,caption\nx.wav,"a\ny.wav,b\nz.wav,"c\n', "a quote left open"),
    ("metadata.csv", "file_name,caption\nx.wav\n", "row 2: fewer fields"),
    ("metadata.csv", "file_name,words\nx.wav,hello\n", "no column caption"),
    ("metadata.csv", "file_name,caption\nx.wav,hello\n", "row 2: no audio file for 'x.wav'"),
    ("metadata.csv", "file_name,caption\nx,y".encode("utf-16"), "not UTF-8"),
    ("metadata.jsonl", '{"file_name": "x"\n', "row 1: not valid JSON"),
    ("metadata.csv", "file_name,caption\n", "no rows"),
    ("metadata.csv", "file_name,caption\nx.wav,\n", "row 2: empty caption"),
    ("metadata.jsonl", '{"file_name": "x.wav", "caption": "a"}\n{"file_name": "y.wav"}\n',
     "row 1: no audio file.*2 of 2 can't be used"),
])
def test_bad_folders_are_refused_with_the_row_and_the_fix(tmp_path, name, content, message):
    if name is not None:
        raw = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        AudioFolder(tmp_path)


def test_byte_order_mark_and_crlf_are_read(tmp_path):
    make_folder(tmp_path, ["x.wav"], [], ("file_name", "caption"))
    raw = b"\xef\xbb\xbffile_name,caption\r\nx.wav,\"a dog,\r\nthen rain\"\r\n"
    (tmp_path / "metadata.csv").write_bytes(raw)
    splits = [split for split in ("train", "val") if nonempty(tmp_path, split)]
    assert "a dog" in AudioFolder(tmp_path, splits[0]).caption(0)
