"""Endpoint: a model behind an OpenAI-compatible completions server (vLLM's, say), asked by the harness's own client.

For log-likelihoods the server has to take tokens as a prompt and to echo them with their log-probabilities. Requests
go out sorted, those that begin alike together, so that a server that keeps what it has computed of a prompt can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import requests
from aiohttp import ClientError
from lm_eval.models.openai_completions import LocalCompletionsAPI

from plw_mlflow import answers, models
from plw_mlflow.asking import Asking, Batch, Piece, Prompt
from plw_mlflow.errors import reason, without_passwords

CONCURRENT = 16  # requests at a time; a server makes batches of them as it likes
BATCH = 16 * CONCURRENT  # requests whose answers are kept together
WINDOW = 2048  # tokens, where the server does not say; the harness's default


class Endpoint(Asking, LocalCompletionsAPI):
    """The model that a server at `address` (http://HOST:PORT/v1) calls `model`; its tokenizer is read here.

    tokenizer: toy, a folder, or a hub id (unset: that of `model`). folder: where finished requests are kept.

    Raises ConnectionError where no server answers, ValueError for one that does not have the model.
    """

    def __init__(self, address: str, model: str, tokenizer: str | None = None, folder: Path | None = None) -> None:
        self.root = address.rstrip("/").removesuffix("/completions")
        window = _window(self.root, model)
        models.load_tokenizer(model, tokenizer)  # says it if there is none
        where = models.locate(tokenizer or model)
        super().__init__(
            base_url=f"{self.root}/completions",
            model=model,
            tokenizer=where.path,
            revision=where.revision or "main",
            tokenizer_backend="huggingface",
            add_bos_token=True,  # if the tokenizer adds one, as for a model that is loaded here
            num_concurrent=CONCURRENT,
            max_length=window,
        )
        self.window = self.max_length - 1  # the server's own token, and the last target, count too
        self.keep(None if folder is None else folder / f"answers-{answers.key(self.root, model)[:16]}.jsonl")

    def plan_scores(self, pieces: list[Piece]) -> Iterator[Batch]:
        """Pieces that begin alike together."""
        numbers = sorted(range(len(pieces)), key=lambda number: pieces[number].inputs.astype(">u4").tobytes())
        yield from self._batches(numbers, pieces, self._score)

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[Batch]:
        """Prompts that begin alike together."""
        numbers = sorted(range(len(prompts)), key=lambda number: prompts[number].tokens.astype(">u4").tobytes())
        yield from self._batches(numbers, prompts, self._generate)

    def _batches(
        self, numbers: Sequence[int], asked: Sequence[Any], run: Callable[[list[Any]], list[Any]]
    ) -> Iterator[Batch]:
        for start in range(0, len(numbers), BATCH):
            some = list(numbers[start : start + BATCH])
            yield some, partial(self._ask, run, [asked[number] for number in some])

    def _ask(self, run: Callable[[list[Any]], list[Any]], asked: list[Any]) -> list[Any]:
        try:
            return run(asked)
        except (ClientError, TimeoutError, OSError) as error:
            raise ConnectionError(
                f"the endpoint {without_passwords(self.root)} gives no answer: {reason(error)}"
            ) from None

    def _score(self, pieces: list[Piece]) -> list[tuple[float, bool]]:
        return LocalCompletionsAPI._loglikelihood_tokens(self, [piece.pair for piece in pieces])

    def _generate(self, prompts: list[Prompt]) -> list[str]:
        return LocalCompletionsAPI.generate_until(self, [prompt.request for prompt in prompts], disable_tqdm=True)


def _window(root: str, model: str) -> int:
    """How many tokens the server's model takes, as far as the server lists its models (vLLM does, with this)."""
    try:
        answer = requests.get(f"{root}/models", timeout=20)
    except requests.RequestException as error:
        raise ConnectionError(f"no server answers at {without_passwords(root)}: {reason(error)}") from None
    root = without_passwords(root)
    listed = {one["id"]: one for one in answer.json()["data"]} if answer.ok else {}
    if listed and model not in listed:
        raise ValueError(f"the endpoint {root} has no model {model!r}; it has {', '.join(sorted(listed))}")
    window = listed.get(model, {}).get("max_model_len")
    if window is None:
        warnings.warn(f"the endpoint {root} does not say how many tokens its model takes; {WINDOW} it is", stacklevel=3)
    return int(window or WINDOW)
