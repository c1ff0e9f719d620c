"""Events of a stream: one line each, whatever the text."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from runtime.server.framing import encoded, encoded_text

BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""What Python's `splitlines`, and the clients that use it on text, take for the end of a line."""


@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(BREAKS))))
def test_a_text_is_one_line_in_anybodys_eyes_and_comes_back(text: str) -> None:
    for made in (encoded_text(text), encoded(text)):
        assert len(made.decode().splitlines()) == 1
        assert json.loads(made) == text
