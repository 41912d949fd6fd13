"""Scoring: a language model for lm-evaluation-harness that answers as its own HFLM does, and computes less.

Requests become pieces, pairs of input tokens and the targets that follow the last of them. Pieces that begin alike
share that beginning's computation (trees.py): the options of a question their context, questions their few-shot
examples. Logits are made where a target is looked up and nowhere else. Generation drops the texts that have ended, so
that a batch costs what its texts need. That a model computes the same on trees is tried on the model itself; where it
does not (state-space models, positions that are counted rather than given), HFLM's own code answers, on batches made
here.

Letters: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from plw_mlflow import answers, models, trees
from plw_mlflow.answers import Answers
from plw_mlflow.loss import BUDGET_BYTES

Array = np.ndarray[Any, Any]
Batch = tuple[list[int], Callable[[], list[Any]]]  # the numbers of its requests, and what answers them in that order

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # a processor's caches like small batches
GENERATION = 4  # times as many tokens are in the cache of a batch that generates: a step computes one of each text
STRINGS = 1024  # tokenised at a time
# What a model's own generation settings may hold without greedy generation being another for it.
GREEDY = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p"}
GREEDY |= {"max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config"}


@dataclass(frozen=True)
class Prompt:
    """What is to be gone on with, greedily."""

    tokens: Array  # [T] leaves room for the answer in the model's window
    until: tuple[str, ...]  # the answer ends before any of these
    most: int  # tokens of the answer
    other: str  # further settings, as JSON
    request: Any  # the harness's

    @property
    def key(self) -> str:
        """The request's key."""
        return answers.key("generation", self.tokens.tobytes(), self.most, self.other, *self.until)


@dataclass(frozen=True)
class Piece:
    """What is asked of the model at once: the log-probability of the targets, each given all that comes before it."""

    inputs: Array  # [T] no longer than the model's window
    targets: Array  # what follows the last inputs, one for each; the last target is not among the inputs

    @property
    def key(self) -> str:
        """The request's key."""
        return answers.key("log-likelihood", self.inputs.tobytes(), self.targets.tobytes())


class Scorer(HFLM):
    """HFLM with its encoding of requests, and scoring and greedy generation of our own.

    batch_tokens: how many tokens go through the model at once; halved whenever they do not fit the device's memory.
    folder: where finished requests are kept, for this model and this one alone.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int | None = None, folder: Path | None = None) -> None:
        super().__init__(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, max_batch_size=None)
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        self._causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self._causal.config.get_text_config()
        # Scores of other places are computed and thrown away: few beside the products of a wide model.
        self._room = min(max(128, 2 * config.hidden_size), 1024)
        # Trees know no window: what is longer than the narrowest is scored without them.
        self._tree_tokens = getattr(config, "sliding_window", None) or self.max_length
        self.shares = self._can_share()
        if not self.shares:
            warnings.warn(
                f"{config.model_type} does not compute the same where requests share a beginning: "
                "each is scored alone, which takes longer",
                stacklevel=2,
            )
        file = None if folder is None else folder / f"answers-{identity(model, tokenizer)[:16]}.jsonl"
        self.answers = Answers(file)
        self.done = 0  # requests to which the model itself has found the answer
        self.truncated: Counter[str] = Counter()  # requests of a task whose context was cut to fit the window
        self.windowed: Counter[str] = Counter()  # requests whose continuation alone is longer than the window

    # What the harness calls.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation, and whether greedy generation would give it.

        A context is cut from the left where both together are longer than the window, as HFLM does. A continuation
        that is itself longer is scored window by window, as the harness scores whole texts; HFLM stops there. Both
        are counted.
        """
        pieces: list[list[Piece]] = []
        for request, (context, continuation) in zip(requests, self._pairs([r.args for r in requests]), strict=True):
            if len(continuation) > self.max_length:
                self.windowed[request.task_name] += 1
            elif len(context) + len(continuation) > self.max_length + 1:
                self.truncated[request.task_name] += 1
            pieces.append(self._pieces(context, continuation))
        found = self._score([piece for several in pieces for piece in several], "log-likelihoods", disable_tqdm)
        return [_sum(several) for several in _split(found, map(len, pieces))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood in nats of each whole text, in windows where it is longer than one."""
        prefix = np.array([self.prefix_token_id])
        pieces = [self._windows(prefix, text) for text in self._encode([request.args[0] for request in requests])]
        found = self._score([piece for several in pieces for piece in several], "rolling log-likelihoods", disable_tqdm)
        return [_sum(several)[0] for several in _split(found, map(len, pieces))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that goes on from each context until a stop sequence, cut off before it.

        A context is cut from the left so that the answer fits the window, as HFLM does; this is counted. Raises
        ValueError where the window has no room for a context at all.
        """
        prompts = [
            self._prompt(request, tokens)
            for request, tokens in zip(requests, self._encode([r.args[0] for r in requests]), strict=True)
        ]
        if any(json.loads(prompt.other)["do_sample"] for prompt in prompts):  # no two answers need be the same
            self.batch_size_per_gpu = max(1, GENERATION * self.batch_tokens // self.max_length)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        keys = [prompt.key for prompt in prompts]
        distinct = dict(zip(keys, prompts, strict=True))
        found = self._answer(distinct, self._plan_generation, "generations", disable_tqdm)
        return [found[key] for key in keys]

    # From texts to pieces and prompts.

    def _encode(self, strings: Sequence[str], **special: bool) -> list[Array]:
        """Tokens of each string, as HFLM's `tok_encode` gives them; the same string is tokenised once."""
        begin = self.tokenizer.decode(self.prefix_token_id)
        found: dict[str, Array] = {}
        for has_begin in (False, True):
            settings = special or ({"add_special_tokens": False} if has_begin else {})
            distinct = [text for text in dict.fromkeys(strings) if has_bos_prefix(text, begin) == has_begin]
            for start in range(0, len(distinct), STRINGS):
                some = distinct[start : start + STRINGS]
                for text, tokens in zip(some, self.tokenizer(some, **settings).input_ids, strict=True):
                    found[text] = np.array(tokens, dtype=np.int32)
        return [found[text] for text in strings]

    def _pairs(self, texts: Sequence[tuple[str, str]]) -> Iterator[tuple[Array, Array]]:
        """Context and continuation of each pair of texts, cut as the harness's `_encode_pair` cuts them."""
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

    def _pieces(self, context: Array, continuation: Array) -> list[Piece]:
        both = np.concatenate((context, continuation))
        if len(continuation) <= self.max_length:
            return [Piece(both[-(self.max_length + 1) :][:-1], continuation)] if len(continuation) else []
        found, behind = [], len(context) - 1
        for piece in self._windows(both[:1], both[1:]):
            if behind < len(piece.targets):  # what is still the context's is not scored
                found.append(Piece(piece.inputs, piece.targets[max(0, behind) :]))
            behind -= len(piece.targets)
        return found

    def _windows(self, prefix: Array, text: Array) -> list[Piece]:
        windows = get_rolling_token_windows(text.tolist(), int(prefix[0]), self.max_length, context_len=1)
        return [Piece(np.array(inputs, np.int32), np.array(targets, np.int32)) for inputs, targets in windows]

    def _prompt(self, request: Any, tokens: Array) -> Prompt:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        most = settings.pop("max_gen_toks")
        room = self.max_length - most
        if room < 1:
            raise ValueError(
                f"task {request.task_name} asks for answers of {most} tokens, but the model's window has "
                f"{self.max_length}; leave the task out, or take a model with a longer window"
            )
        if len(tokens) > room:
            self.truncated[request.task_name] += 1
        return Prompt(tokens[-room:], tuple(until), most, json.dumps(settings, sort_keys=True, default=str), request)

    # From pieces to log-likelihoods, and from prompts to texts.

    def _score(self, pieces: Sequence[Piece], what: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        keys = [piece.key for piece in pieces]
        distinct = {key: piece for key, piece in zip(keys, pieces, strict=True)}
        found = self._answer(distinct, self._plan_scores, what, disable_tqdm)
        return [(found[key][0], found[key][1]) for key in keys]

    def _answer(
        self,
        asked: dict[str, Any],
        plan: Callable[[list[Any]], Iterator[Batch]],
        what: str,
        disable_tqdm: bool,
    ) -> Answers:
        """Have all that is asked answered, each once, in the batches that `plan` makes of it.

        The plan is made of all, answered or not, so that a process that goes on from another makes the same batches,
        and so the same numbers to the bit. What only part of a batch has the answers of is planned anew.
        """
        keys, requests = list(asked), list(asked.values())
        todo = list(range(len(keys)))
        bar = tqdm(total=len(keys), desc=what, disable=disable_tqdm or None)  # None: unless a person looks at it
        bar.update(sum(key in self.answers for key in keys))
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
                    self._halve(reason)
                    break
                self.answers.add(dict(zip(batch, results, strict=True)))
                self.done += len(batch)
                bar.update(len(batch))
            todo = [number for number in todo if keys[number] not in self.answers]
        bar.close()
        return self.answers

    def _halve(self, reason: str) -> None:
        self.batch_tokens = max(1, self.batch_tokens // 2)
        warnings.warn(f"{reason}; going on with {self.batch_tokens} tokens at once", stacklevel=2)
        torch.cuda.empty_cache()

    def _plan_scores(self, pieces: list[Piece]) -> Iterator[Batch]:
        """Batches of trees, then of what has to stand alone."""
        fits = [self.shares and len(piece.inputs) <= self._tree_tokens for piece in pieces]
        within = [number for number, fit in enumerate(fits) if fit]
        room = min(self._room, self.batch_tokens)
        laid_out = trees.rows([pieces[number].inputs for number in within], room, self.batch_tokens)
        for batch in trees.batches(laid_out, self.batch_tokens):
            numbers = [within[number] for row in batch for number in row.paths]
            yield numbers, partial(self._score_trees, batch, [pieces[number] for number in numbers])
        alone = [number for number, fit in enumerate(fits) if not fit]
        for numbers in _padded(alone, [len(pieces[number].inputs) for number in alone], self.batch_tokens):
            yield numbers, partial(self._score_alone, [pieces[number] for number in numbers])

    def _score_trees(self, batch: Sequence[trees.Row], pieces: Sequence[Piece]) -> list[tuple[float, bool]]:
        """pieces: those of the batch's rows, in order."""
        tokens, positions, mask = trees.inputs(batch, self._causal.dtype, self.device)
        hidden, self._projection = models.project(self._causal, tokens, position_ids=positions, attention_mask=mask)
        hidden = hidden.flatten(0, 1)  # [B * T, H]
        paths = [path + start * tokens.shape[1] for start, row in enumerate(batch) for path in row.paths.values()]
        asked = [path[-len(piece.targets) :] for path, piece in zip(paths, pieces, strict=True)]
        # Options part at one place, whose logits serve the first tokens of them all.
        places, numbers = np.unique(np.concatenate(asked), return_inverse=True)
        targets = self._tensor(np.concatenate([piece.targets for piece in pieces]))
        states, place_of = hidden[self._tensor(places)], self._tensor(numbers)
        found = torch.empty(len(targets), dtype=torch.float32, device=self.device)
        greedy = torch.empty(len(targets), dtype=torch.bool, device=self.device)
        chunk = max(1, BUDGET_BYTES // (8 * len(self._projection["head"])))
        for start in range(0, len(states), chunk):
            logits = self._logits(states[start : start + chunk])
            some = ((start <= place_of) & (place_of < start + chunk)).nonzero().squeeze(1)
            rows, wanted = place_of[some] - start, targets[some]
            found[some] = logits[rows, wanted] - logits.logsumexp(-1)[rows]
            greedy[some] = logits.argmax(-1)[rows] == wanted
        sizes = [len(piece.targets) for piece in pieces]
        return [
            (float(several.sum()), bool(right.all()))
            for several, right in zip(found.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        ]

    def _score_alone(self, pieces: Sequence[Piece]) -> list[tuple[float, bool]]:
        self.batch_size_per_gpu = len(pieces)
        pairs = []
        for piece in pieces:
            inputs, targets = piece.inputs.tolist(), piece.targets.tolist()
            pairs.append((None, inputs[: len(inputs) - len(targets) + 1], targets))
        return super()._loglikelihood_tokens(pairs, disable_tqdm=True)

    def _plan_generation(self, prompts: list[Prompt]) -> Iterator[Batch]:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            kinds.setdefault((prompt.until, prompt.most, prompt.other), []).append(number)
        config = self.model.generation_config
        own = {name for name, value in (config.to_diff_dict() if config else {}).items() if value not in (None, False)}
        for (_, most, other), kind in kinds.items():
            is_greedy = self.shares and own <= GREEDY and json.loads(other).keys() <= {"do_sample", "temperature"}
            lengths = [len(prompts[number].tokens) + most for number in kind]
            for numbers in _padded(kind, lengths, GENERATION * self.batch_tokens):
                run = self._generate if is_greedy else self._generate_otherwise
                yield numbers, partial(run, [prompts[number] for number in numbers])

    def _generate_otherwise(self, prompts: Sequence[Prompt]) -> list[str]:
        self.batch_size_per_gpu = len(prompts)
        return super().generate_until([prompt.request for prompt in prompts], disable_tqdm=True)

    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy texts of prompts with the same settings; padded on the left, as `generate` has them."""
        until, most = prompts[0].until, prompts[0].most
        longest = max(len(prompt.tokens) for prompt in prompts)
        padded = np.zeros((2, len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            padded[:, row, longest - len(prompt.tokens) :] = prompt.tokens, np.ones_like(prompt.tokens)
        tokens, mask = self._tensor(padded)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        stops = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = {self.eot_token_id, *(stops if isinstance(stops, list) else [stops])}
        # Two more than the stop sequence itself has, as the harness looks back: it may be spelled in other tokens.
        tail = 2 + max(len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until)
        texts: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt a row of the tensors is
        going = set(rows)
        cache = DynamicCache(config=self._causal.config)
        for _ in range(most):
            hidden = self._causal.base_model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            chosen = self._logits(hidden).argmax(-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row in going:
                    texts[row].append(token)
            tails = self.tokenizer.batch_decode([texts[row][-tail:] for row in going])
            for row, text in zip(list(going), tails, strict=True):
                has_stop = any(stop in text for stop in until)
                # The tail is decoded without what comes before it, which can be another text.
                if texts[row][-1] in ends or (has_stop and any(s in self.tokenizer.decode(texts[row]) for s in until)):
                    going.remove(row)
            if not going:
                break
            positions, tokens = positions[:, -1:] + 1, chosen.unsqueeze(1)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            if 4 * len(going) <= 3 * len(rows):  # as all of the cache is copied for it
                kept = self._tensor([place for place, row in enumerate(rows) if row in going])
                cache.batch_select_indices(kept)
                tokens, positions, mask = tokens[kept], positions[kept], mask[kept]
                rows = [row for row in rows if row in going]
        return [postprocess_generated_text(self.tok_decode(text), list(until), None) for text in texts]

    def _logits(self, hidden: Tensor) -> Tensor:
        """The model's float32 logits [N, V] of last hidden states [N, H]."""
        head, bias, scale, softcap = (self._projection[name] for name in ("head", "bias", "scale", "softcap"))
        logits = nn.functional.linear(hidden, head, bias).float() * scale
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=self.device)

    def _can_share(self) -> bool:
        """Whether the model gives the same log-probabilities on trees as on the sequences alone; tried on a few."""
        generator = np.random.default_rng(0)
        common = generator.integers(self._causal.config.get_text_config().vocab_size, size=24, dtype=np.int32)
        whole = [np.concatenate((common[:9], common[start : start + 5])) for start in (9, 13, 17)] + [common[5:17]]
        pieces = [Piece(tokens[:-1], tokens[3:]) for tokens in whole]
        try:
            with torch.inference_mode():
                (row,) = trees.rows([piece.inputs for piece in pieces], 64, 64)
                shared = self._score_trees([row], [pieces[number] for number in row.paths])
                alone = self._score_alone([pieces[number] for number in row.paths])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # a model that takes no positions, or no mask of its caller's
        # Half precision rounds log-probabilities to 2 or 3 digits; a place that sees what it should not is further off.
        tolerance = 1e-4 if self._causal.dtype == torch.float32 else 0.05
        return np.allclose([ll for ll, _ in shared], [ll for ll, _ in alone], rtol=tolerance)


def _sum(pieces: Sequence[tuple[float, bool]]) -> tuple[float, bool]:
    return sum(log_likelihood for log_likelihood, _ in pieces), all(is_greedy for _, is_greedy in pieces)


def _split(values: Sequence[Any], sizes: Iterator[int]) -> Iterator[Sequence[Any]]:
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size


def _padded(numbers: Sequence[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Numbers in batches of at most `tokens` with the padding, the longest first; a longer one is one alone."""
    batch: list[int] = []
    longest = 0
    for length, number in sorted(zip(lengths, numbers, strict=True), key=lambda pair: -pair[0]):
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(number)
    if batch:
        yield batch


def identity(model: Any, tokenizer: Any) -> str:
    """What tells a model's answers from another's: a SHA-256 of its weights, their type, its settings and tokenizer."""
    settings = [model.config.to_json_string(), str(model.dtype), tokenizer.backend_tokenizer.to_str()]
    if model.generation_config is not None:
        settings.append(model.generation_config.to_json_string())
    found = hashlib.sha256("\0".join(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
