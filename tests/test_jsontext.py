"""The one reader of JSON: what it takes, and what it refuses in one line."""

import json

import pytest

from endor.errors import CheckpointError, ConfigError, FormatError
from endor.jsontext import MAX_DEPTH, parse, parse_object, read_object


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "must be JSON"),
        ("nonsense", "must be JSON"),
        (b"{\xff}", "byte 0xff at 1 is not UTF-8"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e999]", "too large"),
        (f"[{'9' * 101}]", "an integer has 101 digits"),
        (f"[{'9' * 5000}]", "an integer has 5000 digits"),
        (nested(100_000), "nested deeper"),
        (nested(100_000, '{"a":', "}").replace('":}', '":1}'), "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        (nested(100_000, "[{", "}]"), "must be JSON"),
        (r'{"a\u0000b": 1}', "holds a NUL"),
        (r'{"\ud800": 1}', "surrogate"),
        (r'["\uDFFF"]', "surrogate"),
        (r'["\ud800\ud800"]', "surrogate"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(FormatError, match=message) as caught:
        parse(text, "here")
    assert str(caught.value).startswith("here must be JSON: ")
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_takes_what_is_plain():
    value = {"a": [1, -2.5, None, True, "x\u00e9\U0001f600"], "b": {"c": 10**40}, "": []}
    for ascii_ in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_), "here") == value
    assert parse(r'"\ud83d\ude00 \\ud800"', "here") == "\U0001f600 \\ud800"
    assert parse(nested(MAX_DEPTH), "here")
    wide = json.dumps([[{"a": ["[[[{{{\\"]}]] * 5000)
    assert len(parse(wide, "here")) == 5000


def test_lenient_takes_what_transformers_takes():
    """Mamba configs hold Infinity, and the last of two equal keys wins everywhere."""
    found = parse('{"a": Infinity, "b": 1, "b": 2}', "here", lenient=True)
    assert found == {"a": float("inf"), "b": 2}
    with pytest.raises(FormatError, match="nested deeper"):
        parse(nested(100_000), "here", lenient=True)
    with pytest.raises(FormatError, match="5000 digits"):
        parse("1" * 5000, "here", lenient=True)


def test_objects(tmp_path):
    with pytest.raises(ConfigError, match="here must be a JSON object, got list; look"):
        parse_object("[]", "here", error=ConfigError, advice="look")
    with pytest.raises(CheckpointError, match="no such file"):
        read_object(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="must be a file"):
        read_object(tmp_path)
    (tmp_path / "x").write_text('{"a": 1}')
    assert read_object(tmp_path / "x") == {"a": 1}
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="at most"):
        read_object(tmp_path / "x")
