"""Do weights stay with their tokens where rows are padded, cut and packed?"""

import math

import pytest
import torch

from plw_mlflow.errors import UserError
from plw_mlflow.integrations import PLWCollator
from plw_mlflow.integrations.collator import Weighing

ROWS = [
    {"input_ids": [2, 5, 6, 7, 1], "labels": [-100, -100, -100, 7, 1]},
    {"input_ids": [2, 8, 1], "labels": [-100, 8, 1]},
]


def test_rows_are_padded():
    batch = PLWCollator(0.5)(ROWS)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 1], [2, 8, 1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["weights"].tolist() == [[0, 0.5, 0.5, 1, 1], [0, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 1], [-100, 8, 1, -100, -100]]


def test_rows_are_cut_and_packed():
    batch = PLWCollator(0.5, max_tokens=4, packing=True)(ROWS)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7, 2, 8, 1]]
    assert batch["weights"].tolist() == [[0, 0.5, 0.5, 1, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7]
    assert batch["max_length_q"] == 4


@pytest.mark.parametrize(
    ("marks", "weights"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, [0, 0.5, 1, 1]),
        ({"assistant_masks": [1, 0, 0, 1]}, [0, 0.5, 0.5, 1]),
        ({"completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]}, [0, 0.5, 1, 0.5]),
        ({"labels": torch.tensor([5, -100, -100, 8]), "completion_mask": None}, [0, 0.5, 0.5, 1]),
        ({"weights": [3, 0.25, 0, 2], "labels": [5, 6, 7, 8]}, [0, 0.25, 0, 2]),
    ],
)
def test_marks_become_weights(marks, weights):
    assert PLWCollator(0.5)([{"input_ids": [5, 6, 7, 8], **marks}])["weights"].tolist() == [weights]


def test_padding_in_a_row_is_taken_out():
    row = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "completion_mask": [0, 0, 0, 1]}
    batch = PLWCollator(0.5)([row])
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["weights"].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6]}, "none that tells its completion"),
        ({"completion_mask": [0, 1]}, "a row has no input_ids"),
        ("a text", "a row has no input_ids"),
        ({"input_ids": ["a", "b"], "labels": [5, 6]}, "input_ids of a row must be one number a token"),
        ({"input_ids": [[5, 6]], "labels": [[5, 6]]}, r"one number a token, got the shape \[1, 2\]"),
        ({"input_ids": [5, 6], "weights": [1.0]}, "unequal lengths .input_ids 2, weights 1"),
        ({"input_ids": [5, 6], "labels": [5, 6], "completion_mask": [1]}, "labels 2, completion_mask 1"),
        ({"input_ids": [5, 6], "labels": [5, 6], "attention_mask": [1]}, "labels 2, attention_mask 1"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask of a row must be 1 in completions and 0"),
        ({"input_ids": [5, 6], "assistant_masks": [0.5, 1.0]}, "assistant_masks of a row must be 1"),
        ({"input_ids": [5, 6], "completion_mask": [0.0, math.nan]}, "completion_mask of a row must be 1"),
        ({"input_ids": [], "completion_mask": []}, "a row has no tokens"),
        ({"input_ids": [0, 0], "completion_mask": [0, 0], "attention_mask": [0, 0]}, "a row has no tokens"),
    ],
)
@pytest.mark.parametrize("packing", [True, False])
def test_rows_that_cannot_be_read_are_refused(row, message, packing):
    with pytest.raises(UserError, match=message):
        PLWCollator(0.5, packing=packing)([ROWS[0], row])


@pytest.mark.parametrize(
    "labels",
    [
        [-100, -100, 8, 1, -100],  # shifted by one
        [6, 7, 8, 1, -100],
        [-100, -100, -100, 9, 9],
    ],
)
def test_labels_that_are_not_the_tokens_are_refused(labels):
    row = {"input_ids": [5, 6, 7, 8, 1], "labels": labels}
    with pytest.raises(UserError, match="labels are shifted or of other tokens"):
        PLWCollator(0.5)([row])
    with pytest.raises(UserError, match="labels are shifted or of other tokens"):
        weighed(**{name: [column] for name, column in row.items()})


def test_labels_of_other_shapes_than_the_tokens_are_refused():
    with pytest.raises(UserError, match="labels are shifted or of other tokens"):
        weighed(input_ids=[[5, 6, 7]], labels=[[-100, 6]])


def test_labels_on_padding_do_not_matter():
    row = {"input_ids": [5, 6, 0], "labels": [-100, 6, 3], "attention_mask": [1, 1, 0]}
    assert PLWCollator(0.5)([row])["weights"].tolist() == [[0, 1]]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -0.5, 1e39])
def test_weights_that_are_none_are_refused(weight):
    message = "weights must be finite numbers of at least 0, got"
    with pytest.raises(UserError, match=message):
        PLWCollator(0.5)([{"input_ids": [5, 6, 7], "weights": [0, weight, 1]}])
    with pytest.raises(UserError, match=message):
        weighed(weights=[[0, weight, 1]])


@pytest.mark.parametrize("token", [-3, 9])
def test_tokens_that_the_model_does_not_know_are_refused(token):
    collate = Weighing(PLWCollator(0.5), 0.5, vocabulary=9)
    assert collate([{"input_ids": [0, 8], "labels": [-100, 8]}])["input_ids"].tolist() == [[0, 8]]
    with pytest.raises(UserError, match=f"the token {token}, but the model knows 0 to 8"):
        collate([{"input_ids": [5, token], "labels": [-100, token]}])


def test_no_limit_is_none_and_nothing_else():
    for limit in (-1, 0, "5", 5.0):
        with pytest.raises(UserError, match="max_tokens must be a whole number of at least 1"):
            PLWCollator(0.5, max_tokens=limit)


def test_images_are_not_dropped():
    with pytest.raises(UserError, match="a row has pixel_values"):
        PLWCollator(0.5)([{**ROWS[0], "pixel_values": [1.0]}])


def weighed(**batch):
    """The weights that batches of another collator get."""
    return Weighing(lambda _: {name: torch.tensor(column) for name, column in batch.items()}, 0.5)([])[
        "weights"
    ].tolist()


def test_padding_that_nothing_shows_is_refused():
    labels = [[-100, -100, 7, 1, -100, -100]]
    with pytest.raises(UserError, match="padding cannot be told from prompts"):
        weighed(labels=labels)
    assert weighed(labels=labels, attention_mask=[[1, 1, 1, 1, 0, 0]]) == [[0, 0.5, 1, 1, 0, 0]]
    assert weighed(labels=[[-100, -100, 7, 1]]) == [[0, 0.5, 1, 1]]
    assert weighed(labels=labels, position_ids=[[0, 1, 2, 3, 0, 1]]) == [[0, 0.5, 1, 1, 0, 0.5]]


def test_an_end_with_a_label_counts_though_the_mask_takes_it_for_padding():
    assert weighed(labels=[[-100, 7, 1, -100]], attention_mask=[[1, 1, 0, 0]]) == [[0, 1, 1, 0]]


def test_a_collator_without_labels_is_refused():
    with pytest.raises(UserError, match="neither labels nor weights"):
        Weighing(lambda rows: {"input_ids": torch.ones(1, 2)}, 0.5)([])
