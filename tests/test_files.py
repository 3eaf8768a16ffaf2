"""Claims about written files: JSON that every program reads."""
import errno
import json

import numpy as np
import pytest

from parts import files
from parts.errors import UserError
from parts.files import to_json


def test_json_is_strict_whatever_is_not_a_number():
    values = {"a": [1.5, float("nan"), (float("inf"), 2)],
              "b": {"c": np.float64("-inf"), "d": None, "e": True}}
    text = to_json(values)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": None, "e": True}}
    assert json.loads(to_json(values, indent=1)) == strict


def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    """Any other refusal is told without the advice to make room."""
    path = tmp_path / "x.json"
    files.write_text(path, "old")
    for code, advice in ((errno.ENOSPC, "; make room there"), (errno.EACCES, "")):
        def refuse(*a, code=code):
            raise OSError(code, "no")
        with monkeypatch.context() as patched:
            patched.setattr(files.os, "replace", refuse)
            with pytest.raises(UserError) as said:
                files.write_text(path, "new")
        assert str(said.value) == f"{path}: can't be written (no){advice}"
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
