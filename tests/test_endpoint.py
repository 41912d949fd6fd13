"""Does a model behind a server get the scores it gets when it is loaded here?"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from plw_mlflow.endpoint import Endpoint
from plw_mlflow.scoring import Scorer
from tests.test_scoring import FEW_SHOT, PAIRS, WINDOW, byte_tokenizer, instances, make_model


class Server(ThreadingHTTPServer):
    """A completions server as vLLM is one, as far as the harness asks it; it counts what it is asked."""

    def __init__(self, model, tokenizer, window=WINDOW):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.window = model, tokenizer, window
        self.prompts, self.lock = [], threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def complete(self, asked):
        (prompt,) = asked["prompt"]
        with self.lock, torch.inference_mode():  # torch's threads are few
            self.prompts.append(prompt)
            tokens = list(prompt)
            for _ in range(asked["max_tokens"]):
                tokens.append(self.model(torch.tensor([tokens])).logits[0, -1].argmax().item())
                if tokens[-1] in asked.get("stop_token_ids", []):  # vLLM leaves it out of the text
                    stops = []
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
    def do_GET(self):
        self.answer({"data": [{"id": "served", "max_model_len": self.server.window}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "served"
        self.answer({"choices": [self.server.complete(asked)]})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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
        assert len(server.prompts) == here.done  # each distinct request once
        again = Endpoint(server.address, "served", str(tmp_path / "tokenizer"), tmp_path / "kept")
        assert (again.loglikelihood(pairs, True), again.generate_until(texts, True)) == found
        assert len(server.prompts) == here.done


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


def test_mistakes_are_told(tmp_path):
    model, tokenizer = make_model("llama"), byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with serving(model, tokenizer) as server:
        address = server.address
        with pytest.raises(ValueError, match="has no model 'other'; it has served"):
            Endpoint(address, "other", str(tmp_path))
        server.window = None
        with pytest.warns(UserWarning, match="does not say how many tokens its model takes; 2048 it is"):
            endpoint = Endpoint(address, "served", str(tmp_path))
    with pytest.raises(ConnectionError, match="no server answers at http://127"):
        Endpoint(address, "served", str(tmp_path))
    endpoint.max_retries = 1
    with pytest.raises(ConnectionError, match="gives no answer"):
        endpoint.loglikelihood(instances("loglikelihood", ("a", "b")), True)
