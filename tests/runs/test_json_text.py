"""JSON that every reader takes, whatever the values."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from melayer.runs.json_text import json_text, writable

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=())), inner),
    max_leaves=20,
)


def fail(constant):
    raise AssertionError(constant)


@given(VALUES, st.booleans())
def test_it_is_json_in_utf_8_and_comes_back_as_what_can_be_written(value, ascii_only):
    text = json_text(value, ascii_only=ascii_only)
    content = text.encode("ascii" if ascii_only else "utf-8")
    found = json.loads(content, parse_constant=fail)
    assert found == writable(value)
    assert json_text(found) == json_text(value)


def test_what_cannot_be_written_is_null_or_escaped():
    value = {"caf\udce9": [math.nan, -math.inf, 1.5, ("é", "\ud800")]}
    assert json_text(value) == '{"caf\\\\udce9": [null, null, 1.5, ["é", "\\\\ud800"]]}'
    assert json_text("é", ascii_only=True) == '"\\u00e9"'
