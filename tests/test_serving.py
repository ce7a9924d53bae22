"""The server as clients see it: a real port, the real openai client, and raw bytes where the client is too polite."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from served import hooks, registry, tiny

pytest.importorskip("fastapi", reason="the server's packages are not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from emocircuits.cli import main  # noqa: E402
from emocircuits.errors import InputError, MissingPackageError  # noqa: E402
from emocircuits.serving import app as app_module  # noqa: E402
from emocircuits.serving import run  # noqa: E402
from emocircuits.serving.app import create_app  # noqa: E402
from emocircuits.serving.engine import Engine, Limits  # noqa: E402
from emocircuits.serving.registry import Registry  # noqa: E402

LIMIT = 20_000
CHAT: Any = [{"role": "user", "content": "Hi there"}]


@dataclass
class Served:
    """A running server and its engine."""

    url: str
    engine: Engine

    def client(self, key: str = "none") -> Any:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60)

    def text(self, steering: Any = None, **options: Any) -> str:
        """A greedy completion."""
        extra = {} if steering is None else {"extra_body": {"steering": steering}}
        options = {"prompt": "Go on", "max_tokens": 12, "temperature": 0, **options}
        return self.client().completions.create(model="tiny", **options, **extra).choices[0].text

    def post(self, body: Any, path: str = "/completions", **headers: str) -> Any:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        return httpx.post(self.url + path, content=content, headers={"content-type": "application/json", **headers})

    def metric(self, line: str) -> float:
        text = httpx.get(self.url.removesuffix("/v1") + "/metrics").text
        return float(next(x for x in text.splitlines() if x.startswith(line)).rpartition(" ")[2])


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    engine = Engine(tiny(), registry(), Limits(max_batch=4, max_queue=32, max_tokens=240))
    with run.background(create_app(engine, model_name="tiny", max_body_bytes=LIMIT)) as url:
        yield Served(url, engine)
    engine.close()
    assert hooks(engine.batch.module) == 0


def wait(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


# ---------------------------------------------------------------- answers


def test_chats_and_completions(served: Served) -> None:
    client = served.client()
    options: Any = {"model": "tiny", "max_tokens": 9, "temperature": 0}
    whole = client.completions.create(prompt="Go on", **options)
    assert whole.object == "text_completion"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (6, 9, 15)
    ids = served.engine.request("Go on").ids
    assert client.completions.create(prompt=ids, **options).choices[0].text == whole.choices[0].text
    assert client.completions.create(prompt=["Go on"], **options).choices[0].text == whole.choices[0].text
    chat = client.chat.completions.create(messages=CHAT, **options)
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}]
    again = client.chat.completions.create(
        messages=parts, model="tiny", max_completion_tokens=9, temperature=0, user="me", n=1
    )
    assert chat.choices[0].message.content == again.choices[0].message.content
    assert chat.choices[0].message.role == "assistant"
    by_hand = served.text(prompt="User: Hi there\nAssistant:", max_tokens=9)
    assert chat.choices[0].message.content == by_hand, "a model without a template gets the documented rendering"
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("steering", [None, {"all": 0.7}])
def test_streams_add_up_to_the_whole(served: Served, steering: Any) -> None:
    client, extra = served.client(), {"extra_body": {"steering": steering}}
    options: Any = {"model": "tiny", "max_tokens": 40, "temperature": 0.8, "seed": 3, **extra}
    whole = client.chat.completions.create(messages=CHAT, **options)
    chunks = list(
        client.chat.completions.create(messages=CHAT, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    pieces = list(client.completions.create(prompt="Go on", stream=True, **options))
    assert "".join(p.choices[0].text for p in pieces) == served.text(steering, max_tokens=40, temperature=0.8, seed=3)


def test_steering_is_a_field_of_the_request(served: Served) -> None:
    plain = served.text()
    steered = served.text({"all": 1.0})
    assert steered != plain
    assert served.text([{"name": "all"}]) == steered
    assert served.text([{"name": "all", "strength": 0.25}, {"name": "all", "strength": 0.75}]) == steered
    assert served.text({"all": 0.0}) == served.text({}) == served.text([]) == plain
    card = httpx.get(served.url + "/steerers").json()["data"][0]
    assert (card["id"], card["strength"], card["layers"], card["positions"]) == ("all", 0.5, [1, 2], ["all"])
    assert card["cost"] == {"perplexity": None, "gain": 0.3}


def test_a_mixed_crowd_gets_what_each_would_get_alone(served: Served) -> None:
    wishes = [None, {"all": 1}, {"prompt": 1, "last": -0.5}, {"generated": 1.5}]
    asks: list[Any] = [
        {"steering": wishes[i % 4], "prompt": "Go on" * (1 + i % 3), "max_tokens": 5 + 3 * i, "temperature": i % 2}
        | {"seed": i}
        for i in range(12)
    ]
    alone = [served.text(**ask) for ask in asks]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda ask: served.text(**ask), asks)) == alone


# ---------------------------------------------------------------- errors


def test_bad_requests_say_what_was_wrong(served: Served) -> None:
    base = {"model": "tiny", "prompt": "Go", "max_tokens": 3}
    for message, change in {
        "unknown steerer 'love'; choose from all, generated, last, prompt": {"steering": {"love": 1}},
        "unknown steerer '../steerer.safetensors'": {"steering": [{"name": "../steerer.safetensors"}]},
        'give steering as {"fear": 0.8}': {"steering": "all"},
        "an item of steering": {"steering": [{"name": "all", "path": "x"}]},
        "a strength is a number": {"steering": [{"name": "all", "strength": True}]},
        "limit of 4 times": {"steering": {"all": 5}},
        "steering.all: Input should be a finite number": {"steering": {"all": float("nan")}},
        "all: Input should be a finite": {"steering": [{"name": "all", "strength": 1e308}] * 2},
        "in steering, a name is a text": {"steering": {"all": "1"}},
        "does not support n=2": {"n": 2},
        "does not support logprobs=1": {"logprobs": 1},
        "does not support tools=": {"tools": [{"type": "function"}]},
        "unknown field 'sterring'": {"sterring": {"all": 1}},
        "one prompt per request": {"prompt": ["a", "b"]},
        "a prompt is a text or": {"prompt": {"text": "a"}},
        "prompt: a prompt is": {"prompt": [[1, 1.5]]},
        "between 0 and 127": {"prompt": [500]},
        "exceeds the context of 256": {"prompt": "a" * 300},
        "beyond this server's limit of 240": {"max_tokens": 250},
        "max_tokens: Input should be greater": {"max_tokens": 0},
        "temperature: Input should be greater": {"temperature": -1},
        "give stop as": {"stop": ["a", ""]},
        "prompt: Field required": {"prompt": ...},
        "unknown model 'other'; this server has 'tiny'": {"model": "other"},
    }.items():
        body = {k: v for k, v in {**base, **change}.items() if v is not ...}
        answer = served.post(body)
        assert answer.status_code == (404 if "model" in change else 400), message
        error = answer.json()["error"]
        assert message in error["message"]
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="does not support n=2"):
        served.client().chat.completions.create(model="tiny", messages=CHAT, n=2)
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        served.client().models.retrieve("other")
    image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    with pytest.raises(openai.BadRequestError, match="reads text only"):
        served.client().chat.completions.create(model="tiny", messages=image)


def test_bodies_that_are_no_requests(served: Served) -> None:
    assert "Invalid JSON" in served.post(b"{nonsense").json()["error"]["message"]
    assert served.post(b"\xff\xfe").status_code == 400
    assert served.post(b"[]").status_code == 400
    assert served.post({}, **{"content-type": "text/plain"}).status_code == 415
    assert served.post({"prompt": "a" * LIMIT}).status_code == 413
    chunked = httpx.post(
        served.url + "/completions", content=iter([b"a" * 9000] * 3), headers={"content-type": "application/json"}
    )
    assert chunked.status_code == 413
    with pytest.raises(openai.APIStatusError, match="longer than this server's limit"):
        served.text(prompt="a" * 3_000_000)
    missing = httpx.get(served.url + "/nothing")
    assert missing.status_code == 404
    assert "error" in missing.json()
    assert httpx.get(served.url + "/completions").status_code == 405


def test_a_body_that_does_not_come_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    port = int(served.url.removesuffix("/v1").rpartition(":")[2])
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
        slow.sendall(head)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")
    with socket.create_connection(("127.0.0.1", port)) as left:
        left.sendall(head)
    assert served.text()


def test_a_full_queue_is_a_429_and_a_failed_pass_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny(), registry(), Limits(max_batch=1, max_queue=1))
    open_gate, forward = threading.Event(), engine.batch._forward
    monkeypatch.setattr(engine.batch, "_forward", lambda *args: (open_gate.wait(30), forward(*args))[1])
    with run.background(create_app(engine, model_name="tiny")) as url, ThreadPoolExecutor(2) as pool:
        served = Served(url, engine)
        running = pool.submit(served.text)
        wait(lambda: engine.queue_length == 0 and engine.metrics.tokens["prompt"] == 0)
        time.sleep(0.1)
        waiting = pool.submit(served.text)
        wait(lambda: engine.queue_length == 1)
        with pytest.raises(openai.RateLimitError, match="waiting already"):
            served.text()
        open_gate.set()
        assert running.result() == waiting.result()
        assert served.metric('emocircuits_requests_total{outcome="rejected"}') == 1
        monkeypatch.setattr(engine.batch, "_forward", lambda *_: 1 / 0)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="generation failed"):
                served.client().completions.create(model="tiny", prompt="Go", stream=stream)
        steps = iter(range(3))
        monkeypatch.setattr(engine.batch, "_forward", lambda *args: (next(steps), forward(*args))[1])
        with pytest.raises(openai.APIError, match="generation failed"):
            list(served.client().completions.create(model="tiny", prompt="Go", stream=True, temperature=0))
        monkeypatch.setattr(engine.batch, "_forward", forward)
        assert served.text() == running.result(), "the server goes on"
        assert hooks(engine.batch.module) == 0
    engine.close()


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = served.engine.batch._forward
    monkeypatch.setattr(served.engine.batch, "_forward", lambda *args: (time.sleep(0.02), forward(*args))[1])
    before = served.engine.metrics.requests["cancelled"]
    generated = served.engine.metrics.tokens["generated"]
    if stream:
        options: Any = {"model": "tiny", "max_tokens": 240, "temperature": 0}
        chunks = served.client().completions.create(prompt="Go on", stream=True, **options)
        next(iter(chunks))
        chunks.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            served.text(max_tokens=240, timeout=0.3)
    wait(lambda: served.engine.batch_size == 0)
    assert served.engine.metrics.requests["cancelled"] == before + 1
    assert served.engine.metrics.tokens["generated"] - generated < 200


# ---------------------------------------------------------------- operation


def test_health_metrics_and_loading() -> None:
    app = create_app(model_name="tiny")
    with run.background(app) as url:
        loading = httpx.get(url.removesuffix("/v1") + "/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        with pytest.raises(openai.InternalServerError, match="still loading"):
            Served(url, app.state.engine).text()
        app.state.engine = Engine(tiny(), registry())
        served = Served(url, app.state.engine)
        ready = httpx.get(url.removesuffix("/v1") + "/health")
        assert (ready.status_code, ready.json()["status"], ready.json()["model"]) == (200, "ready", "tiny")
        served.text(max_tokens=7)
        served.post({"model": "tiny"})
        assert served.metric('emocircuits_requests_total{outcome="ok"}') == 1
        assert served.metric('emocircuits_requests_total{outcome="invalid"}') == 1
        assert served.metric('emocircuits_tokens_total{kind="prompt"}') == 6
        assert served.metric('emocircuits_tokens_total{kind="generated"}') == 7
        assert served.metric("emocircuits_request_seconds_count") == 1
        assert served.metric("emocircuits_request_seconds_sum") > 0
        assert served.metric("emocircuits_queue_length") == served.metric("emocircuits_batch_size") == 0
        app.state.engine.close()


def test_the_key_and_the_host_are_checked(served: Served) -> None:
    app = create_app(served.engine, model_name="tiny", api_key="sesame", hosts=["127.0.0.1", "[::1]"])
    with run.background(app) as url:
        locked = Served(url, served.engine)
        assert locked.client("sesame").models.list().data[0].id == "tiny"
        for key in ("wrong", "sesam", "sésame"):
            for path in ("/models", "/steerers", "/models/tiny"):
                answer = httpx.get(url + path, headers={"authorization": f"Bearer {key}".encode()})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            locked.text()
        assert locked.post({"model": "tiny", "prompt": "a" * 10**6}).status_code == 401, "before the body is read"
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
        assert httpx.get(url.removesuffix("/v1") + "/metrics").status_code == 401
        for host, status in {"evil.example": 400, "[::1]:80": 200}.items():
            assert httpx.get(url.removesuffix("/v1") + "/health", headers={"host": host}).status_code == status


# ---------------------------------------------------------------- the command


def failure(capsys: Any, *options: str) -> str:
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_command_refuses_what_cannot_work(tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMOCIRCUITS_API_KEY", raising=False)
    file = str(registry().steerers["all"].save(tmp_path / "all.safetensors"))
    assert "lets others in" in failure(capsys, "--host", "0.0.0.0")
    assert "holds no API key" in failure(capsys, "--api-key-env", "NO_SUCH_VARIABLE")
    assert "write it like fear=" in failure(capsys, "--steerer", file)
    assert "given twice" in failure(capsys, "--steerer", f"a={file}", "--steerer", f"a={file}")
    assert "does not exist" in failure(capsys, "--steerer", "a=nowhere.safetensors")
    assert "letters, digits" in failure(capsys, "--steerer", f"a/b={file}")
    assert "max_batch must be at least 1" in failure(capsys, "--max-batch", "0")
    missing = str(tmp_path / "missing")
    assert "missing does not exist" in failure(capsys, "--port", "0", "--model", missing, "--steerer", f"a={file}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in failure(capsys, "--port", str(taken.getsockname()[1]))
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r'pip install "emocircuits\[serve\]"'):
        run.check_packages()


def test_keys_reach_and_names(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMOCIRCUITS_API_KEY", " secret ")
    assert run.api_key(None) == "secret"
    monkeypatch.setenv("OTHER", " ")
    with pytest.raises(InputError, match="OTHER"):
        run.api_key("OTHER")
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        run.check_reach(host, None, False)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", ""):
        with pytest.raises(InputError, match="lets others in"):
            run.check_reach(host, None, False)
        run.check_reach(host, "key", False)
        run.check_reach(host, None, True)
    assert run.served_name(str(tmp_path)) == tmp_path.name, "no path of this machine goes to clients"
    assert run.served_name("org/model") == "org/model"
    assert Registry.load([]).cards() == []


def test_a_short_soak(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "experiments" / "benchmarks"))
    from soak import main as soak

    soak(["--requests", "60", "--out", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert found["hooks_left"] == 0
    assert set(found["outcomes"]) == {"whole", "stream", "cancelled", "wrong"}
    assert sum(found["outcomes"].values()) == 60
    assert found["distinct_answers"] > 10
