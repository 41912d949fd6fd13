"""CachingLM: what the harness wants of a language model, as distinct requests that are each answered once, and kept.

Texts are cut to the model's window as lm-evaluation-harness does it in HFLM. The harness's own prompts are tokenised as
there, too; prompts in a template as they were in training (prompting.py). Requests for log-likelihoods become queries,
pairs of input tokens and the targets that follow the last of them; requests for texts become prompts. A language model
of this package says in which batches it answers them, and how.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
# The numbers of the requests that are answered together, and a function that answers them in that order.
PlannedBatch = tuple[list[int], Callable[[], list[Any]]]

STRINGS = 1024  # tokenised at a time


@dataclass(frozen=True)
class Prompt:
    """What is to be gone on with, greedily."""

    tokens: Array  # [T] leaves room for the answer in the model's window
    until: tuple[str, ...]  # the answer ends before any of these
    most: int  # tokens of the answer
    other: str  # further settings, as JSON
    ends: tuple[int, ...]  # tokens that end the answer too, beside those that the model's own settings name
    request: Any  # the harness's

    @property
    def key(self) -> str:
        """The request's key."""
        ends = ",".join(map(str, self.ends))
        return answer_store.key("generation", self.tokens.tobytes(), self.most, self.other, ends, *self.until)


@dataclass(frozen=True)
class Query:
    """What is asked of the model at once: the log-probability of the targets, each given all that comes before it."""

    inputs: Array  # [T] no longer than the model's window
    targets: Array  # what follows the last inputs, one for each; the last target is not among the inputs

    @property
    def key(self) -> str:
        """The request's key."""
        return answer_store.key("log-likelihood", self.inputs.tobytes(), self.targets.tobytes())

    @property
    def pair(self) -> tuple[None, list[int], list[int]]:
        """As the harness's models take it: no text, context and continuation."""
        context = self.inputs[: len(self.inputs) - len(self.targets) + 1]
        return None, context.tolist(), self.targets.tolist()


class CachingLM(TemplateLM):
    """A mixin before one of the harness's own language models, whose part is to compute."""

    window: int  # how many tokens the model takes at once

    def keep(self, file: Path | None) -> None:
        """Keep answers in a file, and know those that are there; to be called before anything is asked."""
        self.answers = AnswerStore(file)
        self.done = 0  # requests to which the model itself has found the answer
        self.truncated: Counter[str] = Counter()  # requests of a task whose context was cut to fit the window
        self.windowed: Counter[str] = Counter()  # requests whose continuation alone is longer than the window

    def plan_scores(self, queries: list[Query]) -> Iterator[PlannedBatch]:
        """Batches of queries; each is answered with (log-likelihood, whether greedy)."""
        raise NotImplementedError

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[PlannedBatch]:
        """Batches of prompts; each is answered with its text."""
        raise NotImplementedError

    def generate_otherwise(self, prompts: list[Prompt]) -> list[str]:
        """The texts of prompts that are not to be answered greedily, but drawn at random, say."""
        raise NotImplementedError

    def halve(self, reason: str) -> None:
        """Make batches smaller from here on, as the device's memory is too short for them."""
        raise NotImplementedError

    # What the harness calls.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation, and whether greedy generation would give it.

        A context is cut from the left where both together are longer than the window, as HFLM does. A continuation
        that is itself longer is scored window by window, as the harness scores whole texts; HFLM stops there. Both
        are counted.
        """
        self._check_templated(requests)
        queries: list[list[Query]] = []
        for request, (context, continuation) in zip(requests, self._pairs([r.args for r in requests]), strict=True):
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
        asked = [query for several in queries for query in several]
        found = self._log_likelihoods(asked, "log-likelihoods", disable_tqdm)
        return [_sum(several) for several in _split(found, map(len, queries))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, in windows where it is longer than one."""
        prefix = np.array([self.prefix_token_id])
        queries = [self._windows(prefix, text) for text in self._encode([request.args[0] for request in requests])]
        asked = [query for several in queries for query in several]
        found = self._log_likelihoods(asked, "rolling log-likelihoods", disable_tqdm)
        return [_sum(several)[0] for several in _split(found, map(len, queries))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that goes on from each context until a stop sequence, cut off before it.

        A context is cut from the left so that the answer fits the window, as HFLM does; this is counted. Raises
        UserError where the window has no room for a context at all.
        """
        self._check_templated(requests)
        prompts = [
            self._prompt(request, tokens)
            for request, tokens in zip(requests, self._encode([r.args[0] for r in requests]), strict=True)
        ]
        if any(json.loads(prompt.other)["do_sample"] for prompt in prompts):  # no two answers need be the same
            return self.generate_otherwise(prompts)
        keys = [prompt.key for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        found = self._answer(distinct, self.plan_generation, "generations", disable_tqdm)
        return [found[key] for key in keys]

    # From texts to queries and prompts.

    def _check_templated(self, requests: list[Any]) -> None:
        """Raise UserError where a task has made another string of a prompt in a template, whose tokens are then lost.

        An empty context is none: some metrics ask for the likelihood of an answer without its question.
        """
        if isinstance(getattr(self, "apply_chat_template", None), Wrapping):
            for request in requests:
                if request.args[0] and not isinstance(request.args[0], TemplatedPrompt):
                    raise UserError(
                        f"task {request.task_name} changes its prompts after the template was put around them, so that "
                        "they are not what training saw; leave apply-template out for it"
                    )

    def tok_encode(
        self, string: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
    ) -> Any:
        """Tokens of a text, or of each of several, for the harness's own code.

        add_special_tokens: where it is not False, the tokenizer's beginning is added to a text that lacks it.
        """
        special = {"add_special_tokens": False} if add_special_tokens is False else {}
        several = self._encode([string] if isinstance(string, str) else string, **special)
        cut = [tokens[-(left_truncate_len or 0) :].tolist() for tokens in several]
        return cut[0] if isinstance(string, str) else cut

    def _encode(self, strings: Sequence[str], **special: bool) -> list[Array]:
        """Tokens of each string; the same string is tokenised once.

        Of the harness's own prompts, as HFLM's `tok_encode` gives them, but for what a tokenizer adds at the end of a
        text: a prompt has not ended.
        """
        keys = [text.pieces if isinstance(text, TemplatedPrompt) else text for text in strings]
        distinct = dict(zip(keys, strings, strict=True))
        known: dict[Any, Array] = {}
        for encoder, some in _by_encoder([text for text in distinct.values() if isinstance(text, TemplatedPrompt)]):
            several = [prompt.pieces for prompt in some]
            known.update(zip(several, encoder.prompts(several), strict=True))
        begin = self.tokenizer.decode(self.prefix_token_id)
        for has_begin in (False, True):
            settings = special or ({"add_special_tokens": False} if has_begin else {})
            added = self._added_after if settings.get("add_special_tokens", True) else 0
            texts = [key for key in distinct if isinstance(key, str) and has_bos_prefix(key, begin) == has_begin]
            for start in range(0, len(texts), STRINGS):
                part = texts[start : start + STRINGS]
                for text, tokens in zip(part, self.tokenizer(part, verbose=False, **settings).input_ids, strict=True):
                    known[text] = np.array(tokens[: len(tokens) - added], dtype=np.int32)
        return [known[key] for key in keys]

    @cached_property
    def _added_after(self) -> int:
        """How many tokens the tokenizer adds at the end of a text."""
        return len(added_around(self.tokenizer)[1])

    def _pairs(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[Array, Array]]:
        """Context and continuation of each pair of texts.

        In a template, they are the prompt and the completion of a record as training has them. Others are cut as the
        harness's `_encode_pair` cuts them, where white space at the end of a context belongs to the continuation.
        """
        templated = self._templated_pairs([pair for pair in texts if isinstance(pair[0], TemplatedPrompt)])
        plain = self._plain_pairs([pair for pair in texts if not isinstance(pair[0], TemplatedPrompt)])
        for context, _ in texts:
            yield next(templated if isinstance(context, TemplatedPrompt) else plain)

    def _templated_pairs(self, texts: Sequence[tuple[Any, str]]) -> Iterator[tuple[Array, Array]]:
        for encoder, some in _by_encoder([prompt for prompt, _ in texts]):
            part, texts = texts[: len(some)], texts[len(some) :]
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
        both = np.concatenate((context, continuation))
        if len(continuation) <= self.window:
            return [Query(both[-(self.window + 1) :][:-1], continuation)] if len(continuation) else []
        found, behind = [], len(context) - 1
        for query in self._windows(both[:1], both[1:]):
            if behind < len(query.targets):  # what is still the context's is not scored
                found.append(Query(query.inputs, query.targets[max(0, behind) :]))
            behind -= len(query.targets)
        return found

    def _windows(self, prefix: Array, text: Array) -> list[Query]:
        windows = get_rolling_token_windows(text.tolist(), int(prefix[0]), self.window, context_len=1)
        return [Query(np.array(inputs, np.int32), np.array(targets, np.int32)) for inputs, targets in windows]

    def _prompt(self, request: Any, tokens: Array) -> Prompt:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1]))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        most = settings.pop("max_gen_toks")
        room = self.window - most
        if room < 1:
            raise UserError(
                f"task {request.task_name} asks for answers of {most} tokens, but the model's window has "
                f"{self.window}; leave the task out, or take a model with a longer window"
            )
        if len(tokens) > room:
            self.truncated[request.task_name] += 1
        ends = getattr(request.args[0], "ends", ())
        other = json.dumps(settings, sort_keys=True, default=str)
        return Prompt(tokens[-room:], tuple(until), most, other, ends, request)

    # From requests to answers.

    def _log_likelihoods(self, queries: Sequence[Query], what: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        keys = [query.key for query in queries]
        distinct = {key: query for key, query in zip(keys, queries, strict=True)}
        found = self._answer(distinct, self.plan_scores, what, disable_tqdm)
        return [(found[key][0], found[key][1]) for key in keys]

    def _answer(
        self,
        asked: dict[str, Any],
        plan: Callable[[list[Any]], Iterator[PlannedBatch]],
        what: str,
        disable_tqdm: bool,
    ) -> AnswerStore:
        """Have all that is asked answered, each once, in the batches that `plan` makes of it.

        The plan is made of all, answered or not, so that a process that goes on from another makes the same batches,
        and so the same numbers to the bit. What only part of a batch has the answers of is planned anew.
        """
        keys, requests = list(asked), list(asked.values())
        todo = list(range(len(keys)))
        done = sum(key in self.answers for key in keys)
        progress = Progress(what, len(keys), "requests", done=done, is_shown=not disable_tqdm)
        while todo:
            for numbers, run in plan([requests[number] for number in todo]):
                batch = [keys[todo[number]] for number in numbers]
                if any(key in self.answers for key in batch):
                    continue
                try:
                    with torch.inference_mode():
                        results = run()
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise
                    reason = str(error).partition("\n")[0]
                    error.__traceback__ = None  # it holds on to the tensors of the batch
                    self.halve(reason)
                    break
                self.answers.add(dict(zip(batch, results, strict=True)))
                self.done += len(batch)
                progress.update(len(batch))
            todo = [number for number in todo if keys[number] not in self.answers]
        progress.close()
        return self.answers


def _by_encoder(prompts: Sequence[TemplatedPrompt]) -> Iterator[tuple[Encoder, list[TemplatedPrompt]]]:
    """Prompts in their order, as many together as one encoder is to tokenise at once."""
    for encoder, group in itertools.groupby(prompts, lambda prompt: prompt.encoder):
        some = list(group)
        for start in range(0, len(some), STRINGS):
            yield encoder, some[start : start + STRINGS]


def _sum(queries: Sequence[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(log_likelihood for log_likelihood, _ in queries), all(is_greedy for _, is_greedy in queries)


def _split(values: Sequence[Any], sizes: Iterator[int]) -> Iterator[Sequence[Any]]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size
