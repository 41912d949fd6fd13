"""Are lengths, ratios and shares those one counts by hand, and those of the paper on its data?"""

import io
import json
import statistics
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from plw_mlflow.config import DataOptions, limits
from plw_mlflow.data import prepare, profile, profile_figure
from plw_mlflow.data.pieces import Segment
from plw_mlflow.data.profile import Contents, SourceContents, text
from plw_mlflow.data.weights import Weights
from plw_mlflow.errors import RunError
from plw_mlflow.study import PUBLISHED_PLWS

# Three records: of the second, one of the seven completion tokens straddles the prompt's end; the third is long.
COLUMNS = {
    "instruction": [2, 1, 6],
    "input": [1, 0, 0],
    "completion": [2, 6, 3],
    "template_tokens": [4, 4, 4],
    "instruction_tokens": [2, 1, 6],
    "input_tokens": [1, 0, 0],
    "completion_tokens": [3, 7, 4],
    "length": [10, 12, 14],
    "straddling": [0, 1, 0],
    "straddling_end": [0, 0, 0],
    "completion_kept": [3, 7, 2],
    "template_kept": [4, 4, 4],
    "first": [0, 0, 0],
}


CONTENTS = Contents(
    dataset="mine.json",
    name="mine",
    sources=[SourceContents("mine.json", "/mine.json", "0" * 64, "", False, "alpaca", 3, {}, [])],
    template="alpaca",
    records=3,
    inverted=0,
    duplicates=0,
    duplicates_dropped=False,
    dropped_as_too_long=0,
    first_dropped_as_too_long=[],
    truncated=0,
    lost_whole_completion=0,
    training_examples=3,
    validation_examples=0,
)


def columns(**changes):
    return {name: np.array(values, np.int32) for name, values in (COLUMNS | changes).items()}


def measure(contents, columns, max_tokens, on_long, loss=Weights(1.0), **counted):  # noqa: B008
    """The profile where all that is not dropped is trained on."""
    is_training = columns["length"] <= max_tokens if on_long == "drop" else slice(None)
    predicted = profile.predicted_counts(columns, max_tokens)[is_training]
    return profile.measure(contents, columns, max_tokens, predicted, loss, counted)


def test_a_profile_by_hand():
    found = measure(CONTENTS, columns(), max_tokens=12, on_long="truncate")
    assert (found.tokens_bare, found.tokens) == (3 + 1 + 6 + 11, 36)
    bare, templated = found.lengths, found.lengths_with_template
    assert {name: length.mean for name, length in bare.items()} == pytest.approx(
        {"instruction": 3, "input": 1 / 3, "prompt": 10 / 3, "completion": 11 / 3}
    )
    # The straddling token is counted to the prompt: prompts of 7, 6 and 10 tokens, completions of 3, 6 and 4.
    assert {name: length.mean for name, length in templated.items()} == pytest.approx(
        {"instruction": 3, "input": 1 / 3, "prompt": 23 / 3, "completion": 13 / 3, "example": 12}
    )
    assert bare["completion"].deviation == pytest.approx((((5 / 3) ** 2 + (7 / 3) ** 2 + (2 / 3) ** 2) / 3) ** 0.5)
    assert bare["completion"].quantiles["0.5"] == 3
    assert (templated["example"].quantiles["0"], templated["example"].quantiles["1"]) == (10, 14)
    assert found.generation_ratio == pytest.approx(11 / 10)
    assert found.generation_ratio_with_template == pytest.approx(13 / 23)
    assert found.mean_of_ratios == pytest.approx((2 / 3 + 6 / 1 + 3 / 6) / 3)
    assert found.mean_of_ratios_with_template == pytest.approx((3 / 7 + 6 / 6 + 4 / 10) / 3)
    assert found.completion_shorter_than_prompt == pytest.approx(2 / 3)
    assert found.completion_shorter_than_prompt_with_template == pytest.approx(2 / 3)
    assert found.border_straddled == found.longer_than_max_tokens == pytest.approx(1 / 3)
    assert found.no_completion_within_max_tokens == 0


@pytest.mark.parametrize(
    ("on_long", "prompt", "completion"),
    [
        # Without each first token, 6 + 4 prompt tokens and 3 + 7 of completions, the straddling one among them.
        ("drop", 10, 10),
        ("truncate", 10 + 9, 10 + 2),  # and of the third example's first 12 tokens, 10 - 1 and 2
    ],
)
def test_the_prompts_share_is_that_of_what_is_trained_on(on_long, prompt, completion):
    shares = measure(CONTENTS, columns(), max_tokens=12, on_long=on_long).effective_prompt_share
    assert list(shares) == ["0", "0.0005", "0.002236", "0.01", "0.02463", "0.05", "0.1", "0.2463", "0.5", "1"]
    for plw, share in zip(PUBLISHED_PLWS, shares.values(), strict=True):
        assert share == pytest.approx(plw * prompt / (plw * prompt + completion))


def test_the_prompts_share_where_completions_or_all_tokens_weigh_nothing():
    found = measure(CONTENTS, columns(), max_tokens=12, on_long="drop", loss=Weights(1.0, None, 0.0))
    assert (found.effective_prompt_share["0"], found.effective_prompt_share["0.5"]) == (None, 1)
    assert "0: undefined" in text(found)


def test_what_the_loss_is_divided_by_is_in_the_share_and_in_the_title():
    found = measure(CONTENTS, columns(), max_tokens=12, on_long="drop", loss=Weights(1.0, None, 1.0, "segments"))
    assert found.effective_prompt_share["0.05"] == pytest.approx(0.05 / 1.05)
    assert "by PLW at loss divisor segments by step" in text(found)
    found = measure(CONTENTS, columns(), 12, "drop", Weights(1.0, None, 1.0, "weights", "example"))
    shares = [0.5 * prompt / (0.5 * prompt + completion) for prompt, completion in ((6, 3), (4, 7))]
    assert found.effective_prompt_share["0.5"] == pytest.approx(sum(shares) / 2)
    assert "by PLW at loss divisor weights by example" in text(found)


def test_what_a_plw_is_in_other_losses_is_told_in_a_table():
    predicted = profile.predicted_counts(columns(), 12)[:2]  # 10 tokens of prompts and of completions
    assert predicted[:, Segment.COMPLETION].tolist() == [3, 7]
    lines = [line.split() for line in profile.equals_text(predicted, Weights(0.25, None, 1.0, "segments")).split("\n")]
    assert "20.00% of the loss weight" in " ".join(lines[0])
    assert lines[1] == ["by", "step", "by", "example"]
    assert [line[:2] for line in lines[2:]] == [
        ["weights", "0.25"],
        ["tokens", "0.25"],
        ["segments", "0.25"],
        ["share", "0.2"],
    ]
    assert "no token has any weight" in profile.equals_text(predicted[:0], Weights(0.25))


def test_weights_other_than_the_plw_are_in_the_share_and_in_the_title():
    found = measure(CONTENTS, columns(), max_tokens=12, on_long="drop", loss=Weights(1.0, 0.0, 2.0))
    # Of the template, four tokens each, the first is never predicted; instructions and inputs have 3 + 1 tokens.
    assert found.effective_prompt_share["0.5"] == pytest.approx(0.5 * 4 / (0.5 * 4 + 2 * 10))
    assert "by PLW at template weight 0 and completion weight 2" in text(found)
    assert "by PLW at completion weight 2" in text(replace(found, template_weight=None))
    assert "by PLW\n" in text(measure(CONTENTS, columns(), max_tokens=12, on_long="drop"))


def test_completions_lost_at_the_limit_are_counted():
    found = measure(CONTENTS, columns(completion_kept=[3, 0, 0]), max_tokens=10, on_long="truncate")
    assert found.longer_than_max_tokens == found.no_completion_within_max_tokens == pytest.approx(2 / 3)


def test_what_has_no_prompt_has_no_ratio():
    nothing = columns(instruction=[0, 0, 0], input=[0, 0, 0])
    found = measure(CONTENTS, nothing, max_tokens=12, on_long="truncate")
    assert found.generation_ratio is found.mean_of_ratios is None
    assert "undefined bare" in text(found)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=50))
def test_quantiles_are_lengths_that_occur(counts):
    same = columns(**dict.fromkeys(COLUMNS, counts))
    found = measure(CONTENTS, same, max_tokens=12, on_long="truncate").lengths["completion"]
    quantiles = list(found.quantiles.values())
    assert set(quantiles) <= set(counts)
    assert quantiles == sorted(quantiles)
    assert (quantiles[0], quantiles[-1]) == (min(counts), max(counts))
    assert found.mean == pytest.approx(statistics.fmean(counts))
    assert found.deviation == pytest.approx(statistics.pstdev(counts))


def test_the_audit_and_the_completions_shares_are_told():
    found = measure(CONTENTS, columns(), 12, "drop", no_end=2, all_masked=0)
    # Of the examples that are trained on, 3 of 9 and 7 of 11 predicted tokens.
    assert (found.completion_share["0"], found.completion_share["1"]) == pytest.approx((3 / 9, 7 / 11))
    assert "an example's tokens: 0% 33.3%, 5% 33.3%, median 33.3%, 95% 63.6%, most 63.6%" in text(found)
    assert "audit               no_end 2  (docs/data.md)" in text(found)
    assert "nothing found" in text(measure(CONTENTS, columns(), 12, "drop"))


def test_a_limit_that_is_broken_is_told_with_its_count():
    found = measure(CONTENTS, columns(), 12, "drop", no_end=2, all_masked=0)
    profile.check_limits(found, limits.parse("no_end > 2, all_masked > 0, no_end > 70%"))
    with pytest.raises(RunError) as error:
        profile.check_limits(found, limits.parse("no_end > 0, all_masked > 0, no_end >= 60%"))
    assert str(error.value) == (
        "no_end is 2 of 3 records, and no_end > 0 was given as a limit; "
        "no_end is 2 of 3 records, and no_end >= 60% was given as a limit"
    )


def test_the_table_has_what_a_person_asks():
    found = measure(CONTENTS, columns(), max_tokens=12, on_long="drop")
    shown = text(found)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
    assert "completion               3.67" in shown
    assert "generation ratio      1.100 bare, 0.565 with the template" in shown
    assert "33.33% of the records are longer; 0.00% have no completion within it" in shown
    assert "in 33.33% of the records a token straddles it" in shown
    assert "0.5: 0.333" in shown
    assert max(map(len, shown.splitlines())) <= 140


def test_a_border_that_nothing_straddles_is_not_spoken_of():
    assert "straddles" not in text(measure(CONTENTS, columns(straddling=[0, 0, 0]), max_tokens=12, on_long="drop"))
    ends = measure(CONTENTS, columns(straddling=[0, 0, 0], straddling_end=[2, 0, 0]), max_tokens=12, on_long="drop")
    assert "in 33.33% of the records a token straddles one" in text(ends)


def test_the_figure_is_drawn_whatever_the_data():
    for found in (
        measure(CONTENTS, columns(), max_tokens=12, on_long="drop"),
        measure(CONTENTS, columns(instruction=[0, 0, 0], input=[0, 0, 0]), max_tokens=100_000, on_long="drop"),
    ):
        png = profile_figure.draw_profile(replace(found, name="$a_b$"))
        image = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
        assert (image < 128).mean() > 0.01  # some ink


@pytest.mark.slow
def test_alpacas_lengths_are_the_papers_to_the_last_digit(shared):
    """Table 1 of arXiv:2401.13586v1, and the counts with the template in ../shared/data/README.md.

    28 records have an empty completion, and the study kept them.
    """
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/llama-tokenizer-hf")
    options = DataOptions(data_dir=shared / "data", empty_completion="keep", on_long="truncate")
    prepared = prepare.run("AlpacaData", tokenizer, options)
    found = prepared.profile
    assert (found.records, found.tokens_bare) == (52_002, 4_376_482)
    assert len(prepared.training) + len(prepared.validation) == 52_002
    bare = {part: (round(lengths.mean, 2), round(lengths.deviation, 2)) for part, lengths in found.lengths.items()}
    assert bare.pop("prompt")[0] == 19.65  # not in the table
    assert bare == {"instruction": (13.40, 4.97), "input": (6.25, 14.38), "completion": (64.51, 64.85)}
    templated = found.lengths_with_template
    assert (round(templated["prompt"].mean, 2), round(templated["completion"].mean, 2)) == (61.61, 65.53)
    ratios = {name: round(value, 3) for name, value in vars(found).items() if "ratio" in name or "shorter" in name}
    assert ratios == {
        "generation_ratio": 3.284,
        "generation_ratio_with_template": 1.064,
        "mean_of_ratios": 4.570,
        "mean_of_ratios_with_template": 1.209,
        "completion_shorter_than_prompt": 0.301,
        "completion_shorter_than_prompt_with_template": 0.551,
    }
    assert "NON-COMMERCIAL" in text(found)


@pytest.mark.slow
def test_dollys_ratios(shared):
    """../shared/data/README.md."""
    tokenizer = AutoTokenizer.from_pretrained(shared / "data/models/llama-tokenizer-hf")
    path = str(shared / "data/instruct/dolly_15k.jsonl.gz")
    found = prepare.run(path, tokenizer, DataOptions(on_bad_record="skip")).profile
    assert (found.records, found.sources[0].format) == (15_011, "dolly")
    assert round(found.generation_ratio, 3) == 0.827
    assert round(found.generation_ratio_with_template, 3) == 0.613
    assert round(found.mean_of_ratios, 3) == 5.860
    assert round(found.mean_of_ratios_with_template, 3) == 1.448
