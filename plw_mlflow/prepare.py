"""Prepare: a data set's examples, split into training and validation, and their length profile."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plw_mlflow import inversion, records
from plw_mlflow.config import PUBLISHED_PLWS, DataOptions
from plw_mlflow.records import Record, Source
from plw_mlflow.tokens import Example, Segment, encode


@dataclass(frozen=True)
class Prepared:
    """What training reads."""

    source: Source
    training: list[Example]
    validation: list[Example]
    profile: dict[str, Any]


def run(dataset: str, tokenizer: Any, options: DataOptions) -> Prepared:
    """Read, invert, tokenise and split a data set, and measure it.

    Raises ValueError where a record is unusable (records.load), or where no example is left to train on.
    """
    source = records.load(dataset, max_records=options.max_records, on_bad_record=options.on_bad_record)
    chosen = source.records
    inverted = 0
    if options.invert:
        chosen = [inversion.invert(record, lambda text: count_tokens(text, tokenizer)) for record in chosen]
        inverted = sum(new is not old for new, old in zip(chosen, source.records, strict=True))
    placed: list[tuple[float, Example]] = []
    dropped, truncated = [], 0
    for record in chosen:
        example = encode(record, tokenizer)
        if len(example.tokens) > options.max_tokens:
            if options.on_long == "drop":
                dropped.append(record.id)
                continue
            example = Example(example.tokens[: options.max_tokens], example.segment[: options.max_tokens])
            truncated += 1
        placed.append((_place(record), example))
    share = options.validation_share
    if len(placed) > 1:  # a few records may all lie beyond the share; the curves need one all the same
        share = max(share, math.nextafter(min(place for place, _ in placed), 1))
    training = [example for place, example in placed if place >= share]
    validation = [example for place, example in placed if place < share]
    examples = training + validation
    lost = sum(not _has_completion(example) for example in examples)
    if not any(map(_has_completion, training)):
        raise ValueError(
            f"no example of {dataset} is left to train on: of {len(chosen)} records {len(dropped)} were dropped and "
            f"{lost} lost their whole completion at max-tokens={options.max_tokens} (raise --max-tokens), and "
            f"{len(validation)} are kept for validation"
        )
    counts = {
        "records": len(chosen),
        "inverted": inverted,
        "skipped": source.skipped,
        "dropped_as_too_long": dropped,
        "truncated": truncated,
        "lost_whole_completion": lost,
        "training_examples": len(training),
        "validation_examples": len(validation),
    }
    identity = {"dataset": dataset, "location": source.location, "sha256": source.sha256}
    return Prepared(source, training, validation, identity | counts | profile(examples))


def profile(examples: Sequence[Example]) -> dict[str, Any]:
    """Token counts per segment, the generation ratio, and what share of the total loss weight prompts have.

    The generation ratio is a ratio of means, as the study's (paper Table 1): completion tokens over prompt tokens,
    bare (instruction and input alone) and with the template and special tokens.
    """
    lengths = {segment: [example.segment.count(segment) for example in examples] for segment in Segment}
    means = {segment: statistics.fmean(lengths[segment]) for segment in Segment}
    prompt = means[Segment.INSTRUCTION] + means[Segment.INPUT]
    completion = means[Segment.COMPLETION]
    templated = prompt + means[Segment.TEMPLATE]
    bare_completion = statistics.fmean(max(0, length - 1) for length in lengths[Segment.COMPLETION])  # without EOS
    return {
        "tokens": sum(len(example.tokens) for example in examples),
        "mean_tokens": {segment.name.lower(): means[segment] for segment in Segment},
        "generation_ratio": bare_completion / prompt if prompt else None,
        "generation_ratio_with_template": completion / templated,
        "effective_prompt_share": {
            f"{plw:g}": plw * templated / (plw * templated + completion) for plw in PUBLISHED_PLWS
        },
    }


def count_tokens(text: str, tokenizer: Any) -> int:
    """Bare tokens of a text; the empty text has none."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def profile_text(found: dict[str, Any]) -> str:
    """The profile as a person reads it."""
    means = found["mean_tokens"]
    ratio = found["generation_ratio"]
    shares = "  ".join(f"{plw}: {share:.3f}" for plw, share in found["effective_prompt_share"].items())
    lines = [
        f"data set            {found['dataset']}  (sha256 {found['sha256'][:12]})",
        f"records             {found['records']}  ({found['training_examples']} training, "
        f"{found['validation_examples']} validation examples)",
        f"left out            {len(found['skipped'])} unusable, {len(found['dropped_as_too_long'])} too long; "
        f"{found['truncated']} truncated, of which {found['lost_whole_completion']} lost their whole completion",
        "mean tokens         " + ", ".join(f"{name} {mean:.1f}" for name, mean in means.items()),
        f"generation ratio    {'undefined' if ratio is None else f'{ratio:.3f}'} bare, "
        f"{found['generation_ratio_with_template']:.3f} with the template",
        f"prompts' share of the loss weight, by PLW\n  {shares}",
    ]
    return "\n".join(lines)


def write(prepared: Prepared, folder: Path | None) -> None:
    """Write the profile to FOLDER/profile.json, if there is a folder."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "profile.json").write_text(json.dumps(prepared.profile, indent=2) + "\n")


def _has_completion(example: Example) -> bool:
    return Segment.COMPLETION in example.segment


def _place(record: Record) -> float:
    """Where a record lies in 0..1, by a hash of its text, so that adding rows moves none; the first are validation."""
    text = "\x00".join((record.instruction, record.input, record.output)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:6]) / 2**48
