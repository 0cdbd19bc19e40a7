"""What a request may ask for."""

import pytest

from endor.errors import ConfigError
from endor.serving.limits import Limits, RequestError, check_body, tokens_asked

CHAT, TEXT, RESPONSE = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("route", "body", "tokens"),
    [
        (TEXT, {"prompt": "a"}, 8),
        (TEXT, {"prompt": "a", "max_tokens": 3, "stop": ["x", "y"], "seed": 1, "n": 1}, 3),
        (CHAT, {"messages": MESSAGES, "temperature": 0, "top_p": 1}, 8),
        (CHAT, {"messages": MESSAGES, "max_completion_tokens": 2, "max_tokens": 5}, 2),
        (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, 8),
        (RESPONSE, {"input": "a", "max_output_tokens": 4, "stream": True}, 4),
        (RESPONSE, {"input": MESSAGES}, 8),
    ],
)
def test_fine(route, body, tokens):
    checked = check_body(route, body, Limits(max_tokens=8))
    assert tokens_asked(route, checked) == tokens
    assert body.items() <= checked.items()


@pytest.mark.parametrize(
    ("route", "body", "said"),
    [
        (TEXT, [], "JSON object"),
        (TEXT, {}, "prompt"),
        (TEXT, {"prompt": ["a"]}, "prompt"),
        (TEXT, {"prompt": ""}, "prompt"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": ["a"]}, r"messages\[0\]"),
        (CHAT, {"messages": [*MESSAGES, {"role": "user", "content": 1}]}, r"messages\[1\]"),
        (CHAT, {"messages": [{"role": "user"}]}, "content"),
        (RESPONSE, {"input": None}, "input"),
        (TEXT, {"prompt": "a", "max_tokens": 9}, "at most 8"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "at least 1"),
        (TEXT, {"prompt": "a", "max_tokens": True}, "at least 1"),
        (TEXT, {"prompt": "a", "max_tokens": "3"}, "at least 1"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 9, "max_completion_tokens": 2}, "at most 8"),
        (TEXT, {"prompt": "a", "temperature": -1}, "temperature"),
        (TEXT, {"prompt": "a", "temperature": float("nan")}, "temperature"),
        (TEXT, {"prompt": "a", "temperature": "hot"}, "temperature"),
        (TEXT, {"prompt": "a", "top_p": 1.5}, "top_p"),
        (TEXT, {"prompt": "a", "seed": 1.5}, "seed"),
        (TEXT, {"prompt": "a", "n": 2}, "n: one"),
        (TEXT, {"prompt": "a", "stop": [1]}, "stop"),
        (TEXT, {"prompt": "a", "stop": []}, "stop"),
        (TEXT, {"prompt": "a", "stream": "yes"}, "stream"),
        (TEXT, {"prompt": "a", "generation_config": "{}"}, "generation_config"),
    ],
)
def test_refused(route, body, said):
    with pytest.raises(RequestError, match=said):
        check_body(route, body, Limits(max_tokens=8))


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "8"])
def test_limits_are_counts(wrong):
    with pytest.raises(ConfigError, match="max_tokens"):
        Limits(max_tokens=wrong)
