"""The weight that a trainer really gave each token, from the gradient of its step alone.

The gradient of a step is a sum over tokens, of a weight times the gradient of that token's negative log-likelihood. The
latter is computed here in float64, an example at a time and without the trainer. A tiny model has many more parameters
than the step has tokens, so that the weights follow from the gradient by least squares: 0 for a token that is not
trained on, 1 / N for each of N tokens in a mean over them. What no weights explain, the residual, says that the
gradient is that of something else, such as examples that attend to each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What a model was called with, without padding."""

    tokens: Tokens
    positions: Tokens | None


@dataclass(frozen=True)
class Weights:
    """What least squares found for a step."""

    of_tokens: dict[Tokens, float]  # by a text up to and with the token: the sum over all its occurrences
    counts: dict[Tokens, int]  # of these
    residual: float  # the norm of what they do not explain, over the norm of the gradient
    condition: float  # of the system of equations: by how much it may enlarge the errors of float32

    def by_position(self, text: Tokens) -> list[float]:
        """The weight of each token of a text but the first, which nothing predicts."""
        prefixes = [text[: end + 1] for end in range(1, len(text))]
        return [self.of_tokens[prefix] / self.counts[prefix] for prefix in prefixes]


class Oracle:
    """Finds the weights of tokens in gradients of one model."""

    def __init__(self, model: nn.Module) -> None:
        """model: a causal one in float64, whose parameters have the names that gradients come with."""
        self.model = model.eval()
        self._columns: dict[Tokens, Tensor] = {}

    def weights(self, gradient: Mapping[str, Tensor], texts: Sequence[Tokens]) -> Weights:
        """The weights behind a gradient of a step on these texts, each of which attends to itself alone.

        gradient: by the names of parameters; those that are not there are 0.
        """
        counts: dict[Tokens, int] = {}
        for text in texts:
            self._add(text)
            for end in range(1, len(text)):
                counts[text[: end + 1]] = counts.get(text[: end + 1], 0) + 1
        columns = torch.stack([self._columns[prefix] for prefix in counts], 1)
        seen = self._flat(gradient)
        found, condition = least_squares(columns, seen)
        values = dict(zip(counts, found.tolist(), strict=True))
        return Weights(values, counts, float((columns @ found - seen).norm() / seen.norm()), condition)

    def residual_as_one(self, gradient: Mapping[str, Tensor], rows: Sequence[Row]) -> float:
        """The residual if each token attended to the whole row before it, at the positions that the rows give it."""
        columns = torch.stack([column for row in rows for column in self._gradients(row.tokens, row.positions)], 1)
        seen = self._flat(gradient)
        found, _ = least_squares(columns, seen)
        return float((columns @ found - seen).norm() / seen.norm())

    def _flat(self, gradient: Mapping[str, Tensor]) -> Tensor:
        parameters = dict(self.model.named_parameters())
        if unknown := gradient.keys() - parameters:
            raise ValueError(f"the model has no parameters {', '.join(sorted(unknown))}")
        every = [gradient.get(name, torch.zeros_like(parameter)) for name, parameter in parameters.items()]
        return torch.cat([values.detach().double().flatten() for values in every])

    def _add(self, text: Tokens) -> None:
        """Compute the gradients of a text's tokens, if they are not all known."""
        prefixes = [text[: end + 1] for end in range(1, len(text))]
        if not all(prefix in self._columns for prefix in prefixes):
            self._columns |= zip(prefixes, self._gradients(text), strict=True)

    def _gradients(self, text: Tokens, positions: Tokens | None = None) -> list[Tensor]:
        """The gradient of the negative log-likelihood of each token but the first, flat."""
        tokens = torch.tensor([text])
        # With a mask of ones, transformers does not take positions that start anew for borders.
        context = {} if positions is None else {"position_ids": torch.tensor([positions])}
        logits = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **context).logits
        losses = nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
        parameters = list(self.model.parameters())
        parts = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        return [torch.cat([part.flatten() for part in gradient]) for gradient in parts]


def least_squares(columns: Tensor, seen: Tensor) -> tuple[Tensor, float]:
    """What columns have to be multiplied by to be nearest to what was seen, and the condition of that."""
    scales = columns.norm(dim=0)
    rotation, triangle = torch.linalg.qr(columns / scales)
    found = torch.linalg.solve_triangular(triangle, (rotation.T @ seen).unsqueeze(1), upper=True)
    return found.squeeze(1) / scales, float(torch.linalg.cond(triangle))


def rows_of(batch: Mapping[str, Tensor], padding: int) -> list[Row]:
    """The rows of a micro-batch without their padding."""
    tokens = batch["input_ids"]
    # Masks of other shapes say which tokens attend to which, not which are padding.
    same_shape = {name: values for name, values in batch.items() if values.shape == tokens.shape}
    mask, positions = same_shape.get("attention_mask", torch.ones_like(tokens)), same_shape.get("position_ids")
    rows = []
    for number, kept in enumerate(mask.bool()):
        row = tuple(tokens[number][kept].tolist())
        while row and row[-1] == padding:
            row = row[:-1]
        at = tuple(positions[number][kept][: len(row)].tolist()) if positions is not None else None
        if len(row) > 1:
            rows.append(Row(row, at))
    return rows


def cut(row: Tokens, known: Sequence[Tokens]) -> list[Tokens]:
    """The known texts that stand behind one another in a row; the first may lack its beginning, the last its end.

    A row is one text where nothing is known. Raises ValueError where a row holds something else.
    """
    parts: list[Tokens] = []
    at = 0
    while at < len(row) and known:
        rest = row[at:]
        fitting = [text for text in known if rest[: len(text)] == text or text[: len(rest)] == rest]
        if not fitting and not parts:
            ends = [text[start:] for text in known for start in range(1, len(text) - 1)]
            fitting = [text for text in ends if rest[: len(text)] == text]
        if not fitting:
            raise ValueError(f"no known text begins at {at} of {row}")
        parts.append(max(fitting, key=len)[: len(rest)])
        at += len(parts[-1])
    return [part for part in parts if len(part) > 1] or [row]
