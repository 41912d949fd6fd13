"""Endpoint: a model behind an OpenAI-compatible completions server (vLLM's, say).

For log-likelihoods the server has to take tokens as a prompt and to echo them with their log-probabilities. Requests
go out sorted, those that begin alike together, so that a server that keeps what it has computed of a prompt can.

The client is our own, not the harness's, since that one sends OPENAI_API_KEY to whatever address it is given, prints it
when a request fails, and takes any numbers for log-probabilities. Whatever a server answers is checked before it can
become a score, and bounded in size and time.
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

CONCURRENT = 16  # requests at a time; a server makes batches of them as it likes
BATCH = 16 * CONCURRENT  # requests whose answers are kept together
WINDOW = 2048  # tokens, where the server does not say; the harness's default
SEED = 1234  # the harness's
ATTEMPTS = 3  # at a request that a server does not answer
ANSWER_SECONDS = 300.0  # for one answer, from the request to its last byte
ANSWER_BYTES = 1 << 26  # of one answer; 100,000 log-probabilities with their names take about a tenth
# Rounding may lift the log-probability of a certain token above 0, and above the largest that is named beside it.
SLACK = 1e-3
LEAST = -1e5  # nats; a token that is less likely than this is none of a model's


class Endpoint(CachingLM):
    """The model that a server at `address` (http://HOST:PORT/v1) calls `model`; its tokenizer is read here.

    tokenizer: toy, a folder, or a hub id (unset: that of `model`). folder: where finished requests are kept. key_env:
    the environment variable with the key that the server asks for; a key goes out to https or this machine alone.

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
        self.window = window - 2  # the server's own token, and the last target, count too
        self.keep(None if folder is None else folder / f"answers-{answer_store.key(self.root, model)[:16]}.jsonl")

    # What the harness asks of a language model.

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text follows that has no context, as in HFLM."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What tells the tokenizer from others."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError  # abstract in the harness, which calls it through methods that are replaced here

    # Batches, as CachingLM wants them.

    def plan_scores(self, queries: list[Query]) -> Iterator[PlannedBatch]:
        """Queries that begin alike together."""
        numbers = sorted(range(len(queries)), key=lambda number: queries[number].inputs.astype(">u4").tobytes())
        yield from self._batches(numbers, queries, self._score)

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[PlannedBatch]:
        """Prompts that begin alike together."""
        numbers = sorted(range(len(prompts)), key=lambda number: prompts[number].tokens.astype(">u4").tobytes())
        yield from self._batches(numbers, prompts, self.generate_otherwise)

    def generate_otherwise(self, prompts: list[Prompt]) -> list[str]:
        """What the server writes after each prompt, greedily or as its settings say."""
        return self._each(self._generate, prompts)

    def _batches(
        self, numbers: Sequence[int], asked: Sequence[Any], run: Callable[[list[Any]], list[Any]]
    ) -> Iterator[PlannedBatch]:
        for start in range(0, len(numbers), BATCH):
            some = list(numbers[start : start + BATCH])
            yield some, partial(run, [asked[number] for number in some])

    def _each(self, call: Callable[[Any], Any], asked: Sequence[Any]) -> list[Any]:
        with ThreadPoolExecutor(CONCURRENT) as threads:
            try:
                return list(threads.map(call, asked))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    # One request.

    def _score(self, queries: list[Query]) -> list[tuple[float, bool]]:
        found = self._each(self._log_probabilities, queries)
        return [(sum(own), is_greedy) for own, is_greedy in found]

    def _log_probabilities(self, query: Query) -> tuple[list[float], bool]:
        """Log-probabilities of the targets of a query, and whether each is the likeliest token."""
        tokens = [*query.inputs.tolist(), int(query.targets[-1])]
        choice = self._complete(
            {"prompt": [tokens], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": SEED}
        )
        said = choice.get("logprobs")
        own, top = (said.get(name) if isinstance(said, dict) else None for name in ("token_logprobs", "top_logprobs"))
        if not isinstance(own, list) or not isinstance(top, list):
            raise self._unusable("it gives no log-probabilities (token_logprobs and top_logprobs in logprobs)")
        if len(own) not in (len(tokens), len(tokens) + 1) or len(top) != len(own):
            raise self._unusable(
                f"it does not echo the prompt: for {len(tokens)} tokens it gives {len(own)} log-probabilities and "
                f"{len(top)} times the largest ones"
            )
        if own[0] is not None:
            raise self._unusable("its first log-probability is not null, so that all of them may be shifted")
        given = [self._checked(value) for value in own[1 : len(tokens)]]
        if len(given) > 3 and len(set(given)) == 1 and given[0] < -SLACK:  # a few may all be certain
            raise self._unusable(f"it gives every token the log-probability {given[0]:g}")
        first = len(tokens) - len(query.targets)
        values = given[first - 1 :]
        is_greedy = True
        for value, likeliest in zip(values, top[first : len(tokens)], strict=True):
            if not isinstance(likeliest, dict) or not likeliest:
                raise self._unusable("it does not name the likeliest token of each place (top_logprobs)")
            largest = max(self._checked(one) for one in likeliest.values())
            if value > largest + SLACK:
                raise self._unusable(f"a token's log-probability, {value:g}, is above the largest one, {largest:g}")
            is_greedy &= value >= largest
        return values, is_greedy

    def _checked(self, value: Any) -> float:
        """A log-probability. Raises UserError for what can be none."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not LEAST <= value <= SLACK:  # which no NaN does
            raise self._unusable(f"{_shown(value)} is no log-probability")
        return float(value)

    def _generate(self, prompt: Prompt) -> str:
        """What the server writes after a prompt, cut off where it was to stop.

        The template's own end goes out as a token, by vLLM's name for that, and spelled, for a server that writes
        special tokens out.
        """
        ends = sorted({*prompt.ends} - {self.eot_token_id})
        until = [*prompt.until, *self.tokenizer.convert_ids_to_tokens(ends)]
        settings = {name: value for name, value in json.loads(prompt.other).items() if name != "do_sample"}
        asked = {"prompt": [prompt.tokens.tolist()], "max_tokens": prompt.most, "stop": until, "seed": SEED}
        asked |= {"temperature": 0} | settings | ({"stop_token_ids": ends} if ends else {})
        text = self._complete(asked).get("text")
        if not isinstance(text, str):
            raise self._unusable("its answer holds no text")
        return str(postprocess_generated_text(text, until, None))

    def _complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The one choice of an answer."""
        answer = self._ask("POST", "completions", {"model": self._model, **asked})
        choices = answer.get("choices") if isinstance(answer, dict) else None
        (choice, *more) = choices if isinstance(choices, list) and choices else [None]
        if more or not isinstance(choice, dict) or choice.get("index", 0) != 0:
            raise self._unusable("its answer does not hold one choice")
        return choice

    def _unusable(self, why: str) -> UserError:
        return UserError(f"the endpoint {self.root} cannot give scores: {why}")

    def _ask(
        self,
        method: str,
        path: str,
        asked: dict[str, Any] | None = None,
        *,
        attempts: int = ATTEMPTS,
        absent: Any = None,
        unanswered: str = "the endpoint {} gives no answer",
    ) -> Any:
        """What the server answers, as JSON, or `absent` where it has no such path, if that is given.

        Raises Unreachable where it does not answer at the last of the attempts, UserError where it refuses the
        request.
        """
        trouble = ""
        for attempt in range(attempts):
            if attempt:
                time.sleep(2.0**attempt / 2)
            try:
                status, content = self._request(method, path, asked)
            except (ClientError, OSError) as error:
                trouble = reason(error)
                continue
            if status == 200:
                try:
                    return json.loads(content)
                except (ValueError, RecursionError):
                    raise self._unusable("its answer is no JSON") from None
            if status == 404 and absent is not None:
                return absent
            said = content.decode(errors="replace")
            if self._key is not None:  # which a server may send back
                said = said.replace(self._key, "***")
            trouble = f"status {status}: {_shown(said)}"
            if status in (401, 403):
                raise UserError(
                    f"the endpoint {self.root} refuses access (status {status}); name the environment variable that "
                    "holds its key: --endpoint-key-env NAME"
                )
            if 300 <= status < 400:
                raise UserError(f"the endpoint {self.root} sends to another address; give that one as --endpoint")
            if 400 <= status < 500 and status not in (408, 429):
                raise UserError(f"the endpoint {self.root} refuses the request: {trouble}")
        raise Unreachable(f"{unanswered.format(self.root)}: {trouble}")

    def _request(self, method: str, path: str, asked: dict[str, Any] | None) -> tuple[int, bytes]:
        """Status and content of an answer. Raises OSError for one that takes too long or is too large."""
        try:
            return asyncio.run(self._answer_of(method, path, asked))
        except TimeoutError:
            raise TimeoutError(f"an answer that takes longer than {ANSWER_SECONDS:.0f} s") from None

    async def _answer_of(self, method: str, path: str, asked: dict[str, Any] | None) -> tuple[int, bytes]:
        """The same. Settings of the environment (proxies, .netrc) are not used: a key goes to the endpoint alone."""
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        timeout = ClientTimeout(total=ANSWER_SECONDS)  # to the last byte, however slowly they come
        async with (
            ClientSession(timeout=timeout, headers=headers) as session,
            session.request(method, f"{self.root}/{path}", json=asked, allow_redirects=False) as answer,
        ):
            content = bytearray()
            async for part in answer.content.iter_chunked(1 << 16):
                content += part
                if len(content) > ANSWER_BYTES:
                    raise OSError(f"an answer of more than {ANSWER_BYTES >> 20} MiB")
            return answer.status, bytes(content)

    def _window(self) -> int:
        """How many tokens the server's model takes, as far as the server lists its models (vLLM does, with this)."""
        said = self._ask("GET", "models", attempts=1, absent={}, unanswered="no server answers at {}")
        rows = said.get("data") if isinstance(said, dict) else None
        listed = {str(one["id"]): one for one in rows or [] if isinstance(one, dict) and "id" in one}
        if listed and self._model not in listed:
            raise UserError(
                f"the endpoint {self.root} has no model {self._model!r}; it has {_shown(', '.join(sorted(listed)))}"
            )
        window = listed.get(self._model, {}).get("max_model_len")
        if not isinstance(window, int) or window < 3:
            warnings.warn(
                f"the endpoint {self.root} does not say how many tokens its model takes; {WINDOW} it is", stacklevel=3
            )
            return WINDOW
        return window


def _key(root: str, key_env: str | None) -> str | None:
    """The key for a server. Raises UserError where there is none, or where others could read it on its way."""
    if key_env is None:
        return None
    if not (key := os.environ.get(key_env)):
        raise UserError(f"the environment variable {key_env} that is to hold the endpoint's key is not set")
    parts = urlsplit(root)
    if parts.scheme != "https" and not _is_loopback(str(parts.hostname)):
        raise UserError(f"a key is sent to https or to this machine alone, not to {root}; use https")
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {key_env} holds characters that no key has")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(value: Any) -> str:
    """What a server has said, short and on one line."""
    return printable(" ".join(str(value).split()))[:200]
