"""Does the one line that a person reads of an error say something?"""

import pytest

from plw_mlflow.errors import first_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("one\ntwo", "one"),
        ("\n  one: two\nthree", "one: two"),
        (
            "Error(s) in loading:\n\tsize mismatch for a\n\tsize mismatch for b",
            "Error(s) in loading: size mismatch for a",
        ),
        ("loading:\n\n of this:\nno file\nelse", "loading: of this: no file"),
        ("nothing follows:\n", "nothing follows"),
        ("", "ValueError"),
        (" \n", "ValueError"),
    ],
)
def test_a_line_that_announces_another_is_told_with_it(message, expected):
    assert first_line(ValueError(message)) == expected
