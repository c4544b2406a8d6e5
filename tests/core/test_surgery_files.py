"""`surgery.json`: reads back to the same surgeries, and anything else is refused."""

from __future__ import annotations

import json

import pytest

from tersor.core.artifact import dump_surgeries, parse_surgeries
from tersor.core.surgery import SCHEMA, Change, Cut, Surgery
from tersor.errors import IntegrityError

SURGERY = Surgery(
    freed=("attention",),
    cuts=(Cut(parameter="w", dim=1, size=4, kept=(0, 2)), Cut(parameter="b", dim=0, size=4, kept=(3,))),
    changes=(Change(owner="a", name="width", position=1, before=4, after=2),),
)


def test_surgeries_read_back_in_their_order() -> None:
    both = (SURGERY, Surgery())
    assert parse_surgeries(dump_surgeries(both), "here") == both
    assert parse_surgeries(dump_surgeries(()), "here") == ()
    assert Surgery.from_json(SURGERY.to_json()) == SURGERY


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "truncated or no list"),
        ("[" * 100_000, "truncated or no list"),
        ("3", "truncated or no list"),
        ("[{}]", "truncated or no list"),
        ('{"version": 1}', "truncated or no list"),
        (json.dumps([{"version": SCHEMA + 1}]), f"version {SCHEMA + 1}.*upgrade tersor"),
        (json.dumps([{"version": 1, "code": "import os"}]), "not a valid surgery.*Extra inputs"),
        (json.dumps([{"version": 1, "freed": [3]}]), "not a valid surgery"),
        (json.dumps([{"version": 1, "cuts": [{"parameter": "w", "dim": -1, "size": 1, "kept": []}]}]), "not a valid"),
        (json.dumps([{"version": 1, "cuts": [{"parameter": "w", "dim": 0, "size": 2, "kept": ["0"]}]}]), "not a valid"),
    ],
)
def test_anything_else_is_refused(content: str, said: str) -> None:
    with pytest.raises(IntegrityError, match=rf"^here.*{said}"):
        parse_surgeries(content, "here")
