"""The length profile of a data set: what is in it, before a GPU hour is spent on it.

Lengths are told twice: bare, each text tokenised alone without special tokens (the paper's Table 1), and with the
template, as the model reads them. There, a token that straddles the end of the prompt is counted to the prompt, as
whoever tokenises the prompt alone counts it; training may do otherwise (`Encoder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from plw_mlflow.data.templates import Segment
from plw_mlflow.study import PUBLISHED_PLWS

Counts = NDArray[np.integer[Any]]  # [N], one a record

QUANTILES = (0, 0.01, *(round(0.05 * step, 2) for step in range(1, 20)), 0.99, 1)
SHOWN_QUANTILES = (0.05, 0.5, 0.95, 1)  # in the table


def profile(
    columns: Mapping[str, Counts],
    max_tokens: int,
    on_long: Literal["drop", "truncate"],
    *,
    template_weight: float | None = None,
    completion_weight: float = 1.0,
) -> dict[str, Any]:
    """Lengths, generation ratios, what `max_tokens` costs, and what part of the loss weight lies on prompts.

    columns: of each record, before any is dropped or cut (N records, at least one of them within `max_tokens` if
        longer ones are dropped), the number of
        instruction, input, completion: bare tokens;
        template_tokens, instruction_tokens, input_tokens, completion_tokens: tokens of the example by segment;
        length: all tokens of the example;
        straddling: tokens among completion_tokens that begin in the prompt;
        straddling_end: tokens among completion_tokens that end in the template's text after an answer;
        completion_kept, template_kept: tokens of the segment within the first `max_tokens` of the example;
        and first: the segment of its first token.
    template_weight: loss weight of the template's tokens (None: as the prompt).

    A generation ratio is completion tokens over prompt tokens: the ratio of their means, as in the paper, and for
    comparison the mean of the records' own ratios. The effective prompt share at a PLW is the weight of all prompt
    tokens, template included, over the weight of all tokens that are trained on: what is not completion, over all.
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
    trained = ~is_cut if on_long == "drop" else np.ones(len(length), bool)
    # Of every example the first token is never predicted, so it has no weight.
    completion, template = (
        int((columns[f"{segment.name.lower()}_kept"] - (columns["first"] == segment))[trained].sum())
        for segment in (Segment.COMPLETION, Segment.TEMPLATE)
    )
    prompt = int((np.minimum(length, max_tokens) - 1)[trained].sum()) - completion - template

    def prompt_share(plw: float) -> float | None:
        weight = plw * prompt + (plw if template_weight is None else template_weight) * template
        return _ratio(weight, weight + completion_weight * completion)

    return {
        "tokens_bare": int(bare["prompt"].sum() + bare["completion"].sum()),
        "tokens": int(length.sum()),
        "lengths": {name: _lengths(bare[name]) for name in ("instruction", "input", "prompt", "completion")},
        "lengths_with_template": {name: _lengths(counts) for name, counts in templated.items()},
        "generation_ratio": _ratio(bare["completion"].sum(), bare["prompt"].sum()),
        "generation_ratio_with_template": _ratio(templated["completion"].sum(), templated["prompt"].sum()),
        "mean_of_ratios": _mean_of_ratios(bare),
        "mean_of_ratios_with_template": _mean_of_ratios(templated),
        "completion_shorter_than_prompt": float((bare["completion"] < bare["prompt"]).mean()),
        "completion_shorter_than_prompt_with_template": float((templated["completion"] < templated["prompt"]).mean()),
        "border_straddled": float((straddling > 0).mean()),
        "end_straddled": float((columns["straddling_end"] > 0).mean()),
        "max_tokens": max_tokens,
        "longer_than_max_tokens": float(is_cut.mean()),
        "no_completion_within_max_tokens": float((columns["completion_kept"] == 0).mean()),
        "template_weight": template_weight,
        "completion_weight": completion_weight,
        "effective_prompt_share": {f"{plw:g}": prompt_share(plw) for plw in PUBLISHED_PLWS},
    }


def profile_text(found: Mapping[str, Any]) -> str:
    """A profile as a person reads it."""
    titles = [_quantile_title(quantile) for quantile in SHOWN_QUANTILES]
    lines = [f"{'tokens of a record':<22}{'mean':>9}{'deviation':>11}" + "".join(f"{title:>9}" for title in titles)]
    for heading, lengths in (
        ("bare", found["lengths"]),
        ("with the template", found["lengths_with_template"]),
    ):
        lines.append(heading)
        for name, length in lengths.items():
            shown = "".join(f"{length['quantiles'][f'{quantile:g}']:>9}" for quantile in SHOWN_QUANTILES)
            lines.append(f"  {name:<20}{length['mean']:>9.2f}{length['deviation']:>11.2f}{shown}")
    lines += [
        f"generation ratio      {_number(found['generation_ratio'])} bare, "
        f"{_number(found['generation_ratio_with_template'])} with the template (ratios of means)",
        f"mean of ratios        {_number(found['mean_of_ratios'])} bare, "
        f"{_number(found['mean_of_ratios_with_template'])} with the template",
        f"max-tokens {found['max_tokens']:<11}{found['longer_than_max_tokens']:.2%} of the records are longer; "
        f"{found['no_completion_within_max_tokens']:.2%} have no completion within it",
    ]
    if found["border_straddled"]:
        lines.append(
            f"prompt's end          in {found['border_straddled']:.2%} of the records a token straddles it: "
            "prompt in this table, completion in training"
        )
    if found["end_straddled"]:
        lines.append(
            f"answers' ends         in {found['end_straddled']:.2%} of the records a token straddles one: completion"
        )
    lines += [
        f"prompts' share of the loss weight, by PLW{weights_text(found)}",
        "  " + "  ".join(f"{plw}: {_number(share)}" for plw, share in found["effective_prompt_share"].items()),
    ]
    return "\n".join(lines)


def weights_text(found: Mapping[str, Any]) -> str:
    """The weights, but for PLW, that a profile's prompt shares were computed with; empty for the usual ones."""
    told = f" at template weight {found['template_weight']:g}" if found["template_weight"] is not None else ""
    if found["completion_weight"] != 1:
        told += f"{' and' if told else ' at'} completion weight {found['completion_weight']:g}"
    return told


def _lengths(counts: Counts) -> dict[str, Any]:
    """Mean, deviation (of these records, not an estimate for others) and quantiles that are lengths which occur."""
    quantiles = np.quantile(counts, QUANTILES, method="inverted_cdf")
    return {
        "mean": float(counts.mean()),
        "deviation": float(counts.std()),
        "quantiles": {f"{quantile:g}": int(value) for quantile, value in zip(QUANTILES, quantiles, strict=True)},
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return float(numerator / denominator) if denominator else None


def _mean_of_ratios(counts: Mapping[str, Counts]) -> float | None:
    """Over the records that have a prompt at all."""
    some = counts["prompt"] > 0
    return float((counts["completion"][some] / counts["prompt"][some]).mean()) if some.any() else None


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _quantile_title(quantile: float) -> str:
    return {0.5: "median", 1: "longest"}.get(quantile, f"{quantile:.0%}")
