"""Metadata of recordings: which table of a folder is for which split, and its rows.

A folder of captioned recordings comes with a csv or jsonl table, or with one a split. They come from other
people and other programs, so all that can be wrong with them (encoding, quotes, missing columns) ends in a
UserError that names the file, the row and what to do.

    folder --find_metadata(split)--> the table of that split --read_rows--> [{column: cell, "#": row number}]

Public: listed, find_metadata, refuse_other_tables, read_rows, rows_of_split, find_column, caption_columns,
split_named, FILE_COLUMNS.
"""
from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

from parts.errors import UserError

# Words by which file and folder names say what split they are for.
SPLIT_WORDS = {"train": ("train", "training", "development"),
               "val": ("val", "valid", "validation", "dev"),
               "test": ("test", "eval", "evaluation")}
# Without a val file the test file is used, and the other way round.
SPLIT_OR_STAND_IN = {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}

# Columns that are understood, the first that is there counts.
FILE_COLUMNS = ("file_name", "filename", "youtube_id", "audiocap_id")
CAPTION_COLUMNS = ("caption", "text", "category")
OTHER_TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".xls", ".xlsx")


# --- which table ----------------------------------------------------------------------------------------

def split_named(words: set[str]) -> str | None:
    """The split that some lower-case words name, or None."""
    for split, known in SPLIT_WORDS.items():
        if words & set(known):
            return split
    return None


def _split_of(meta: Path, folder: Path) -> str | None:
    """The split that a metadata file is for, by the words of its name or of its own folder."""
    name = str(meta.relative_to(folder).with_suffix(""))
    return split_named(set(re.split(r"[\W\d_]+", name.lower())))


def listed(folder: Path) -> list[Path]:
    """What lies in a folder, in order, but for names that begin with a dot. Those are other programs'
    (checkpoints of notebooks, the trash, macOS's resource forks). UserError where it can't be listed."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as e:
        raise UserError(f"{folder}: can't be listed ({e.strerror}); allow it, or move that folder "
                        "elsewhere") from None


def rows_of_split(meta: Path, rows: list[dict], split: str) -> tuple[list[dict], list[bool]]:
    """Rows of a table with a column 'split' -> (those that are trained on and those that this split may hold
    out, is each held out?). Without rows of val those of test are used, and the other way round. UserError
    for a row that names no split."""
    named = {}
    for row in rows:
        words = set(re.split(r"[\W\d_]+", str(row.get("split")).lower()))
        named[row["#"]] = split_named(words)
        if named[row["#"]] is None:
            said = str(row.get("split"))[:40]
            raise UserError(f"{meta}, row {row['#']}: split {said!r} is none of train, val and test; mend "
                            "it, or rename the column")
    there = set(named.values())
    held_out = next((name for name in SPLIT_OR_STAND_IN[split] if name in there), None)
    if split == "train":
        return rows, [named[row["#"]] != "train" for row in rows]
    kept = [row for row in rows if named[row["#"]] in ("train", held_out)]
    return kept, [named[row["#"]] == held_out for row in kept]


def _tables(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.suffix in (".csv", ".jsonl")]


def find_metadata(folder: Path, split: str) -> tuple[Path | None, bool]:
    """(the metadata file for a split or None, is it that split's own?).

    One file for all, or one a split: train.csv, val.csv, test.csv; clotho_captions_development.csv ...;
    train/metadata.csv ... . Without a val file the test file is used, and the other way round. UserError
    where there are several and it is not clear which."""
    here = listed(folder)
    found = [path for path in _tables(here) if path.stem == "metadata"]
    if not found:
        found = _tables(here) + (_tables(listed(folder / "meta")) if (folder / "meta").is_dir() else [])
    if not found:
        found = [path for one in here if one.is_dir() for path in _tables(listed(one))
                 if path.stem == "metadata"]
    if len(found) <= 1:
        return (found[0] if found else None), False

    by_split = {}
    for path in found:
        by_split.setdefault(_split_of(path, folder), []).append(path)
    # A csv of something else beside train.csv holds nothing out: then train.csv is the table of all splits.
    holds_out = "val" in by_split or "test" in by_split
    for name in SPLIT_OR_STAND_IN[split]:
        if len(by_split.get(name, ())) == 1 and "train" in by_split:
            return by_split[name][0], holds_out
    if split != "train" and len(by_split.get("train", ())) == 1 and not holds_out:
        return by_split["train"][0], False
    names = ", ".join(str(path.relative_to(folder)) for path in found)
    raise UserError(f"{folder}: several metadata files ({names}); keep one, or one a split named train, val "
                    "and test")


def refuse_other_tables(paths: list[Path]) -> None:
    """UserError where what is in a folder without metadata holds a table after all: of another kind or name,
    or deeper than one is looked for. The folders' names would be taken for captions."""
    for path in paths:
        if path.suffix.lower() in OTHER_TABLES:
            raise UserError(f"{path}: not where a table of captions is looked for; save it as "
                            "metadata.csv or metadata.jsonl in the folder, or take it out if the names of "
                            "folders are the captions")


# --- its rows -------------------------------------------------------------------------------------------

def read_rows(meta: Path) -> list[dict]:
    """The rows of a metadata file (.csv or .jsonl), each with its row number in '#'. UserError with the row
    where it can't be read."""
    try:
        text = meta.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark may pass for UTF-8, with a zero byte beside each letter
        raise UserError(f"{meta}: not UTF-8; save it as UTF-8")
    rows = _jsonl_rows(meta, text) if meta.suffix == ".jsonl" else _csv_rows(meta, text)
    if not rows:
        raise UserError(f"{meta}: no rows")
    return rows


def _jsonl_rows(meta: Path, text: str) -> list[dict]:
    rows = []
    for k, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            why = getattr(e, "msg", "numbers too long or nesting too deep")
            raise UserError(f"{meta}, row {k}: not valid JSON ({why})") from None
        if not isinstance(row, dict):
            raise UserError(f"{meta}, row {k}: not a JSON object")
        rows.append({**row, "#": k})
    return rows


def _csv_rows(meta: Path, text: str) -> list[dict]:
    rows = []
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    k = 1  # the row that was read last; the header is row 1
    try:
        names = table.fieldnames or []
        other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise UserError(f"{meta}: its columns are parted by {other!r}; save it with commas")
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise UserError(f"{meta}: two columns are named {double!r}; rename one")
        for row in table:
            k = table.line_num  # as an editor counts: empty lines too; of a row of several lines the last
            # DictReader collects what is too much under None, and fills up with None.
            if None in row or None in row.values():
                amount = "more" if None in row else "fewer"
                raise UserError(f"{meta}, row {k}: {amount} fields than the header; quote captions that hold "
                                "commas")
            rows.append({**row, "#": k})
    except csv.Error as e:
        raise UserError(f"{meta}, after row {k}: not valid csv ({e}); is a quote left open?") from None
    return rows


# --- its columns ----------------------------------------------------------------------------------------

def find_column(meta: Path, row: dict, names: tuple) -> str:
    """The first of `names` that is a column of a row; UserError where none is."""
    for name in names:
        if name in row:
            return name
    found = ", ".join(column for column in row if column != "#")
    raise UserError(f"{meta}: no column {' or '.join(names)}; found {found}")


def caption_columns(meta: Path, row: dict) -> list[str]:
    """The columns that hold wordings: caption_1, caption_2 ... where they are there, else the one caption."""
    several = [column for column in row if re.fullmatch(r"caption_\d+", column)]
    return several or [find_column(meta, row, CAPTION_COLUMNS)]
