"""A language model for lm-evaluation-harness that gives the answers of the harness's own HFLM with less computation.

- Queries that begin alike share the computation of that beginning (`prefix_trees`): the options of a question share
  their context, and questions share their few-shot examples.
- Logits are computed only where a target is looked up.
- Generation drops the texts of a batch that have ended.

In bfloat16 the products of the layers and attention are computed in it, and norms, sums over layers, logits and their
softmax in float32. HFLM's own code has its logits in bfloat16, too.

Not every model computes on prefix trees what it computes on single sequences: state-space models do not, nor do models
that count positions instead of taking them. Each model is tried when it is loaded. For those that fail, HFLM's own code
computes the answers, in batches that are made here.

Letters: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor, nn
from transformers import DynamicCache

from plw_mlflow.environment.precision import Precision
from plw_mlflow.evaluation import prefix_trees
from plw_mlflow.evaluation.caching_lm import CachingLM, PlannedBatch, Prompt, Query
from plw_mlflow.models import causal, held

LOGITS_BYTES = 256 * 2**20  # of logits and what is computed from them at a time
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # a CPU's caches favour small batches
HFLM_TEXTS = 16  # generated together by HFLM's own code
# A batch that generates may have this many times as many tokens, as each step computes only one token of each text.
GENERATION_FACTOR = 4
# A model's own generation settings that do not change greedy generation.
WITHOUT_EFFECT_ON_GREEDY = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config"),
}


class Scorer(CachingLM, HFLM):
    """HFLM with scoring and greedy generation of our own.

    batch_tokens: how many tokens go through the model at once (unset: by the device). The number is halved whenever
    they do not fit the device's memory. folder: where answers are kept (unset: they are not). Its files are those of
    one model and precision each, so that models may share a folder. precision: the type of the arithmetic.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int | None = None,
        folder: Path | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            pretrained=model.eval(),
            tokenizer=tokenizer,
            batch_size=HFLM_TEXTS,
            max_batch_size=None,
            softmax_dtype="float32",
        )
        self.precision = precision
        self.window = self.max_length
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        self._causal = causal.unwrap(model)
        config = self._causal.config.get_text_config()
        # In a row of prefix trees, the attention between different sequences is computed and thrown away. The wider the
        # model, the less that is beside its other products, and the longer a row may be.
        self._row_tokens = min(max(128, 2 * config.hidden_size), 1024)
        # Prefix trees ignore sliding windows and chunks of attention, so that longer sequences are scored without them.
        local = ("sliding_window", "attention_chunk_size", "window_size")
        windows = [getattr(config, name, None) or self.max_length for name in local]
        # A text of more tokens than this changes what is computed for the shorter ones of its batch.
        self._limit = causal.length_limit(self._causal.config) or self.max_length
        self._tree_tokens = min(*windows, self._limit)
        self.shares_prefixes = self._gives_the_same_on_trees()
        if precision != "float32":
            self.mixed_precision_dtype = getattr(torch, precision)  # in HFLM's code, as in ours
        if not self.shares_prefixes:
            warnings.warn(
                f"{config.model_type} does not compute the same where requests share a beginning: "
                "each is scored alone, which takes longer",
                stacklevel=2,
            )
        name = "" if folder is None else identity(model, tokenizer, precision)[:16]
        self.open_store(None if folder is None else folder / f"answers-{name}.jsonl")

    def halve_batches(self, reason: str) -> None:
        """Put half as many tokens through the model at once from now on."""
        self.batch_tokens = max(1, self.batch_tokens // 2)
        warnings.warn(f"{reason}; going on with {self.batch_tokens} tokens at once", stacklevel=2)
        torch.cuda.empty_cache()

    def plan_scores(self, queries: list[Query]) -> Iterator[PlannedBatch]:
        """Batches of prefix trees, then batches of the queries that do not fit into trees."""
        fits = [self.shares_prefixes and len(query.inputs) <= self._tree_tokens for query in queries]
        fitting = [number for number, fit in enumerate(fits) if fit]
        row_tokens = min(self._row_tokens, self.batch_tokens)
        rows = prefix_trees.rows([queries[number].inputs for number in fitting], row_tokens, self.batch_tokens)
        for batch in prefix_trees.batches(rows, self.batch_tokens):
            numbers = [fitting[number] for row in batch for number in row.paths]
            yield numbers, partial(self._score_trees, batch, [queries[number] for number in numbers])
        alone = [number for number, fit in enumerate(fits) if not fit]
        lengths = [len(queries[number].inputs) for number in alone]
        # All texts beyond the limit have the same position frequencies, so that they may be computed together.
        for numbers in self._padded(alone, lengths, self.batch_tokens, beyond=self.batch_tokens):
            yield numbers, partial(self._score_alone, [queries[number] for number in numbers])

    def _padded(self, numbers: Sequence[int], lengths: Sequence[int], tokens: int, beyond: int) -> Iterator[list[int]]:
        """Numbers of texts in batches of at most so many tokens, padding included.

        Texts longer than the limit have batches of their own, of at most `beyond` tokens.
        """
        pairs = list(zip(numbers, lengths, strict=True))
        yield from _padded([pair for pair in pairs if pair[1] > self._limit], beyond)
        yield from _padded([pair for pair in pairs if pair[1] <= self._limit], tokens)

    def _score_trees(self, batch: Sequence[prefix_trees.TreeRow], queries: Sequence[Query]) -> list[tuple[float, bool]]:
        """The log-likelihood of each query's targets, and whether greedy generation would give them.

        queries: those of the batch's rows, in their order.
        """
        kind = self.mixed_precision_dtype or self._causal.dtype
        tokens, positions, mask = prefix_trees.inputs(batch, kind, self.device)
        with self._autocast():
            hidden = causal.hidden_states(self._causal, tokens, position_ids=positions, attention_mask=mask)
        hidden, head = hidden.flatten(0, 1), self._head()  # hidden: [B * T, H]
        paths = [path + start * tokens.shape[1] for start, row in enumerate(batch) for path in row.paths.values()]
        before_targets = [path[-len(query.targets) :] for path, query in zip(paths, queries, strict=True)]
        # The options of a question follow one place, whose logits serve the first tokens of them all.
        places, numbers = np.unique(np.concatenate(before_targets), return_inverse=True)
        targets = self._tensor(np.concatenate([query.targets for query in queries]))
        states, place_of = hidden[self._tensor(places)], self._tensor(numbers)
        log_probabilities = torch.empty(len(targets), dtype=torch.float32, device=self.device)
        is_greedy = torch.empty(len(targets), dtype=torch.bool, device=self.device)
        chunk = max(1, LOGITS_BYTES // (8 * len(head.weight)))
        for start in range(0, len(states), chunk):
            logits = head.logits(states[start : start + chunk])
            in_chunk = ((start <= place_of) & (place_of < start + chunk)).nonzero().squeeze(1)
            rows, tokens_there = place_of[in_chunk] - start, targets[in_chunk]
            log_probabilities[in_chunk] = logits[rows, tokens_there] - logits.logsumexp(-1)[rows]
            is_greedy[in_chunk] = logits.argmax(-1)[rows] == tokens_there
        sizes = [len(query.targets) for query in queries]
        by_query = zip(log_probabilities.cpu().split(sizes), is_greedy.cpu().split(sizes), strict=True)
        return [(float(of_query.sum()), bool(are_greedy.all())) for of_query, are_greedy in by_query]

    def _score_alone(self, queries: Sequence[Query]) -> list[tuple[float, bool]]:
        self.batch_size_per_gpu = len(queries)
        return HFLM._loglikelihood_tokens(self, [query.pair for query in queries], disable_tqdm=True)

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[PlannedBatch]:
        """Batches of prompts with the same settings."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            settings = (prompt.until, prompt.max_new_tokens, prompt.settings, prompt.ends)
            alike.setdefault(settings, []).append(number)
        for (_, max_new_tokens, settings, _), group in alike.items():
            is_greedy = self._is_plainly_greedy(json.loads(settings))
            lengths = [len(prompts[number].tokens) + max_new_tokens for number in group]
            # A text that grows beyond the limit changes its position frequencies at that moment, and those of the other
            # texts of its batch, so that each of them is generated alone.
            for numbers in self._padded(group, lengths, GENERATION_FACTOR * self.batch_tokens, beyond=0):
                compute = self._generate if is_greedy else self.generate_otherwise
                yield numbers, partial(compute, [prompts[number] for number in numbers])

    def _is_plainly_greedy(self, settings: dict[str, Any]) -> bool:
        """Whether the likeliest token is to be taken at every step, by a request's settings and the model's own."""
        config = self.model.generation_config
        own = {name for name, value in (config.to_diff_dict() if config else {}).items() if value not in (None, False)}
        return (
            self.shares_prefixes and own <= WITHOUT_EFFECT_ON_GREEDY and settings.keys() <= {"do_sample", "temperature"}
        )

    def generate_otherwise(self, prompts: Sequence[Prompt]) -> list[str]:
        """Texts by HFLM's own code, a few at a time."""
        self.batch_size_per_gpu = min(len(prompts), HFLM_TEXTS)
        settings = self.model.generation_config
        before = settings.eos_token_id
        settings.eos_token_id = sorted(self._ends(prompts))
        try:
            return HFLM.generate_until(self, [prompt.request for prompt in prompts], disable_tqdm=True)
        finally:
            settings.eos_token_id = before

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """The padded tokens of texts and their attention mask, both [B, T], for HFLM's own code."""
        encoded = self._encode(strings)
        longest = max(map(len, encoded))
        padded = np.full((len(encoded), longest), self.tokenizer.pad_token_id or 0)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(encoded):
            place = slice(longest - len(tokens), None) if padding_side == "left" else slice(len(tokens))
            padded[row, place], mask[row, place] = tokens, 1
        start = -(left_truncate_len or 0)
        return self._tensor(padded[:, start:]), self._tensor(mask[:, start:])

    def _ends(self, prompts: Sequence[Prompt]) -> set[int]:
        """The tokens that end the texts of prompts: those of the tokenizer, the model's own settings, the template."""
        of_template = {end for prompt in prompts for end in prompt.ends}
        return ({self.eot_token_id} | causal.text_ends(self.model) | of_template) - {None}

    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy texts of prompts with the same settings, which are padded on the left, as `generate` does it."""
        longest = max(len(prompt.tokens) for prompt in prompts)
        padded = np.zeros((2, len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            padded[:, row, longest - len(prompt.tokens) :] = prompt.tokens, np.ones_like(prompt.tokens)
        tokens, mask = self._tensor(padded)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        texts: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # the number of the prompt in each row of the tensors
        going = set(rows)
        has_ended = self._end_test(prompts)
        cache, head = DynamicCache(config=self._causal.config), self._head()
        for _ in range(prompts[0].max_new_tokens):
            with self._autocast():
                hidden = causal.body(self._causal)(
                    input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
            chosen = head.logits(hidden).argmax(-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                if row in going:
                    texts[row].append(token)
            going -= has_ended({number: texts[number] for number in going})
            if not going:
                break
            positions, tokens = positions[:, -1:] + 1, chosen.unsqueeze(1)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            if 4 * len(going) <= 3 * len(rows):  # not for every text that ends, as it copies the whole cache
                kept = self._tensor([place for place, row in enumerate(rows) if row in going])
                cache.batch_select_indices(kept)
                tokens, positions, mask = tokens[kept], positions[kept], mask[kept]
                rows = [row for row in rows if row in going]
        until = list(prompts[0].until)
        return [postprocess_generated_text(self.tok_decode(text), until, None) for text in texts]

    def _end_test(self, prompts: Sequence[Prompt]) -> Callable[[dict[int, list[int]]], set[int]]:
        """A function that gives the numbers of those texts that have ended, of texts by number.

        A text ends with an end token or where it holds a stop sequence. For stop sequences only the last tokens are
        decoded, as many as the longest one has and two more, since it may be spelled in other tokens; so does the
        harness. As these tokens alone may read differently from the whole text, the whole text decides.
        """
        ends, until = self._ends(prompts), prompts[0].until
        tail = 2 + max(len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until)

        def has_stop(text: str) -> bool:
            return any(stop in text for stop in until)

        def ended(texts: dict[int, list[int]]) -> set[int]:
            tails = self.tokenizer.batch_decode([tokens[-tail:] for tokens in texts.values()])
            return {
                number
                for (number, tokens), text in zip(texts.items(), tails, strict=True)
                if tokens[-1] in ends or (has_stop(text) and has_stop(self.tokenizer.decode(tokens)))
            }

        return ended

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=self.device)

    def _autocast(self) -> torch.autocast:
        """Within its block, products are computed in the scorer's precision."""
        kind = self.mixed_precision_dtype
        return torch.autocast(self.device.type, kind, enabled=kind is not None)

    def _head(self) -> causal.Head:
        """The head, in float32 where the arithmetic is bfloat16, whose few digits would make equals of large logits."""
        head = causal.head(self._causal)
        return head if self.mixed_precision_dtype is None else replace(head, weight=head.weight.float())

    def _gives_the_same_on_trees(self) -> bool:
        """Whether the model gives a few queries the same log-likelihoods on prefix trees as each alone."""
        generator = np.random.default_rng(0)
        common = generator.integers(self._causal.config.get_text_config().vocab_size, size=24, dtype=np.int32)
        whole = [np.concatenate((common[:9], common[start : start + 5])) for start in (9, 13, 17)] + [common[5:17]]
        queries = [Query(tokens[:-1], tokens[3:]) for tokens in whole]
        is_float32 = self._causal.dtype == torch.float32  # whatever its linear layers are held in
        try:
            with torch.inference_mode(), held.in_float32() if is_float32 else nullcontext():
                (row,) = prefix_trees.rows([query.inputs for query in queries], 64, 64)
                shared = self._score_trees([row], [queries[number] for number in row.paths])
                alone = self._score_alone([queries[number] for number in row.paths])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # the model does not take positions, or a mask of this shape
        # Half precision rounds log-probabilities to 2 or 3 digits. Attention to a wrong place makes larger differences.
        tolerance = 1e-4 if is_float32 else 0.05
        return np.allclose([ll for ll, _ in shared], [ll for ll, _ in alone], rtol=tolerance)


def _padded(pairs: Sequence[tuple[int, int]], tokens: int) -> Iterator[list[int]]:
    """Numbers in batches of at most so many tokens, padding included, the longest first; a longer text is alone.

    pairs: the number of each text, and its length in tokens.
    """
    batch: list[int] = []
    longest = 0
    for number, length in sorted(pairs, key=lambda pair: -pair[1]):
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        longest = longest if batch else length
        batch.append(number)
    if batch:
        yield batch


def identity(model: Any, tokenizer: Any, precision: Precision = "float32") -> str:
    """A name for all that decides a model's answers: the SHA-256 of its weights, their type, settings and tokenizer.

    precision: the type of the arithmetic, which is a part of it.
    """
    settings = [model.config.to_json_string(), str(model.dtype), precision, tokenizer.backend_tokenizer.to_str()]
    if model.generation_config is not None:
        settings.append(model.generation_config.to_json_string())
    sha256 = hashlib.sha256("\0".join(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
