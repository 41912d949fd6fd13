"""A language model behind an OpenAI-compatible completions server, such as vLLM's.

For log-likelihoods the server must accept tokens as a prompt and echo them with their log-probabilities. Requests are
sent in the order of their tokens, so that those that begin alike go out together and a server with a prefix cache can
use it.

The client is our own. The harness's sends OPENAI_API_KEY to whatever address it is given, prints the key when a request
fails, and accepts any numbers as log-probabilities. Here every answer is bounded in size and time, and is checked
before it can become a score.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import ClientError, ClientSession, ClientTimeout
from lm_eval.models.utils import postprocess_generated_text

from plw_mlflow.errors import Unreachable, UserError, printable, reason
from plw_mlflow.evaluation import answer_store
from plw_mlflow.evaluation.caching_lm import CachingLM, PlannedBatch, Prompt, Query
from plw_mlflow.models import pretrained

CONCURRENT_REQUESTS = 16  # the server makes batches of them as it likes
BATCH_REQUESTS = 16 * CONCURRENT_REQUESTS  # whose answers are written to the store together
DEFAULT_WINDOW = 2048  # tokens, where the server does not name its model's window; the harness's default
SEED = 1234  # the harness's
ATTEMPTS = 3  # at a request that the server does not answer
ANSWER_SECONDS = 300.0  # for one answer, from the request to its last byte
ANSWER_BYTES = 1 << 26  # of one answer; 100,000 log-probabilities with their tokens take about a tenth
# Nats. Rounding may lift the log-probability of a certain token above 0, and above the largest one of its place.
ROUNDING = 1e-3
MIN_LOG_PROBABILITY = -1e5  # nats; no model makes a token less likely than this


class Endpoint(CachingLM):
    """The model that a server at `address` (http://HOST:PORT/v1) calls `model`. Texts are tokenised on this side.

    tokenizer: toy, a folder, or a hub id (unset: that of `model`). folder: where answers are kept (unset: they are
    not). key_env: the environment variable that holds the server's key, which is sent only to https or this machine.

    Raises Unreachable where no server answers, UserError for one that does not have the model.
    """

    def __init__(
        self,
        address: str,
        model: str,
        tokenizer: str | None = None,
        folder: Path | None = None,
        key_env: str | None = None,
    ) -> None:
        super().__init__()
        self.root = address.rstrip("/").removesuffix("/completions")
        self._model = model
        self._key = _key(self.root, key_env)
        window = self._window()
        self.tokenizer = pretrained.load_tokenizer(model, tokenizer)
        self.window = window - 2  # the token that the server generates and the last target count, too
        self.open_store(None if folder is None else folder / f"answers-{answer_store.key(self.root, model)[:16]}.jsonl")

    # What the harness wants to know of a language model.

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context, as in HFLM."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """A name for the tokenizer, by which the harness tells it from others."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError  # abstract in the harness, which calls it through methods that are replaced here

    # The batches in which CachingLM has requests answered.

    def plan_scores(self, queries: list[Query]) -> Iterator[PlannedBatch]:
        """Batches of queries in the order of their tokens."""
        numbers = sorted(range(len(queries)), key=lambda number: queries[number].inputs.astype(">u4").tobytes())
        yield from self._batches(numbers, queries, self._score)

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[PlannedBatch]:
        """Batches of prompts in the order of their tokens."""
        numbers = sorted(range(len(prompts)), key=lambda number: prompts[number].tokens.astype(">u4").tobytes())
        yield from self._batches(numbers, prompts, self.generate_otherwise)

    def generate_otherwise(self, prompts: list[Prompt]) -> list[str]:
        """What the server writes after each prompt, by the settings of each."""
        return self._concurrently(self._generate, prompts)

    def _batches(
        self, numbers: list[int], requests: Sequence[Any], compute: Callable[[list[Any]], list[Any]]
    ) -> Iterator[PlannedBatch]:
        for start in range(0, len(numbers), BATCH_REQUESTS):
            batch = numbers[start : start + BATCH_REQUESTS]
            yield batch, partial(compute, [requests[number] for number in batch])

    def _concurrently(self, answer: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(CONCURRENT_REQUESTS) as threads:
            try:
                return list(threads.map(answer, requests))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    # One request.

    def _score(self, queries: list[Query]) -> list[tuple[float, bool]]:
        """The log-likelihood of each query's targets, and whether greedy generation would give them."""
        return self._concurrently(self._log_likelihood, queries)

    def _log_likelihood(self, query: Query) -> tuple[float, bool]:
        tokens = [*query.inputs.tolist(), int(query.targets[-1])]
        log_probabilities, top = self._echo(tokens)
        first = len(tokens) - len(query.targets)
        values = log_probabilities[first - 1 :]  # the first token has none
        is_greedy = True
        for value, likeliest in zip(values, top[first : len(tokens)], strict=True):
            if not isinstance(likeliest, dict) or not likeliest:
                raise self._unusable("it does not name the likeliest token of each place (top_logprobs)")
            largest = max(self._checked(log_probability) for log_probability in likeliest.values())
            if value > largest + ROUNDING:
                raise self._unusable(f"a token's log-probability, {value:g}, is above the largest one, {largest:g}")
            is_greedy &= value >= largest
        return sum(values), is_greedy

    def _echo(self, tokens: list[int]) -> tuple[list[float], list[Any]]:
        """The checked log-probabilities of all tokens after the first, and the likeliest tokens of every place."""
        choice = self._complete(
            {"prompt": [tokens], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": SEED}
        )
        logprobs = choice.get("logprobs")
        logprobs = logprobs if isinstance(logprobs, dict) else {}
        own, top = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
        if not isinstance(own, list) or not isinstance(top, list):
            raise self._unusable("it gives no log-probabilities (token_logprobs and top_logprobs in logprobs)")
        if len(own) not in (len(tokens), len(tokens) + 1) or len(top) != len(own):
            raise self._unusable(
                f"it does not echo the prompt: for {len(tokens)} tokens it gives {len(own)} log-probabilities and "
                f"{len(top)} times the largest ones"
            )
        if own[0] is not None:
            raise self._unusable("its first log-probability is not null, so that all of them may be shifted")
        values = [self._checked(value) for value in own[1 : len(tokens)]]
        if len(values) > 3 and len(set(values)) == 1 and values[0] < -ROUNDING:  # a few tokens may all be certain
            raise self._unusable(f"it gives every token the log-probability {values[0]:g}")
        return values, top

    def _checked(self, value: Any) -> float:
        """The value, if it can be a log-probability. Raises UserError otherwise."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not MIN_LOG_PROBABILITY <= value <= ROUNDING:  # NaN fails, too
            raise self._unusable(f"{_shown(value)} is not a log-probability")
        return float(value)

    def _generate(self, prompt: Prompt) -> str:
        """What the server writes after a prompt, cut off at the first stop sequence.

        The template's own end is sent as a token, by vLLM's name for that. It is also sent as a text, for servers that
        write special tokens into their answers.
        """
        ends = sorted({*prompt.ends} - {self.eot_token_id})
        until = [*prompt.until, *self.tokenizer.convert_ids_to_tokens(ends)]
        settings = {name: value for name, value in json.loads(prompt.settings).items() if name != "do_sample"}
        content = {"prompt": [prompt.tokens.tolist()], "max_tokens": prompt.max_new_tokens, "stop": until, "seed": SEED}
        content |= {"temperature": 0} | settings | ({"stop_token_ids": ends} if ends else {})
        text = self._complete(content).get("text")
        if not isinstance(text, str):
            raise self._unusable("its answer holds no text")
        return str(postprocess_generated_text(text, until, None))

    def _complete(self, content: dict[str, Any]) -> dict[str, Any]:
        """The choice in the server's answer, of which there must be one."""
        answer = self._request("POST", "completions", {"model": self._model, **content})
        choices = answer.get("choices") if isinstance(answer, dict) else None
        (choice, *more) = choices if isinstance(choices, list) and choices else [None]
        if more or not isinstance(choice, dict) or choice.get("index", 0) != 0:
            raise self._unusable("its answer does not hold one choice")
        return choice

    def _unusable(self, why: str) -> UserError:
        return UserError(f"the endpoint {self.root} cannot give scores: {why}")

    def _request(
        self,
        method: str,
        path: str,
        content: dict[str, Any] | None = None,
        *,
        attempts: int = ATTEMPTS,
        absent: Any = None,
        unanswered: str = "the endpoint {} gives no answer",
    ) -> Any:
        """The server's answer, as JSON.

        absent: what to give where the server has no such path (unset: that is an error). unanswered: the beginning of
        the message where it does not answer.

        Raises Unreachable where it does not answer at the last of the attempts, UserError where it refuses the
        request.
        """
        trouble = ""
        for attempt in range(attempts):
            if attempt:
                time.sleep(2.0**attempt / 2)
            try:
                status, received = self._send(method, path, content)
            except (ClientError, OSError) as error:
                trouble = reason(error)
                continue
            if status == 200:
                try:
                    return json.loads(received)
                except (ValueError, RecursionError):
                    raise self._unusable("its answer is not JSON") from None
            if status == 404 and absent is not None:
                return absent
            text = received.decode(errors="replace")
            if self._key is not None:  # a server may send it back
                text = text.replace(self._key, "***")
            trouble = f"status {status}: {_shown(text)}"
            if status in (401, 403):
                raise UserError(
                    f"the endpoint {self.root} refuses access (status {status}); name the environment variable that "
                    "holds its key: --endpoint-key-env NAME"
                )
            if 300 <= status < 400:
                raise UserError(f"the endpoint {self.root} redirects to another address; give that one as --endpoint")
            if 400 <= status < 500 and status not in (408, 429):
                raise UserError(f"the endpoint {self.root} refuses the request: {trouble}")
        raise Unreachable(f"{unanswered.format(self.root)}: {trouble}")

    def _send(self, method: str, path: str, content: dict[str, Any] | None) -> tuple[int, bytes]:
        """The status and the content of an answer. Raises OSError for one that takes too long or is too large."""
        try:
            return asyncio.run(self._receive(method, path, content))
        except TimeoutError:
            raise TimeoutError(f"an answer that takes longer than {ANSWER_SECONDS:.0f} s") from None

    async def _receive(self, method: str, path: str, content: dict[str, Any] | None) -> tuple[int, bytes]:
        """The same. Proxies and .netrc of the environment are not used, so that a key goes to the endpoint alone."""
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        timeout = ClientTimeout(total=ANSWER_SECONDS)  # to the last byte, however slowly they come
        async with (
            ClientSession(timeout=timeout, headers=headers) as session,
            session.request(method, f"{self.root}/{path}", json=content, allow_redirects=False) as answer,
        ):
            received = bytearray()
            async for part in answer.content.iter_chunked(1 << 16):
                received += part
                if len(received) > ANSWER_BYTES:
                    raise OSError(f"an answer of more than {ANSWER_BYTES >> 20} MiB")
            return answer.status, bytes(received)

    def _window(self) -> int:
        """How many tokens the server's model takes, which vLLM says in its list of models."""
        answer = self._request("GET", "models", attempts=1, absent={}, unanswered="no server answers at {}")
        rows = answer.get("data") if isinstance(answer, dict) else None
        models = {str(row["id"]): row for row in rows or [] if isinstance(row, dict) and "id" in row}
        if models and self._model not in models:
            raise UserError(
                f"the endpoint {self.root} has no model {self._model!r}; it has {_shown(', '.join(sorted(models)))}"
            )
        window = models.get(self._model, {}).get("max_model_len")
        if not isinstance(window, int) or window < 3:
            warnings.warn(
                f"the endpoint {self.root} does not say how many tokens its model takes; {DEFAULT_WINDOW} are assumed",
                stacklevel=3,
            )
            return DEFAULT_WINDOW
        return window


def _key(root: str, key_env: str | None) -> str | None:
    """The key for a server. Raises UserError where there is none, or where others could read it in transit."""
    if key_env is None:
        return None
    if not (key := os.environ.get(key_env)):
        raise UserError(f"the environment variable {key_env}, which should hold the endpoint's key, is not set")
    parts = urlsplit(root)
    if parts.scheme != "https" and not _is_loopback(str(parts.hostname)):
        raise UserError(f"a key is sent only to https or to this machine, not to {root}; use https")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {key_env} holds characters that a key cannot have")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(value: Any) -> str:
    """A server's words, short and on one line."""
    return printable(" ".join(str(value).split()))[:200]
