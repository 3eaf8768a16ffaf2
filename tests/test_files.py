"""Claims about written files: JSON that every program reads."""
import json

import numpy as np
import pytest

from parts.files import to_json


def test_json_is_strict_whatever_is_not_a_number():
    values = {"a": [1.5, float("nan"), (float("inf"), 2)],
              "b": {"c": np.float64("-inf"), "d": None, "e": True}}
    text = to_json(values)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert strict == {"a": [1.5, None, [None, 2]], "b": {"c": None, "d": None, "e": True}}
    assert json.loads(to_json(values, indent=1)) == strict
