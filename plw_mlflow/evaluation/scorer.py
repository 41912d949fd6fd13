"""Scoring: a language model for lm-evaluation-harness that answers as its own HFLM does, and computes less.

Queries that begin alike share that beginning's computation (trees.py): the options of a question their context,
questions their few-shot examples. Logits are made where a target is looked up and nowhere else. Generation drops the
texts that have ended, so that a batch costs what its texts need. That a model computes the same on trees is tried on
the model itself; where it does not (state-space models, positions that are counted rather than given), HFLM's own code
answers, on batches made here.

Letters: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from torch import Tensor, nn
from transformers import DynamicCache

from plw_mlflow.evaluation import prefix_trees
from plw_mlflow.evaluation.caching_lm import CachingLM, PlannedBatch, Prompt, Query
from plw_mlflow.models import causal

LOGITS_BYTES = 256 * 2**20  # of logits and what is computed of them at a time
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # a processor's caches like small batches
SAMPLED = 16  # texts at a time where they are drawn at random, by HFLM's own code
GENERATION = 4  # times as many tokens are in the cache of a batch that generates: a step computes one of each text
# What a model's own generation settings may hold without greedy generation being another for it.
GREEDY = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p"}
GREEDY |= {"max_length", "max_new_tokens", "use_cache", "transformers_version", "_from_model_config"}


class Scorer(CachingLM, HFLM):
    """HFLM with its encoding of requests, and scoring and greedy generation of our own.

    batch_tokens: how many tokens go through the model at once; halved whenever they do not fit the device's memory.
    folder: where finished requests are kept, for this model and this one alone.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_tokens: int | None = None, folder: Path | None = None) -> None:
        super().__init__(pretrained=model.eval(), tokenizer=tokenizer, batch_size=SAMPLED, max_batch_size=None)
        self.window = self.max_length
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        self._causal = causal.unwrap(model)
        config = self._causal.config.get_text_config()
        # Scores of other places are computed and thrown away: few beside the products of a wide model.
        self._room = min(max(128, 2 * config.hidden_size), 1024)
        # Trees know no sliding windows or chunks of attention: what is longer than one is scored without them.
        local = ("sliding_window", "attention_chunk_size", "window_size")
        windows = [getattr(config, name, None) or self.max_length for name in local]
        # Beyond this many tokens, a text changes what is computed for shorter ones beside it.
        self._limit = causal.length_limit(self._causal.config) or self.max_length
        self._tree_tokens = min(*windows, self._limit)
        self.shares = self._can_share()
        if not self.shares:
            warnings.warn(
                f"{config.model_type} does not compute the same where requests share a beginning: "
                "each is scored alone, which takes longer",
                stacklevel=2,
            )
        self.keep(None if folder is None else folder / f"answers-{identity(model, tokenizer)[:16]}.jsonl")

    def halve(self, reason: str) -> None:
        """Let half as many tokens through at once."""
        self.batch_tokens = max(1, self.batch_tokens // 2)
        warnings.warn(f"{reason}; going on with {self.batch_tokens} tokens at once", stacklevel=2)
        torch.cuda.empty_cache()

    def plan_scores(self, queries: list[Query]) -> Iterator[PlannedBatch]:
        """Batches of trees, then of what has to stand alone."""
        fits = [self.shares and len(query.inputs) <= self._tree_tokens for query in queries]
        within = [number for number, fit in enumerate(fits) if fit]
        room = min(self._room, self.batch_tokens)
        laid_out = prefix_trees.rows([queries[number].inputs for number in within], room, self.batch_tokens)
        for batch in prefix_trees.batches(laid_out, self.batch_tokens):
            numbers = [within[number] for row in batch for number in row.paths]
            yield numbers, partial(self._score_trees, batch, [queries[number] for number in numbers])
        alone = [number for number, fit in enumerate(fits) if not fit]
        lengths = [len(queries[number].inputs) for number in alone]
        # Beyond the limit, models know one set of position frequencies.
        for numbers in self._padded(alone, lengths, self.batch_tokens, beyond=self.batch_tokens):
            yield numbers, partial(self._score_alone, [queries[number] for number in numbers])

    def _padded(self, numbers: Sequence[int], lengths: Sequence[int], tokens: int, beyond: int) -> Iterator[list[int]]:
        """Numbers in batches of so many tokens; texts longer than the limit apart, in batches of `beyond` tokens."""
        pairs = list(zip(numbers, lengths, strict=True))
        long, short = ([pair for pair in pairs if (pair[1] > self._limit) is kind] for kind in (True, False))
        for part, most in ((long, beyond), (short, tokens)):
            yield from _padded([number for number, _ in part], [length for _, length in part], most)

    def _score_trees(self, batch: Sequence[prefix_trees.TreeRow], queries: Sequence[Query]) -> list[tuple[float, bool]]:
        """queries: those of the batch's rows, in order."""
        tokens, positions, mask = prefix_trees.inputs(batch, self._causal.dtype, self.device)
        hidden = causal.hidden_states(self._causal, tokens, position_ids=positions, attention_mask=mask)
        hidden, head = hidden.flatten(0, 1), causal.head(self._causal)  # hidden: [B * T, H]
        paths = [path + start * tokens.shape[1] for start, row in enumerate(batch) for path in row.paths.values()]
        asked = [path[-len(query.targets) :] for path, query in zip(paths, queries, strict=True)]
        # Options part at one place, whose logits serve the first tokens of them all.
        places, numbers = np.unique(np.concatenate(asked), return_inverse=True)
        targets = self._tensor(np.concatenate([query.targets for query in queries]))
        states, place_of = hidden[self._tensor(places)], self._tensor(numbers)
        found = torch.empty(len(targets), dtype=torch.float32, device=self.device)
        greedy = torch.empty(len(targets), dtype=torch.bool, device=self.device)
        chunk = max(1, LOGITS_BYTES // (8 * len(head.weight)))
        for start in range(0, len(states), chunk):
            logits = head.logits(states[start : start + chunk])
            some = ((start <= place_of) & (place_of < start + chunk)).nonzero().squeeze(1)
            rows, wanted = place_of[some] - start, targets[some]
            found[some] = logits[rows, wanted] - logits.logsumexp(-1)[rows]
            greedy[some] = logits.argmax(-1)[rows] == wanted
        sizes = [len(query.targets) for query in queries]
        return [
            (float(several.sum()), bool(right.all()))
            for several, right in zip(found.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        ]

    def _score_alone(self, queries: Sequence[Query]) -> list[tuple[float, bool]]:
        self.batch_size_per_gpu = len(queries)
        return HFLM._loglikelihood_tokens(self, [query.pair for query in queries], disable_tqdm=True)

    def plan_generation(self, prompts: list[Prompt]) -> Iterator[PlannedBatch]:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, prompt in enumerate(prompts):
            kinds.setdefault((prompt.until, prompt.most, prompt.other, prompt.ends), []).append(number)
        config = self.model.generation_config
        own = {name for name, value in (config.to_diff_dict() if config else {}).items() if value not in (None, False)}
        for (_, most, other, _), kind in kinds.items():
            is_greedy = self.shares and own <= GREEDY and json.loads(other).keys() <= {"do_sample", "temperature"}
            lengths = [len(prompts[number].tokens) + most for number in kind]
            # One that grows beyond the limit changes its frequencies then, and those of the others with them.
            for numbers in self._padded(kind, lengths, GENERATION * self.batch_tokens, beyond=0):
                run = self._generate if is_greedy else self.generate_otherwise
                yield numbers, partial(run, [prompts[number] for number in numbers])

    def generate_otherwise(self, prompts: Sequence[Prompt]) -> list[str]:
        """Texts by HFLM's own code, a few at a time."""
        self.batch_size_per_gpu = min(len(prompts), SAMPLED)
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
        """Tokens of texts and where there are any, both [B, T], padded; for HFLM's own code."""
        several = self._encode(strings)
        longest = max(map(len, several))
        padded = np.full((len(several), longest), self.tokenizer.pad_token_id or 0)
        mask = np.zeros_like(padded)
        for row, tokens in enumerate(several):
            place = slice(longest - len(tokens), None) if padding_side == "left" else slice(len(tokens))
            padded[row, place], mask[row, place] = tokens, 1
        start = -(left_truncate_len or 0)
        return self._tensor(padded[:, start:]), self._tensor(mask[:, start:])

    def _ends(self, prompts: Sequence[Prompt]) -> set[int]:
        """The tokens that end the texts of prompts: by the tokenizer, the model's own settings, and the template."""
        taught = {end for prompt in prompts for end in prompt.ends}
        return ({self.eot_token_id} | causal.text_ends(self.model) | taught) - {None}

    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy texts of prompts with the same settings; padded on the left, as `generate` has them."""
        until, most = prompts[0].until, prompts[0].most
        longest = max(len(prompt.tokens) for prompt in prompts)
        padded = np.zeros((2, len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            padded[:, row, longest - len(prompt.tokens) :] = prompt.tokens, np.ones_like(prompt.tokens)
        tokens, mask = self._tensor(padded)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ends = self._ends(prompts)
        # Two more than the stop sequence itself has, as the harness looks back: it may be spelled in other tokens.
        tail = 2 + max(len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in until)
        texts: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # which prompt a row of the tensors is
        going = set(rows)
        cache, head = DynamicCache(config=self._causal.config), causal.head(self._causal)
        for _ in range(most):
            hidden = causal.body(self._causal)(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            chosen = head.logits(hidden).argmax(-1)
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

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=self.device)

    def _can_share(self) -> bool:
        """Whether the model gives the same log-probabilities on trees as on the sequences alone; tried on a few."""
        generator = np.random.default_rng(0)
        common = generator.integers(self._causal.config.get_text_config().vocab_size, size=24, dtype=np.int32)
        whole = [np.concatenate((common[:9], common[start : start + 5])) for start in (9, 13, 17)] + [common[5:17]]
        queries = [Query(tokens[:-1], tokens[3:]) for tokens in whole]
        try:
            with torch.inference_mode():
                (row,) = prefix_trees.rows([query.inputs for query in queries], 64, 64)
                shared = self._score_trees([row], [queries[number] for number in row.paths])
                alone = self._score_alone([queries[number] for number in row.paths])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # a model that takes no positions, or no mask of its caller's
        # Half precision rounds log-probabilities to 2 or 3 digits; a place that sees what it should not is further off.
        tolerance = 1e-4 if self._causal.dtype == torch.float32 else 0.05
        return np.allclose([ll for ll, _ in shared], [ll for ll, _ in alone], rtol=tolerance)


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
