"""Does a model behind a server get the scores it gets when it is loaded here?"""

import json
import math
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep

import pytest
import torch

from plw_mlflow.config import EvaluateConfig
from plw_mlflow.evaluation.endpoint import Endpoint
from plw_mlflow.evaluation.scorer import Scorer
from tests.evaluation.test_scorer import FEW_SHOT, PAIRS, WINDOW, byte_tokenizer, instances, make_model


class Server(ThreadingHTTPServer):
    """A completions server as vLLM is one, as far as the harness asks it; it counts what it is asked."""

    def __init__(self, model, tokenizer, window=WINDOW):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.prompts, self.headers, self.lock = [], [], threading.Lock()
        self.lie = lambda answer: answer

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def complete(self, asked):
        (prompt,) = asked["prompt"]
        with self.lock, torch.inference_mode():  # torch's threads are few
            self.prompts.append(prompt)
            tokens, stops = list(prompt), []
            for _ in range(asked["max_tokens"]):
                tokens.append(self.model(torch.tensor([tokens])).logits[0, -1].argmax().item())
                if tokens[-1] in asked.get("stop_token_ids", []):  # vLLM leaves it out of the text
                    break
                text = self.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
                stops = [stop for stop in asked.get("stop", []) if stop in text]
                if stops or tokens[-1] == self.tokenizer.eos_token_id:
                    break
            for stop in stops:
                text = text.partition(stop)[0]
            if not asked.get("echo"):
                return {"index": 0, "text": text}
            rows = self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        own = [rows[place, token].item() for place, token in enumerate(tokens[1:])]
        best = [{str(row.argmax().item()): row.max().item()} for row in rows[:-1]]
        return {"index": 0, "text": text, "logprobs": {"token_logprobs": [None, *own], "top_logprobs": [None, *best]}}


class Handler(BaseHTTPRequestHandler):
    status = 200  # of an answer to a POST
    drip = 0.0  # seconds between its bytes
    echoes = False  # whether an answer to a POST is what was asked, headers and all

    def do_GET(self):
        self.answer({"data": [{"id": "served", "max_model_len": self.server.window}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "served"
        self.server.headers.append(dict(self.headers))
        if self.echoes:
            self.answer(str(self.headers))
            return
        self.answer(self.server.lie({"choices": [self.server.complete(asked)]}))

    def answer(self, content):
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(self.status if self.command == "POST" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not self.drip or self.command == "GET":
            self.wfile.write(body)
            return
        with suppress(OSError):  # whoever asked has gone
            for byte in body[:40]:
                self.wfile.write(bytes([byte]))
                sleep(self.drip)

    def log_message(self, *_):
        pass


@contextmanager
def serving(*args):
    server = Server(*args)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("bos", [False, True])
def test_scores_are_those_of_the_model_itself(tmp_path, bos):
    model, tokenizer = make_model("llama"), byte_tokenizer(bos=bos)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pairs = instances("loglikelihood", *PAIRS[:-2], PAIRS[0])
    settings = {"until": ["e", "q"], "max_gen_toks": 12}
    texts = instances("generate_until", *((FEW_SHOT[:n], settings) for n in (9, 20, 30)))
    here = Scorer(model, tokenizer)
    expected = here.loglikelihood(pairs, True), here.generate_until(texts, True)
    with serving(model, tokenizer) as server:
        endpoint = Endpoint(server.address, "served", str(tmp_path / "tokenizer"), tmp_path / "kept")
        found = endpoint.loglikelihood(pairs, True), endpoint.generate_until(texts, True)
        assert [ll for ll, _ in found[0]] == pytest.approx([ll for ll, _ in expected[0]], rel=1e-5)
        assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in expected[0]]
        assert found[1] == expected[1]
        assert len(server.prompts) == here.computed  # each distinct request once
        again = Endpoint(server.address, "served", str(tmp_path / "tokenizer"), tmp_path / "kept")
        assert (again.loglikelihood(pairs, True), again.generate_until(texts, True)) == found
        assert len(server.prompts) == here.computed


def test_what_does_not_fit_the_window_is_cut_and_counted(tmp_path):
    model, tokenizer = make_model("llama"), byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with serving(model, tokenizer) as server:
        endpoint = Endpoint(server.address, "served", str(tmp_path))
        pairs = instances("loglikelihood", ("x" * 200, " y"), ("Why?", " because" * 20))
        short, long = endpoint.loglikelihood(pairs, True)
        assert all(len(prompt) < WINDOW for prompt in server.prompts)
    assert (endpoint.truncated, endpoint.windowed) == ({"task": 1}, {"task": 1})
    assert long[0] < 40 * short[0] < 0


def test_mistakes_are_told(tmp_path, monkeypatch):
    model, tokenizer = make_model("llama"), byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with serving(model, tokenizer) as server:
        address = server.address
        with pytest.raises(ValueError, match="has no model 'other'; it has served"):
            Endpoint(address, "other", str(tmp_path))
        server.window = None
        with pytest.warns(UserWarning, match="does not say how many tokens its model takes; 2048 are assumed"):
            endpoint = Endpoint(address, "served", str(tmp_path))
    with pytest.raises(ConnectionError, match="no server answers at http://127"):
        Endpoint(address, "served", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="gives no answer"):
        endpoint.loglikelihood(instances("loglikelihood", ("a", "b")), True)


# What a server may answer, and what must not become of it.


def changed(**parts):
    """A lie: some parts of the log-probabilities, changed."""

    def lie(answer):
        logprobs = answer["choices"][0]["logprobs"]
        for name, change in parts.items():
            logprobs[name] = change(logprobs[name])
        return answer

    return lie


def only_what_is_new(answer):
    """What a server answers that does not know echo."""
    logprobs = answer["choices"][0]["logprobs"]
    return {"choices": [{"index": 0, "text": "x", "logprobs": {name: part[-1:] for name, part in logprobs.items()}}]}


LIES = {
    "no echo": (only_what_is_new, "does not echo the prompt: for 13 tokens it gives 1 log-probabilities"),
    "too long": (
        changed(token_logprobs=lambda own: [*own, -1.0], top_logprobs=lambda top: [*top, {"a": -1.0}]),
        "does not echo the prompt: for 13 tokens it gives 15",
    ),
    "positive": (changed(token_logprobs=lambda own: [None, *(0.5 for _ in own[1:])]), "0.5 is not a log-probability"),
    "not a number": (changed(token_logprobs=lambda own: [None, *(math.nan for _ in own[1:])]), "nan is not a log-prob"),
    "without end": (
        changed(token_logprobs=lambda own: [None, *(-math.inf for _ in own[1:])]),
        "-inf is not a log-prob",
    ),
    "text": (changed(token_logprobs=lambda own: [None, *("-1" for _ in own[1:])]), "-1 is not a log-probability"),
    "truth": (changed(token_logprobs=lambda own: [None, *(False for _ in own[1:])]), "False is not a log-probability"),
    "shifted": (
        changed(token_logprobs=lambda own: [*own[1:], -1.0], top_logprobs=lambda top: [*top[1:], {"a": -1.0}]),
        "its first log-probability is not null",
    ),
    "unlikely": (
        changed(token_logprobs=lambda own: [None, *(-1e300 for _ in own[1:])]),
        "-1e.300 is not a log-probability",
    ),
    "another index": (lambda answer: {"choices": [answer["choices"][0] | {"index": 7}]}, "does not hold one choice"),
    "repeated": (
        changed(token_logprobs=lambda own: [None] + [-1.0] * (len(own) - 1)),
        "gives every token the log-probability -1|is above the largest one",
    ),
    "all alike": (
        changed(
            token_logprobs=lambda own: [None] + [-1.0] * (len(own) - 1),
            top_logprobs=lambda top: [None] + [{"a": -0.5}] * (len(top) - 1),
        ),
        "gives every token the log-probability -1",
    ),
    "above the largest": (changed(top_logprobs=lambda top: [None] + [{"a": -99.0}] * (len(top) - 1)), "is above the"),
    "no largest": (changed(top_logprobs=lambda top: [None] * len(top)), "does not name the likeliest token"),
    "no probabilities": (lambda answer: {"choices": [{"index": 0, "text": "a"}]}, "gives no log-probabilities"),
    "two choices": (lambda answer: {"choices": answer["choices"] * 2}, "does not hold one choice"),
    "a list": (lambda answer: [1], "does not hold one choice"),
    "no JSON": (lambda answer: "<html>", "is not JSON"),
    "control characters": (
        lambda answer: {
            "choices": [
                {"logprobs": {"token_logprobs": [None, *range(-13, 0)], "top_logprobs": [{"a": "\x1b[2J"}] * 14}}
            ]
        },
        r"\\x1b\[2J is not a log-probability",
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server, and the folder of its tokenizer."""
    model, tokenizer, folder = make_model("llama"), byte_tokenizer(), tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    with serving(model, tokenizer) as server:
        yield server, str(folder)


@pytest.mark.parametrize("name", LIES)
def test_an_answer_that_can_be_no_score_is_refused(served, name):
    server, folder = served
    server.lie, message = LIES[name]
    endpoint = Endpoint(server.address, "served", folder)
    with pytest.raises(ValueError, match=f"cannot give scores: .*({message})"):
        endpoint.loglikelihood(instances("loglikelihood", ("Is it so?", " yes")), True)


def test_a_generation_without_a_text_is_refused(served):
    server, folder = served
    server.lie = lambda answer: {"choices": [{"index": 0, "text": None}]}
    endpoint = Endpoint(server.address, "served", folder)
    with pytest.raises(ValueError, match="its answer holds no text"):
        endpoint.generate_until(instances("generate_until", ("Is it so?", {"until": ["e"], "max_gen_toks": 4})), True)


def test_an_answer_is_bounded_in_size_and_in_time(served, monkeypatch):
    server, folder = served
    server.lie = lambda answer: "x" * 5000
    endpoint = Endpoint(server.address, "served", folder)
    asked = instances("loglikelihood", ("Is it so?", " yes"))
    monkeypatch.setattr("plw_mlflow.evaluation.endpoint.time.sleep", lambda seconds: None)
    monkeypatch.setattr("plw_mlflow.evaluation.endpoint.ANSWER_BYTES", 4000)
    with pytest.raises(ConnectionError, match="an answer of more than 0 MiB"):
        endpoint.loglikelihood(asked, True)
    monkeypatch.setattr("plw_mlflow.evaluation.endpoint.ANSWER_BYTES", 9000)
    monkeypatch.setattr("plw_mlflow.evaluation.endpoint.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(Handler, "drip", 0.05)  # seconds a byte
    with pytest.raises(ConnectionError, match="an answer that takes longer than 0 s"):
        endpoint.loglikelihood(asked, True)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, ValueError, "refuses access .*--endpoint-key-env NAME"),
        (400, ValueError, "refuses the request: status 400"),
        (404, ValueError, "refuses the request: status 404"),
        (302, ValueError, "redirects to another address"),
        (500, ConnectionError, "gives no answer: status 500"),
    ],
)
def test_a_refusal_is_told_without_the_key(served, monkeypatch, capfd, status, error, message):
    server, folder = served
    monkeypatch.setenv("OPENAI_API_KEY", "canary-of-the-environment")
    monkeypatch.setenv("MY_KEY", "canary-of-mine")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    endpoint = Endpoint(server.address, "served", folder, key_env="MY_KEY")
    monkeypatch.setattr(Handler, "status", status)
    monkeypatch.setattr(Handler, "echoes", True)
    server.headers.clear()
    with pytest.raises(error, match=message) as refused:
        endpoint.loglikelihood(instances("loglikelihood", ("Is it so?", " yes")), True)
    assert "canary" not in str(refused.value) + "".join(capfd.readouterr())
    assert {sent["Authorization"] for sent in server.headers} == {"Bearer canary-of-mine"}


def test_no_key_is_sent_that_was_not_asked_for_nor_to_a_proxy(served, monkeypatch, tmp_path):
    server, folder = served
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server.lie = lambda answer: answer
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password canary\n")
    endpoint = Endpoint(server.address, "served", folder)
    server.headers.clear()
    endpoint.loglikelihood(instances("loglikelihood", ("Is it so?", " yes")), True)
    assert server.headers
    assert all("Authorization" not in sent for sent in server.headers)


def test_a_key_is_sent_to_https_or_this_machine_alone(monkeypatch):
    monkeypatch.setenv("MY_KEY", "canary")
    with pytest.raises(ValueError, match="a key is sent only to https or to this machine, not to http://server/v1"):
        Endpoint("http://server/v1", "served", "toy", key_env="MY_KEY")
    with pytest.raises(
        ValueError, match="the environment variable NONE, which should hold the endpoint's key, is not set"
    ):
        Endpoint("https://server/v1", "served", "toy", key_env="NONE")


@pytest.mark.parametrize("address", ["ftp://server", "server:8000", "http://", "http://me:canary@server/v1"])
def test_an_address_that_cannot_be_used_is_refused_without_being_shown(address):
    with pytest.raises(ValueError, match=r"endpoint must (be an address|hold no user name)") as refused:
        EvaluateConfig(model="served", endpoint=address)
    assert "canary" not in str(refused.value)
