"""The length profile of a data set: what is in it, before a GPU hour is spent on it.

Lengths are given twice: bare, each text tokenised alone without special tokens (the paper's Table 1), and with the
template, as the model reads them. There, a token that straddles the end of the prompt counts as prompt, as it does for
whoever tokenises the prompt alone; in training it may count as completion (`Encoder`).
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.config import DivisorScope, LossDivisor
from plw_mlflow.config.limits import COUNTED, Limit
from plw_mlflow.data import audit, weights
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import RunError
from plw_mlflow.study import PUBLISHED_PLWS

Counts = NDArray[np.integer[Any]]  # [N], one a record

QUANTILES = (0, 0.01, *(round(0.05 * step, 2) for step in range(1, 20)), 0.99, 1)
SHOWN_QUANTILES = (0.05, 0.5, 0.95, 1)  # in the table


@dataclass(frozen=True)
class SourceContents:
    """What was read of one source."""

    name: str  # as the caller gave it
    location: str  # as `Source` has it
    sha256: str  # as `Source` has it
    licence: str  # empty where it is not known
    noncommercial: bool  # whether the licence is known to forbid commercial use
    format: str  # of its records: alpaca, dolly, prompt-completion or chat
    records: int  # that were chosen of it
    fields_not_read: dict[str, int]  # by name of a field, the records that have it; the hundred most frequent ones
    skipped: list[str]  # for each record that could not be used, its number and why


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What was read of a data set, and what became of it."""

    dataset: str  # as the caller gave it
    name: str  # with what was done to it, as runs and figures show it: "toy-long inverted"
    sources: list[SourceContents]  # the data set's, and the second one's where two are mixed
    template: str  # as the caller gave it
    records: int  # that were chosen, before any is dropped as too long
    inverted: int  # records
    duplicates: int  # records whose text has occurred before: those left out, or those among the chosen ones
    duplicates_dropped: bool  # whether they were left out
    dropped_as_too_long: int  # records
    first_dropped_as_too_long: list[str]  # ids of the first hundred of them
    truncated: int  # records that were cut at `max_tokens`
    lost_whole_completion: int  # records of which no token of the completion is left to train on
    training_examples: int
    validation_examples: int


@dataclass(frozen=True)
class Lengths:
    """How many tokens some part of the records has."""

    mean: float
    deviation: float  # the standard deviation of these records, not an estimate for others
    quantiles: dict[str, int]  # by share of the records ("0.5": the median); each is a length that occurs


@dataclass(frozen=True, kw_only=True)
class Profile(Contents):
    """What is in a data set: `profile.json` has these fields in this order.

    All that follows describes the chosen records before any is dropped or cut. "With template" is as the model reads
    them. A generation ratio is completion tokens over prompt tokens, None where there are no prompts.
    """

    tokens_bare: int  # of all texts
    tokens: int  # of all examples, templates and ends of text included
    lengths: dict[str, Lengths]  # of instruction, input, prompt (both) and completion, bare
    lengths_with_template: dict[str, Lengths]  # of the same (prompt: with the template), and of the example
    generation_ratio: float | None  # ratio of the means, as in the paper
    generation_ratio_with_template: float | None
    mean_of_ratios: float | None  # mean of the ratios of single records that have a prompt
    mean_of_ratios_with_template: float | None
    completion_shorter_than_prompt: float  # share of the records
    completion_shorter_than_prompt_with_template: float  # share of the records
    border_straddled: float  # share of the records in which a token straddles the end of the prompt
    end_straddled: float  # share of the records in which a token straddles the end of an answer
    audit: dict[str, int]  # by name of a fault, the examples that have it (docs/data.md)
    completion_share: dict[str, float]  # of an example's predicted tokens, by share of the examples as in `quantiles`
    max_tokens: int  # longest example
    longer_than_max_tokens: float  # share of the records
    no_completion_within_max_tokens: float  # share of the records
    template_weight: float | None  # loss weight of the template's tokens; None: as the rest of the prompt
    completion_weight: float  # loss weight of completion tokens
    loss_divisor: LossDivisor  # what the loss is divided by
    divisor_scope: DivisorScope
    # By PLW, the share that prompt tokens (template included) have in the loss weight of all tokens that are trained
    # on; None where no token has any.
    effective_prompt_share: dict[str, float | None]


def measure(
    contents: Contents,
    columns: Mapping[str, Counts],
    max_tokens: int,
    predicted: weights.Counts,
    loss: Weights,
    counted: Mapping[str, int],
) -> Profile:
    """The profile of a data set.

    columns: of each record, before any is dropped or cut (N records), the number of
        instruction, input, completion: bare tokens;
        template_tokens, instruction_tokens, input_tokens, completion_tokens: tokens of the example by segment;
        length: all tokens of the example;
        straddling: tokens among completion_tokens that begin in the prompt;
        straddling_end: tokens among completion_tokens that end in the template's text after an answer;
        completion_kept, template_kept: tokens of the segment within the first `max_tokens` of the example;
        and first: the segment of its first token.
    predicted: of the examples that are trained on (`predicted_counts`). loss: weights at any PLW. counted: of
        `count_faults`.
    """
    straddling, length = columns["straddling"], columns["length"]
    bare = {name: columns[name] for name in ("instruction", "input", "completion")}
    bare["prompt"] = bare["instruction"] + bare["input"]
    templated = {
        "instruction": columns["instruction_tokens"],
        "input": columns["input_tokens"],
        "prompt": length - columns["completion_tokens"] + straddling,
        "completion": columns["completion_tokens"] - straddling,
        "example": length,
    }
    is_cut = length > max_tokens
    return Profile(
        **vars(contents),
        tokens_bare=int(bare["prompt"].sum() + bare["completion"].sum()),
        tokens=int(length.sum()),
        lengths={name: _lengths(bare[name]) for name in ("instruction", "input", "prompt", "completion")},
        lengths_with_template={name: _lengths(counts) for name, counts in templated.items()},
        generation_ratio=_ratio(bare["completion"].sum(), bare["prompt"].sum()),
        generation_ratio_with_template=_ratio(templated["completion"].sum(), templated["prompt"].sum()),
        mean_of_ratios=_mean_of_ratios(bare),
        mean_of_ratios_with_template=_mean_of_ratios(templated),
        completion_shorter_than_prompt=float((bare["completion"] < bare["prompt"]).mean()),
        completion_shorter_than_prompt_with_template=float((templated["completion"] < templated["prompt"]).mean()),
        border_straddled=float((straddling > 0).mean()),
        end_straddled=float((columns["straddling_end"] > 0).mean()),
        audit=dict(counted),
        completion_share=_completion_shares(predicted),
        max_tokens=max_tokens,
        longer_than_max_tokens=float(is_cut.mean()),
        no_completion_within_max_tokens=float((columns["completion_kept"] == 0).mean()),
        template_weight=loss.template_weight,
        completion_weight=loss.completion_weight,
        loss_divisor=loss.loss_divisor,
        divisor_scope=loss.divisor_scope,
        effective_prompt_share={
            f"{plw:g}": weights.prompt_share(predicted, replace(loss, plw=plw)) for plw in PUBLISHED_PLWS
        },
    )


def predicted_counts(columns: Mapping[str, Counts], max_tokens: int) -> weights.Counts:
    """Of each record, how many tokens of each segment are predicted within `max_tokens`, as `weights.count` has them.

    Those of the input are counted to the instruction, as both weigh the same. columns: as `measure` takes them.
    """
    # The first token of an example is never predicted.
    completion, template = (
        columns[f"{segment.name.lower()}_kept"].astype(np.int64) - (columns["first"] == segment)
        for segment in (Segment.COMPLETION, Segment.TEMPLATE)
    )
    all_tokens = np.minimum(columns["length"], max_tokens).astype(np.int64) - 1
    return np.stack([template, all_tokens - completion - template, np.zeros_like(template), completion], axis=1)


def count_faults(
    columns: Mapping[str, Counts],
    is_used: NDArray[np.bool_],
    predicted: weights.Counts,
    loss: Weights,
    *,
    max_tokens: int,
    **others: int,
) -> dict[str, int]:
    """How many of the records have each fault, by name.

    columns: of N records, as `measure` takes them. is_used: bool [N], true for those that are not dropped.
    predicted: of all N (`predicted_counts`). loss: the weights of training. others: what is counted elsewhere.
    """
    bits, is_cut = columns["audit"], columns["length"] > max_tokens
    has_none = columns["completion_kept"] == 0
    lost_end = is_cut & (columns["completion_kept"] < columns["completion_tokens"])
    masses = (predicted * (np.array(loss.by_segment) != 0)).sum(1)
    if loss.loss_divisor == "share":  # of which a prompt without completion has nothing
        masses = masses * (predicted[:, Segment.COMPLETION] > 0)
    found = {name: bits & bit > 0 for name, bit in audit.BITS.items()} | {
        "no_completion": has_none,
        "all_masked": masses == 0,
        "no_end": lost_end | (bits & audit.BITS["without_end_token"] > 0),
        "prompt_cut": is_cut & has_none,
    }
    counts = {name: int((is_faulty & is_used).sum()) for name, is_faulty in found.items()} | others
    return {name: counts[name] for name in COUNTED}


def check_limits(profile: Profile, limits: Sequence[Limit]) -> None:
    """Raise RunError with the limits that what was counted breaks.

    A share is of the chosen records; where those that are counted are not among them, of both together.
    """
    broken = []
    for limit in limits:
        found, records = profile.audit[limit.name], profile.records
        if limit.name == "left_out" or (limit.name == "duplicates" and profile.duplicates_dropped):
            records += found
        if limit.is_broken(found, records):
            broken.append(f"{limit.name} is {found} of {records} records, and {limit} was given as a limit")
    if broken:
        raise RunError("; ".join(broken))


def _lengths(counts: Counts) -> Lengths:
    quantiles = np.quantile(counts, QUANTILES, method="inverted_cdf")
    by_share = {f"{quantile:g}": int(value) for quantile, value in zip(QUANTILES, quantiles, strict=True)}
    return Lengths(float(counts.mean()), float(counts.std()), by_share)


def _completion_shares(predicted: weights.Counts) -> dict[str, float]:
    """Quantiles of the share that the completion has in the tokens of an example that are predicted."""
    totals = predicted.sum(1)
    has_any = totals > 0
    if not has_any.any():
        return {}
    shares = predicted[has_any, Segment.COMPLETION] / totals[has_any]
    quantiles = np.quantile(shares, QUANTILES, method="inverted_cdf")
    return {f"{quantile:g}": float(value) for quantile, value in zip(QUANTILES, quantiles, strict=True)}


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _mean_of_ratios(counts: Mapping[str, Counts]) -> float | None:
    has_prompt = counts["prompt"] > 0
    ratios = counts["completion"][has_prompt] / counts["prompt"][has_prompt]
    return float(ratios.mean()) if len(ratios) else None


# Its text.


def text(profile: Profile) -> str:
    """A profile as a person reads it."""
    lines = [line for source in profile.sources for line in _source_lines(source)]
    repeated = "left out" if profile.duplicates_dropped else "kept (--drop-duplicates leaves them out)"
    lines += [
        f"records             {profile.records}  ({profile.training_examples} training, "
        f"{profile.validation_examples} validation examples), {profile.inverted} inverted",
        f"exact duplicates    {profile.duplicates}" + (f", {repeated}" if profile.duplicates else ""),
        f"too long            {profile.dropped_as_too_long} dropped; {profile.truncated} truncated, of which "
        f"{profile.lost_whole_completion} lost their whole completion",
        *_length_lines(profile),
        f"generation ratio      {_number(profile.generation_ratio)} bare, "
        f"{_number(profile.generation_ratio_with_template)} with the template (ratios of means)",
        f"mean of ratios        {_number(profile.mean_of_ratios)} bare, "
        f"{_number(profile.mean_of_ratios_with_template)} with the template",
        f"max-tokens {profile.max_tokens:<11}{profile.longer_than_max_tokens:.2%} of the records are longer; "
        f"{profile.no_completion_within_max_tokens:.2%} have no completion within it",
    ]
    if profile.border_straddled:
        lines.append(
            f"prompt's end          in {profile.border_straddled:.2%} of the records a token straddles it: "
            "prompt in this table, completion in training"
        )
    if profile.end_straddled:
        lines.append(
            f"answers' ends         in {profile.end_straddled:.2%} of the records a token straddles one: completion"
        )
    if profile.completion_share:
        shown = [
            f"{_quantile_title(quantile)} {profile.completion_share[f'{quantile:g}']:.1%}"
            for quantile in (0, *SHOWN_QUANTILES)
        ]
        lines.append("completion's share   of an example's tokens: " + ", ".join(shown))
    faults = [f"{name} {number}" for name, number in profile.audit.items() if number]
    lines.append("audit               " + (", ".join(faults) or "nothing found") + "  (docs/data.md)")
    shares = [f"{plw}: {_number(share)}" for plw, share in profile.effective_prompt_share.items()]
    lines += [f"prompts' share of the loss weight, by PLW{weights_text(profile)}", "  " + "  ".join(shares)]
    return "\n".join(lines)


def weights_text(profile: Profile) -> str:
    """What a profile's prompt shares were computed with beside the PLW; empty where it is the usual."""
    told = []
    if profile.template_weight is not None:
        told.append(f"template weight {profile.template_weight:g}")
    if profile.completion_weight != 1:
        told.append(f"completion weight {profile.completion_weight:g}")
    if Weights(1, None, 1, profile.loss_divisor, profile.divisor_scope).have_factors:
        told.append(f"loss divisor {profile.loss_divisor} by {profile.divisor_scope}")
    return f" at {' and '.join(told)}" if told else ""


def equals_text(predicted: weights.Counts, loss: Weights) -> str:
    """The PLWs at which prompts have the same share of the weight under other losses, as a table.

    predicted: of the examples that are trained on (`predicted_counts`).
    """
    share = weights.prompt_share(predicted, loss)
    if share is None:
        return f"at PLW {loss.plw:g} no token has any weight"
    lines = [
        f"at PLW {loss.plw:g} by loss divisor {loss.loss_divisor} and scope {loss.divisor_scope}, prompts have "
        f"{share:.2%} of the loss weight; the same at PLW",
        f"  {'':<10}{'by step':>12}{'by example':>12}",
    ]
    for divisor in typing.get_args(LossDivisor):
        other = replace(loss, loss_divisor=divisor)
        if divisor == "share" and loss.template_weight:  # which that loss has not
            other = replace(other, template_weight=None)
        by_scope = [replace(other, divisor_scope=scope) for scope in ("step", "example")]
        plws = [weights.plw_of_share(predicted, each, share) for each in by_scope]
        lines.append(f"  {divisor:<10}" + "".join(f"{'none' if plw is None else f'{plw:.4g}':>12}" for plw in plws))
    return "\n".join(lines)


def _source_lines(source: SourceContents) -> list[str]:
    licence = (source.licence or "not known") + (": NON-COMMERCIAL USE ONLY" if source.noncommercial else "")
    lines = [
        f"data set            {source.name}  (sha256 {source.sha256[:12]}, {source.format} format)",
        f"licence             {licence}",
    ]
    if fields := [f"{name!r} ({count})" for name, count in source.fields_not_read.items()]:
        lines.append("fields not read     " + ", ".join(fields[:10]) + (", ..." if len(fields) > 10 else ""))
    lines += [f"left out            {fault}" for fault in source.skipped[:5]]
    if len(source.skipped) > 5:
        lines.append(f"                    ... {len(source.skipped)} in all, listed in profile.json")
    return lines


def _length_lines(profile: Profile) -> list[str]:
    titles = [_quantile_title(quantile) for quantile in SHOWN_QUANTILES]
    lines = [f"{'tokens of a record':<22}{'mean':>9}{'deviation':>11}" + "".join(f"{title:>9}" for title in titles)]
    for heading, by_part in (("bare", profile.lengths), ("with the template", profile.lengths_with_template)):
        lines.append(heading)
        for part, lengths in by_part.items():
            shown = "".join(f"{lengths.quantiles[f'{quantile:g}']:>9}" for quantile in SHOWN_QUANTILES)
            lines.append(f"  {part:<20}{lengths.mean:>9.2f}{lengths.deviation:>11.2f}{shown}")
    return lines


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _quantile_title(quantile: float) -> str:
    return {0.5: "median", 1: "most"}.get(quantile, f"{quantile:.0%}")
