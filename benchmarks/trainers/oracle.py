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
from typing import Any

import torch
from torch import Tensor, nn

Tokens = tuple[int, ...]


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
        names = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        if unknown := gradient.keys() - names:
            raise ValueError(f"the model has no parameters {', '.join(sorted(unknown))}")
        seen = torch.cat(
            [gradient[name].double().flatten() if name in gradient else torch.zeros(s.numel()) for name, s in names.items()]
        ).double()
        columns = torch.stack([self._columns[prefix] for prefix in counts], 1)
        scales = columns.norm(dim=0)
        rotation, triangle = torch.linalg.qr(columns / scales)
        found = torch.linalg.solve_triangular(triangle, (rotation.T @ seen).unsqueeze(1), upper=True).squeeze(1) / scales
        values = dict(zip(counts, found.tolist(), strict=True))
        residual = float((columns @ found - seen).norm() / seen.norm())
        return Weights(values, counts, residual, float(torch.linalg.cond(triangle)))

    def _add(self, text: Tokens) -> None:
        """Compute the gradient of each of a text's tokens that is not known yet."""
        missing = [end for end in range(1, len(text)) if text[: end + 1] not in self._columns]
        if not missing:
            return
        tokens = torch.tensor(text).unsqueeze(0)
        losses = nn.functional.cross_entropy(self._logits(tokens)[0, :-1], tokens[0, 1:], reduction="none")
        parameters = list(self.model.parameters())
        for end in missing:
            parts = torch.autograd.grad(losses[end - 1], parameters, retain_graph=True)
            self._columns[text[: end + 1]] = torch.cat([part.flatten() for part in parts])

    def _logits(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens).logits


def texts_of(batch: Mapping[str, Tensor], padding: int, known: Sequence[Tokens] = ()) -> list[Tokens]:
    """The texts in the rows of a micro-batch, without padding and cut where they were packed.

    known: texts of which packed rows are made; without any, rows are cut where positions start anew.
    """
    texts: list[Tokens] = []
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    for number, row in enumerate(batch["input_ids"].tolist()):
        if mask is not None and mask.shape == batch["input_ids"].shape:
            row = [token for token, seen in zip(row, mask[number].tolist(), strict=True) if seen]
        while row and row[-1] == padding:
            row = row[:-1]
        if known:
            texts += cut(tuple(row), known)
        elif positions is not None and positions.shape == batch["input_ids"].shape:
            starts = [at for at in range(len(row)) if positions[number, at] == 0] or [0]
            texts += [tuple(row[a:b]) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
        else:
            texts.append(tuple(row))
    return [text for text in texts if len(text) > 1]


def cut(row: Tokens, known: Sequence[Tokens]) -> list[Tokens]:
    """The known texts that stand behind one another in a row. Raises ValueError where it holds something else."""
    parts = []
    at = 0
    while at < len(row):
        fitting = [text for text in known if row[at : at + len(text)] == text]
        if not fitting:
            raise ValueError(f"no known text begins at {at} of {row}")
        parts.append(max(fitting, key=len))
        at += len(parts[-1])
    return parts
