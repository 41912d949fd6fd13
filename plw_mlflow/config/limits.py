"""Limits on what `prepare` counts, as a caller writes them: "no_end > 0, prompt_cut > 1%"."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

from plw_mlflow.errors import UserError, did_you_mean

# What the audit counts, by name (docs/data.md). The first ones are found when a record is tokenised, as bits of a
# number that is stored with its example; the others follow from the options.
IN_TOKENS = (
    *("empty_completion", "without_end_token", "border_drift", "template_drift", "doubled_bos", "roles_out_of_order"),
    "special_token_in_text",
)
COUNTED = (*IN_TOKENS, "no_completion", "all_masked", "no_end", "prompt_cut", "left_out", "too_long", "duplicates")
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


class Limit(NamedTuple):
    """A condition under which a data set is refused."""

    name: str
    operator: str
    number: float
    is_share: bool  # whether the number is a share of the records in per cent

    def is_broken(self, value: float, records: int) -> bool:
        """Whether the condition holds of a count out of so many records."""
        found = 100 * value / max(1, records) if self.is_share else value
        return OPERATORS[self.operator](found, self.number)

    def can_be_broken(self) -> bool:
        """Whether the condition holds of any share from 0 to 100 %, or of any count from 0 on."""
        most = 100 if self.is_share else math.inf
        return any(OPERATORS[self.operator](value, self.number) for value in (0, min(self.number, most), most))

    def __str__(self) -> str:
        return f"{self.name} {self.operator} {self.number:g}{'%' if self.is_share else ''}"


def parse(text: str) -> list[Limit]:
    """The limits in a comma-separated list, of which an empty one has none.

    Raises UserError for one that cannot be read, names no count, or can never be broken, and for commas alone.
    """
    limits = []
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if text and not parts:
        raise UserError(f"fail-if holds no condition, got {text!r}; write one like 'no_end > 0'")
    for part in parts:
        found = re.fullmatch(r"([a-z_]+)\s*(>=|<=|==|!=|>|<)\s*(\d+(?:\.\d*)?)\s*(%?)", part)
        if found is None:
            raise UserError(f"fail-if must be like 'no_end > 0, prompt_cut > 1%', got {part!r}")
        name, sign, number, per_cent = found.groups()
        if name not in COUNTED:
            hint = did_you_mean(name, COUNTED) or f"; it may be {', '.join(COUNTED)}"
            raise UserError(f"fail-if names {name!r}, which is not counted{hint}")
        limit = Limit(name, sign, float(number), bool(per_cent))
        if not limit.is_share and not limit.number.is_integer():
            raise UserError(
                f"fail-if counts whole records, got {part!r}; write a share in per cent, as in '{name} > 1%'"
            )
        if not limit.can_be_broken():
            raise UserError(
                f"fail-if {part!r} can never hold: shares lie between 0 and 100 %, and counts are 0 or more"
            )
        limits.append(limit)
    return limits
