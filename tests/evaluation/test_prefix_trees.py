"""Does every sequence keep its tokens, positions and predecessors when it shares a row with others?"""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from plw_mlflow.evaluation import prefix_trees

SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=30)


def lay_out(sequences, room, most):
    return prefix_trees.rows([np.array(sequence, dtype=np.int32) for sequence in sequences], room, most)


@given(SEQUENCES, st.integers(1, 40), st.integers(1, 40))
def test_every_sequence_sees_itself_and_nothing_else(sequences, room, most):
    seen = []
    for batch in prefix_trees.batches(lay_out(sequences, room, most), 50):
        tokens, positions, mask = prefix_trees.inputs(batch, torch.float32, torch.device("cpu"))
        for row, row_tokens, row_positions, row_mask in zip(batch, tokens, positions, mask[:, 0], strict=True):
            for number, path in row.paths.items():
                assert row_tokens[path].tolist() == sequences[number]
                assert row_positions[path].tolist() == list(range(len(path)))
                for length, place in enumerate(path, start=1):
                    assert row_mask[place].eq(0).nonzero().flatten().tolist() == path[:length].tolist()
                seen.append(number)
    assert sorted(seen) == list(range(len(sequences)))


@given(SEQUENCES)
def test_one_row_has_a_place_for_every_distinct_prefix(sequences):
    (row,) = lay_out(sequences, 10_000, 10_000)
    assert len(row) == len({tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))})


@given(SEQUENCES, st.integers(1, 40))
def test_rows_and_batches_keep_to_their_room(sequences, room):
    laid_out = lay_out(sequences, room, room)
    assert all(len(row) <= max(room, *map(len, row.paths.values())) for row in laid_out)
    for batch in prefix_trees.batches(laid_out, room):
        assert len(batch) == 1 or len(batch) * max(map(len, batch)) <= room


def test_by_hand():
    """Two options of one question, then another question."""
    (row,) = lay_out([[7, 8, 2], [5, 6, 1], [5, 6, 3, 4]], 16, 16)
    assert row.tokens.tolist() == [5, 6, 1, 3, 4, 7, 8, 2]
    assert row.depths.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert row.subtree_ends.tolist() == [5, 5, 3, 5, 5, 8, 8, 8]
    assert {number: path.tolist() for number, path in row.paths.items()} == {
        0: [5, 6, 7],
        1: [0, 1, 2],
        2: [0, 1, 3, 4],
    }


def test_a_row_grows_for_what_it_holds_half_of_already():
    few_shot = list(range(20))
    shared = lay_out([[*few_shot, 30 + n] for n in range(10)], 8, 1000)
    assert [len(row) for row in shared] == [30]  # twice a sequence of 21 would be 42
    apart = lay_out([[n, *few_shot] for n in range(10)], 8, 1000)
    assert [len(row) for row in apart] == [21] * 10
