"""A language model for lm-evaluation-harness that answers each distinct request once and keeps the answer.

`CachingLM` turns the harness's requests, which are texts, into tokens. A request for a log-likelihood becomes one or
more queries: input tokens, and the targets that follow the last of them. A request for a text becomes a prompt. The two
language models of this package, `Scorer` and `Endpoint`, divide these into batches and compute the answers.

Texts are tokenised and cut to the model's window as the harness's HFLM does it, except prompts in a template, which are
tokenised as they were in training (`prompting`).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from plw_mlflow.data.tokens import Encoder, added_around
from plw_mlflow.environment.progress import Progress
from plw_mlflow.errors import UserError
from plw_mlflow.evaluation import answer_store
from plw_mlflow.evaluation.answer_store import AnswerStore
from plw_mlflow.evaluation.prompting import TemplatedPrompt, Wrapping

Array = np.ndarray[Any, Any]
# The numbers of the queries or prompts of a batch, and a function that computes their answers in that order.
PlannedBatch = tuple[list[int], Callable[[], list[Any]]]

TOKENISED_TOGETHER = 1024  # strings


@dataclass(frozen=True)
class Prompt:
    """Tokens after which the model is to generate a text."""

    tokens: Array  # [T] with room for the answer in the model's window
    until: tuple[str, ...]  # the answer ends before the first of these
    max_new_tokens: int
    settings: str  # all other settings of the generation, as JSON
    ends: tuple[int, ...]  # tokens that end the answer, beside those that the model's own settings name
    request: Any  # the harness's

    @property
    def key(self) -> str:
        """The key of its answer."""
        ends = ",".join(map(str, self.ends))
        tokens = self.tokens.tobytes()
        return answer_store.key("generation", tokens, self.max_new_tokens, self.settings, ends, *self.until)


@dataclass(frozen=True)
class Query:
    """Tokens whose log-likelihood is asked for, each given all that comes before it, in one pass of the model."""

    inputs: Array  # [T] no longer than the model's window
    targets: Array  # [N], N <= T: the tokens that follow the last N inputs; the last of them is not among the inputs

    @property
    def key(self) -> str:
        """The key of its answer."""
        return answer_store.key("log-likelihood", self.inputs.tobytes(), self.targets.tobytes())

    @property
    def pair(self) -> tuple[None, list[int], list[int]]:
        """The query as the harness's models take it: no text, the context's tokens, the continuation's tokens."""
        context = self.inputs[: len(self.inputs) - len(self.targets) + 1]
        return None, context.tolist(), self.targets.tolist()


class CachingLM(TemplateLM):
    """The part of a language model that does not compute; to be combined with a class that does.

    That class calls `open_store` before anything is asked, and has `window`, a tokenizer and the four methods below.
    """

    window: int  # how many tokens the model takes at once

    def open_store(self, file: Path | None) -> None:
        """Keep answers in a file, and use those that it holds already; without a file, keep them in memory alone."""
        self.answers = AnswerStore(file)
        self.computed = 0  # queries and prompts that the model itself has answered
        self.truncated: Counter[str] = Counter()  # requests of a task whose context was cut to fit the window
        self.windowed: Counter[str] = Counter()  # requests whose continuation alone is longer than the window

    def plan_scores(self, queries: list[Query]) -> Iterator[PlannedBatch]:
        """Batches of queries; the answer to each is (log-likelihood in nats, whether greedy generation gives it)."""
        raise NotImplementedError

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[PlannedBatch]:
        """Batches of prompts; the answer to each is its text."""
        raise NotImplementedError

    def generate_otherwise(self, prompts: list[Prompt]) -> list[str]:
        """The texts of prompts that are not to be answered greedily, but drawn at random, for example."""
        raise NotImplementedError

    def halve_batches(self, reason: str) -> None:
        """Make batches smaller from now on, as they do not fit the device's memory."""
        raise NotImplementedError

    # What the harness calls.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation, and whether greedy generation would give it.

        Where both together are longer than the window, the context is cut from the left, as in HFLM. A continuation
        that is longer than the window by itself is scored window by window, as the harness scores whole texts; HFLM
        stops with an error there. Requests of both kinds are counted.
        """
        self._check_templated(requests)
        queries: list[list[Query]] = []
        pairs = self._encode_pairs([request.args for request in requests])
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if not len(continuation):  # it would be certain, and win every question
                raise UserError(
                    f"task {request.task_name} asks for the continuation {request.args[1]!r}, which has no token "
                    "beyond its context's"
                )
            if len(continuation) > self.window:
                self.windowed[request.task_name] += 1
            elif len(context) + len(continuation) > self.window + 1:
                self.truncated[request.task_name] += 1
            queries.append(self._queries(context, continuation))
        return self._sums(queries, "log-likelihoods", disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, in windows where it is longer than one."""
        prefix = np.array([self.prefix_token_id])
        queries = [self._windows(prefix, text) for text in self._encode([request.args[0] for request in requests])]
        return [total for total, _ in self._sums(queries, "rolling log-likelihoods", disable_tqdm)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop sequence.

        A context is cut from the left so that the answer fits the window, as in HFLM; such requests are counted.
        Raises UserError where the window has no room for a context at all.
        """
        self._check_templated(requests)
        contexts = self._encode([request.args[0] for request in requests])
        prompts = [self._prompt(request, tokens) for request, tokens in zip(requests, contexts, strict=True)]
        if any(json.loads(prompt.settings)["do_sample"] for prompt in prompts):  # equal prompts may get unequal answers
            return self.generate_otherwise(prompts)
        return self._answer(prompts, self.plan_generation, "generations", disable_tqdm)

    # What is asked in tokens, without the harness.

    def log_likelihoods(self, pairs: Sequence[tuple[Array, Array]], what: str) -> list[float]:
        """The log-likelihood in nats of the second tokens of each pair after the first, cut as `loglikelihood` does it.

        what: is answered, for the progress bar.
        """
        queries = [self._queries(context, continuation) for context, continuation in pairs]
        return [total for total, _ in self._sums(queries, what, disable_tqdm=False)]

    def greedy_texts(self, contexts: Sequence[Array], max_new_tokens: int, ends: Sequence[int], what: str) -> list[str]:
        """The likeliest text after each context, which ends with one of `ends` or an end token of the model.

        A context and `max_new_tokens` have to fit the window together.
        """
        asked = {"do_sample": False, "temperature": 0.0}
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        prompts = []
        for tokens in contexts:
            # The harness's own code, which generates with models that ours cannot, reads the context as a text.
            text = self.tokenizer.decode(tokens, skip_special_tokens=False)
            request = SimpleNamespace(args=(text, asked | {"until": [eos], "max_gen_toks": max_new_tokens}))
            prompts.append(Prompt(tokens, (eos,), max_new_tokens, json.dumps(asked), tuple(ends), request))
        return self._answer(prompts, self.plan_generation, what, disable_tqdm=False)

    # From texts to queries and prompts.

    def _check_templated(self, requests: list[Any]) -> None:
        """Raise UserError where a task has changed a prompt in a template: the new string does not know its tokens."""
        if isinstance(getattr(self, "apply_chat_template", None), Wrapping):
            for request in requests:
                # Some metrics ask for the likelihood of an answer without its question, whose context is then empty.
                if request.args[0] and not isinstance(request.args[0], TemplatedPrompt):
                    raise UserError(
                        f"task {request.task_name} changes its prompts after the template was put around them, so that "
                        "they are not what training saw; leave apply-template out for it"
                    )

    def tok_encode(
        self, string: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
    ) -> Any:
        """The tokens of a text, or of each of several texts, for the harness's own code.

        add_special_tokens: unless it is False, the tokenizer's beginning is added to a text that lacks it.
        """
        special = {"add_special_tokens": False} if add_special_tokens is False else {}
        encoded = self._encode([string] if isinstance(string, str) else string, **special)
        cut = [tokens[-(left_truncate_len or 0) :].tolist() for tokens in encoded]
        return cut[0] if isinstance(string, str) else cut

    def _encode(self, strings: Sequence[str], **special: bool) -> list[Array]:
        """The tokens of each string; equal strings are tokenised once.

        The tokens are those of HFLM's `tok_encode`, but without what a tokenizer adds at the end of a text, as a prompt
        has not ended. A prompt in a template has the tokens that it has in training.
        """
        keys = [text.pieces if isinstance(text, TemplatedPrompt) else text for text in strings]
        distinct = dict(zip(keys, strings, strict=True))
        encoded: dict[Any, Array] = {}
        for encoder, prompts in _by_encoder([text for text in distinct.values() if isinstance(text, TemplatedPrompt)]):
            pieces = [prompt.pieces for prompt in prompts]
            encoded.update(zip(pieces, encoder.prompts(pieces), strict=True))
        begin = self.tokenizer.decode(self.prefix_token_id)
        for has_begin in (False, True):
            settings = special or ({"add_special_tokens": False} if has_begin else {})
            added = self._added_after if settings.get("add_special_tokens", True) else 0
            texts = [key for key in distinct if isinstance(key, str) and has_bos_prefix(key, begin) == has_begin]
            for start in range(0, len(texts), TOKENISED_TOGETHER):
                part = texts[start : start + TOKENISED_TOGETHER]
                for text, tokens in zip(part, self.tokenizer(part, verbose=False, **settings).input_ids, strict=True):
                    encoded[text] = np.array(tokens[: len(tokens) - added], dtype=np.int32)
        return [encoded[key] for key in keys]

    @cached_property
    def _added_after(self) -> int:
        """How many tokens the tokenizer adds at the end of a text."""
        return len(added_around(self.tokenizer)[1])

    def _encode_pairs(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[Array, Array]]:
        """The tokens of the context and of the continuation of each pair of texts.

        In a template, they are the tokens of a record's prompt and completion in training. Other pairs are divided as
        the harness's `_encode_pair` divides them: white space at the end of a context belongs to the continuation.
        """
        templated = self._templated_pairs([pair for pair in texts if isinstance(pair[0], TemplatedPrompt)])
        plain = self._plain_pairs([pair for pair in texts if not isinstance(pair[0], TemplatedPrompt)])
        for context, _ in texts:
            yield next(templated if isinstance(context, TemplatedPrompt) else plain)

    def _templated_pairs(self, texts: Sequence[tuple[Any, str]]) -> Iterator[tuple[Array, Array]]:
        for encoder, prompts in _by_encoder([prompt for prompt, _ in texts]):
            part, texts = texts[: len(prompts)], texts[len(prompts) :]
            yield from encoder.continuations([prompt.pieces for prompt, _ in part], [text for _, text in part])

    def _plain_pairs(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[Array, Array]]:
        moved = [(context.rstrip(), context[len(context.rstrip()) :] + rest, context == "") for context, rest in texts]
        contexts = iter(self._encode([context for context, _, is_empty in moved if not is_empty]))
        wholes = iter(self._encode([context + rest for context, rest, is_empty in moved if not is_empty]))
        alone = iter(self._encode([rest for _, rest, is_empty in moved if is_empty], add_special_tokens=False))
        prefix = np.array([self.prefix_token_id], dtype=np.int32)
        for _, _, is_empty in moved:
            before = prefix if is_empty else next(contexts)
            after = next(alone) if is_empty else next(wholes)[len(before) :]
            if is_empty and len(after) and after[0] == prefix[0]:
                yield after[:1], after[1:]
            else:
                yield before if len(before) else prefix, after

    def _queries(self, context: Array, continuation: Array) -> list[Query]:
        """What to ask for the log-likelihood of a continuation: several windows where it is longer than one."""
        both = np.concatenate((context, continuation))
        if len(continuation) <= self.window:
            return [Query(both[-(self.window + 1) :][:-1], continuation)] if len(continuation) else []
        queries, unscored = [], len(context) - 1  # the targets at the beginning that belong to the context
        for query in self._windows(both[:1], both[1:]):
            if unscored < len(query.targets):
                queries.append(Query(query.inputs, query.targets[max(0, unscored) :]))
            unscored -= len(query.targets)
        return queries

    def _windows(self, prefix: Array, text: Array) -> list[Query]:
        """A text in consecutive windows. Each has the token before it as its first input, the first one the prefix."""
        windows = get_rolling_token_windows(text.tolist(), int(prefix[0]), self.window, context_len=1)
        return [Query(np.array(inputs, np.int32), np.array(targets, np.int32)) for inputs, targets in windows]

    def _prompt(self, request: Any, tokens: Array) -> Prompt:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        max_new_tokens = settings.pop("max_gen_toks")
        room = self.window - max_new_tokens
        if room < 1:
            raise UserError(
                f"task {request.task_name} asks for answers of {max_new_tokens} tokens, but the model's window has "
                f"{self.window}; leave the task out, or take a model with a longer window"
            )
        if len(tokens) > room:
            self.truncated[request.task_name] += 1
        ends = getattr(request.args[0], "ends", ())
        as_json = json.dumps(settings, sort_keys=True, default=str)
        return Prompt(tokens[-room:], tuple(until), max_new_tokens, as_json, ends, request)

    # From queries and prompts to answers.

    def _sums(self, queries: list[list[Query]], what: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """The log-likelihood of each list of queries together, and whether greedy generation would give all of them."""
        flat = [query for of_request in queries for query in of_request]
        answers = iter(self._answer(flat, self.plan_scores, what, disable_tqdm))
        sums = []
        for of_request in queries:
            parts = list(itertools.islice(answers, len(of_request)))
            sums.append((sum(part[0] for part in parts), all(part[1] for part in parts)))
        return sums

    def _answer(
        self,
        requests: Sequence[Query] | Sequence[Prompt],
        plan: Callable[[list[Any]], Iterator[PlannedBatch]],
        what: str,
        disable_tqdm: bool,
    ) -> list[Any]:
        """The answers to queries or to prompts, of which equal ones are computed once, in the batches of `plan`.

        All of them are planned, whether the store has their answers or not. So a process that goes on from another one
        makes the same batches, and with them the same numbers to the bit. Where the store has the answers to only a
        part of a batch, the rest is planned again.
        """
        keys = [request.key for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        unanswered = list(distinct)
        done = sum(key in self.answers for key in distinct)
        with Progress(what, len(distinct), "requests", done=done, is_shown=not disable_tqdm) as progress:
            while unanswered:
                for numbers, compute in plan([distinct[key] for key in unanswered]):
                    batch = [unanswered[number] for number in numbers]
                    if any(key in self.answers for key in batch):
                        continue
                    results = self._compute(compute, len(batch))
                    if results is None:
                        break  # the rest is planned again, in smaller batches
                    self.answers.add(dict(zip(batch, results, strict=True)))
                    self.computed += len(batch)
                    progress.update(len(batch))
                unanswered = [key for key in unanswered if key not in self.answers]
        return [self.answers[key] for key in keys]

    def _compute(self, compute: Callable[[], list[Any]], batch_size: int) -> list[Any] | None:
        """The answers of a batch; None where it does not fit the device's memory, after which batches are smaller."""
        try:
            with torch.inference_mode():
                return compute()
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise
            reason = str(error).partition("\n")[0]
            error.__traceback__ = None  # it holds on to the tensors of the batch
            self.halve_batches(reason)
            return None


def _by_encoder(prompts: Sequence[TemplatedPrompt]) -> Iterator[tuple[Encoder, list[TemplatedPrompt]]]:
    """Prompts in their order, in lists that one encoder tokenises at once."""
    for encoder, group in itertools.groupby(prompts, lambda prompt: prompt.encoder):
        of_encoder = list(group)
        for start in range(0, len(of_encoder), TOKENISED_TOGETHER):
            yield encoder, of_encoder[start : start + TOKENISED_TOGETHER]
