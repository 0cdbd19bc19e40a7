"""`endor serve` as clients see it: openai's own, curl, one that vanishes, one that is wrong."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest

import endor
from endor.errors import BackendError

from ..support.tiny_talker import pack_talker

openai = pytest.importorskip("openai", reason="serving needs the extra `serve`")
pytest.importorskip("fastapi", reason="serving needs the extra `serve`")

KEY = "a-key"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack_talker(tmp_path_factory.mktemp("serve"))


@contextmanager
def served(packed, *options):
    """Run the command; yield its address and the process."""
    command = [sys.executable, "-m", "endor", "serve", str(packed), "--port", "0", *options]
    environment = os.environ | {"ENDOR_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, (line, process.stderr.read())
        yield line.split(" at ")[1].strip(), process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(packed):
    with served(packed, "--context", "4096", "--max-new-tokens", "4000") as (found, _):
        yield found


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def expected(packed):
    """The six greedy words after w3 w4, by the model itself."""
    from endor.hf.generation import Sampling, encode_prompt, generate_text
    from endor.trust import read_tokenizer

    tokenizer = read_tokenizer(packed)
    model = endor.load_model(packed)
    return generate_text(model, tokenizer, encode_prompt(tokenizer, "w3 w4"), Sampling(6)).text


def metric(address, name):
    request = urllib.request.Request(
        address.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_the_models_are_one(client):
    assert [model.id for model in client.models.list()] == ["packed"]


def test_a_completion_is_the_models_own(client, expected):
    made = client.completions.create(model="packed", prompt="w3 w4", max_tokens=6, temperature=0)
    assert made.choices[0].text.split() == expected.split()
    assert made.usage.completion_tokens == 6
    assert made.choices[0].finish_reason == "length"


def test_a_streamed_completion_is_the_same(client, expected):
    parts = client.completions.create(
        model="packed", prompt="w3 w4", max_tokens=6, temperature=0, stream=True
    )
    text = "".join(part.choices[0].text for part in parts)
    assert text.split() == expected.split()


def test_chat_whole_and_streamed(client):
    ask = {
        "model": "packed",
        "messages": [{"role": "user", "content": "w3"}],
        "max_tokens": 5,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**ask).choices[0].message.content
    parts = client.chat.completions.create(**ask, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts).split() == whole.split()
    assert len(whole.split()) == 5


def test_two_clients_at_once_get_each_their_own(address, expected):
    found = {}

    def ask(prompt):
        with openai.OpenAI(base_url=address, api_key=KEY, timeout=120) as one:
            made = one.completions.create(
                model="packed", prompt=prompt, max_tokens=6, temperature=0
            )
            found[prompt] = made.choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("w3 w4", "w9 w7 w5")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["w3 w4"].split() == expected.split()
    assert found["w9 w7 w5"] != found["w3 w4"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_the_model(address, client, stream):
    before = metric(address, "endor_generated_tokens_total")
    body = json.dumps({"prompt": "w3 w4", "max_tokens": 4000, "temperature": 0, "stream": stream})
    port = int(address.removesuffix("/v1").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        if stream:
            assert b"200 OK" in raw.recv(1000)
        else:
            time.sleep(0.5)
    made = client.completions.create(model="packed", prompt="w1", max_tokens=2, temperature=0)
    assert made.usage.completion_tokens == 2
    assert metric(address, "endor_generated_tokens_total") - before < 4000
    assert metric(address, "endor_requests_open") == 0


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        ({"model": "another"}, openai.NotFoundError),
        ({"max_tokens": 4001}, openai.BadRequestError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"prompt": ["w1", "w2"]}, openai.BadRequestError),
        ({"prompt": "w1 " * 200, "max_tokens": 3999}, openai.BadRequestError),
        ({"extra_body": {"generation_config": "{}"}}, openai.BadRequestError),
        ({"extra_body": {"nonsense": 1}}, openai.UnprocessableEntityError),
        ({"prompt": "w1 " * 400_000}, openai.APIStatusError),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(client, ask, error):
    with pytest.raises(error) as caught:
        client.completions.create(**{"model": "packed", "prompt": "w1", "max_tokens": 1} | ask)
    assert 400 <= caught.value.status_code < 500
    assert caught.value.body["message"]


def test_a_wrong_key(address):
    with (
        openai.OpenAI(base_url=address, api_key="another", max_retries=0) as one,
        pytest.raises(openai.AuthenticationError, match="missing or wrong"),
    ):
        one.models.list()


def curl(*arguments):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", "-w", "\n%{http_code}", "--max-time", "60", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_curl(address):
    root, auth = address.removesuffix("/v1"), ("-H", f"Authorization: Bearer {KEY}")
    kind = ("-H", "Content-Type: application/json")
    assert curl(f"{root}/health") == (200, '{"status":"ok","model":"packed"}')
    ask = '{"prompt": "w3 w4", "max_tokens": 2}'
    status, body = curl(*auth, *kind, "-d", ask, f"{address}/completions")
    assert (status, json.loads(body)["usage"]["completion_tokens"]) == (200, 2)
    status, body = curl(*auth, "-d", ask, f"{address}/completions")
    assert (status, "content-type" in body) == (415, True)
    assert curl(*auth, *kind, "-d", "{", f"{address}/completions")[0] == 400
    assert curl(*auth, *kind, "-d", "[" * 100_000, f"{address}/completions")[0] == 400
    assert curl(*kind, "-d", ask, f"{address}/completions")[0] == 401
    assert curl(*auth, "-H", "Host: evil.example", f"{address}/models")[0] == 400
    for route in ("load_model", "reset", "v1/systemone", "docs", "openapi.json"):
        assert curl(*auth, *kind, "-d", '{"model": "org/name"}', f"{root}/{route}")[0] == 404
    status, body = curl(*auth, f"{root}/metrics")
    assert status == 200
    for name in ("endor_generated_tokens_total", "endor_packed_bytes_total", "endor_read_bytes"):
        assert name in body


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_open_answers_and_stops(packed, number):
    with served(packed, "--context", "600") as (found, process):
        answer = {}

        def ask():
            with openai.OpenAI(base_url=found, api_key=KEY, timeout=120) as one:
                parts = one.completions.create(
                    model="packed", prompt="w3", max_tokens=300, stream=True
                )
                for part in parts:
                    answer["started"].set()
                    answer["reason"] = part.choices[0].finish_reason

        answer["started"] = threading.Event()
        thread = threading.Thread(target=ask)
        thread.start()
        assert answer["started"].wait(60)
        process.send_signal(number)
        thread.join(120)
        assert answer["reason"] == "length"
        assert process.wait(60) == 0


def test_more_than_may_wait_are_told_to_come_back(packed):
    options = ("--context", "4096", "--max-new-tokens", "4000", "--max-waiting", "1")
    with (
        served(packed, *options) as (found, _),
        openai.OpenAI(base_url=found, api_key=KEY, max_retries=0, timeout=120) as one,
    ):
        ask = {"model": "packed", "prompt": "w1"}
        stream = one.completions.create(**ask, max_tokens=4000, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="wait already"):
            one.completions.create(**ask, max_tokens=1)
        stream.close()


@pytest.fixture(scope="module")
def batched(packed):
    options = ("--context", "4096", "--max-new-tokens", "4000", "--batch", "4")
    with served(packed, *options) as (found, _):
        yield found


def ask(address, prompt, **options):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0, timeout=120) as one:
        made = one.completions.create(model="packed", prompt=prompt, **options)
        return made.choices[0].text


def at_once(*jobs):
    """Run functions in threads of their own; return what they returned."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(120) for future in [pool.submit(job) for job in jobs]]


def test_a_batch_gives_each_client_what_it_gets_alone(address, batched):
    options = (
        {"max_tokens": 6, "temperature": 0},
        {"max_tokens": 30, "temperature": 0, "frequency_penalty": 0.4},
        {"max_tokens": 12, "temperature": 1, "seed": 7},
        {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 8},
        {"max_tokens": 15, "temperature": 0, "top_p": 0.5},
    )
    prompts = ("w3 w4", "w9 w7 w5", "w1", "w2 w2 w2 w2", "w6")
    jobs = [(prompt, option) for prompt, option in zip(prompts, options, strict=True)]
    alone = [ask(address, prompt, **option) for prompt, option in jobs]
    found = at_once(*(partial(ask, batched, prompt, **option) for prompt, option in jobs))
    assert found == alone


@pytest.mark.parametrize("stream", [True, False])
def test_one_that_leaves_a_batch_leaves_the_others_there(address, batched, stream):
    expected = ask(address, "w3 w4", max_tokens=200, temperature=0)
    before = metric(batched, "endor_generated_tokens_total")
    with openai.OpenAI(base_url=batched, api_key=KEY, max_retries=0, timeout=120) as one:
        options = {"model": "packed", "prompt": "w5", "max_tokens": 4000, "temperature": 0}
        if stream:
            leaver = one.completions.create(**options, stream=True)
            next(iter(leaver))
            found = at_once(
                partial(ask, batched, "w3 w4", max_tokens=200, temperature=0), leaver.close
            )[0]
        else:
            with pytest.raises(openai.APITimeoutError):
                one.with_options(timeout=0.5).completions.create(**options)
            found = ask(batched, "w3 w4", max_tokens=200, temperature=0)
    assert found == expected
    for _ in range(100):
        if metric(batched, "endor_requests_open") == 0:
            break
        time.sleep(0.1)
    assert metric(batched, "endor_requests_open") == 0
    assert metric(batched, "endor_generated_tokens_total") - before < 4200


def test_a_wrong_request_to_a_batch_is_refused_alone(batched):
    def wrong():
        with pytest.raises(openai.BadRequestError, match="context"):
            ask(batched, "w1 " * 200, max_tokens=3999)

    right = partial(ask, batched, "w3 w4", max_tokens=5, temperature=0)
    assert at_once(right, wrong, right)[0].split()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch", "2", "--kv", "disk"), "leave out one of them"),
        (("--batch", "0"), "0 is not in the range"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(packed, options, said):
    done = command("serve", packed, *options)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_batch_needs_packed_weights(packed):
    done = command("serve", packed.parent / "source", "--batch", "2")
    assert done.returncode == 1
    assert "ordinary checkpoint: --batch" in done.stderr


def command(*words):
    return subprocess.run(
        [sys.executable, "-m", "endor", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_an_address_in_use_is_one_sentence(packed):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = command("serve", packed, "--port", port)
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_libraries_are_named(monkeypatch):
    from endor.serving import server

    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"fastapi.*endor-sparse\[serve\]"):
        server.check_installed()
