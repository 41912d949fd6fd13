"""transformers' Trainer with a prompt loss weight.

Weights travel as a column of the batch. What is replaced in the Trainer is what counts the divisor of a step's loss and
what computes the loss of a micro-batch; besides, evaluation makes no logits that nobody asks for, and the columns that
make weights are not taken for unused ones.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import Trainer

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.integrations.collator import IGNORED, MASKS, PLWCollator, Weighing
from plw_mlflow.integrations.own_loop import check_divisor, check_plw, divisor, weighted_nll
from plw_mlflow.models import causal

TRIED = "transformers 5.23.0 and TRL 1.16.0"
ROWS_LOOKED_AT = 1000  # at most, for both prompt and completion
# What is replaced or relied on, with the arguments that it is called with.
CALLED_WITH = {
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "_get_num_items_in_batch": ["self", "batch_samples", "device"],
    "_set_signature_columns_if_needed": ["self"],
}


def check_signatures(trainer: type, package: str, version: str) -> None:
    """Raise UserError where a trainer's methods are called with other arguments than those of the versions tried."""
    for name, expected in CALLED_WITH.items():
        method: Callable[..., Any] | None = getattr(trainer, name, None)
        found = list(inspect.signature(method).parameters) if method else []
        if found != expected:
            raise UserError(
                f"{package} {version} cannot be used: its {trainer.__name__}.{name} takes ({', '.join(found)}), not "
                f"({', '.join(expected)}); install what PLW was tried with, {TRIED}"
            )


check_signatures(Trainer, "transformers", transformers.__version__)


class WeightedLoss(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """What makes a trainer derived from transformers' one train with a PLW; it stands before that one."""

    data_collator: Any
    loss_is_scaled_for_ga: bool | None = True  # it is divided by the whole step's divisor

    def __init__(self, *args: Any, plw: float, loss_divisor: str = "weights", **kwargs: Any) -> None:
        check_plw(plw)
        check_divisor(loss_divisor)
        if kwargs.get("compute_loss_func") is not None:
            raise UserError("compute_loss_func cannot be given, as the loss is what a PLW is about")
        self.plw, self.loss_divisor = plw, loss_divisor
        super().__init__(*args, **kwargs)
        self.data_collator = Weighing(self.data_collator, plw)
        if self.args.n_gpu > 1:
            raise UserError("several GPUs in one process are not supported; start a process for each by torchrun")
        if (shares := self.get_tp_size() * self.get_cp_size() * self.get_sp_size()) > 1:
            raise UserError(f"{shares} processes share each batch, which is not supported; give each its own batches")
        self._check_marks()
        if getattr(self.data_collator.collator, "packing", False) or getattr(self, "padding_free", False):
            self._check_packing()

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Raise UserError where a model gives an example that is packed behind another something else than alone."""
        model = causal.unwrap(self.model)
        if any(parameter.is_meta for parameter in model.parameters()):  # which have no numbers yet
            return
        was_training = model.training
        model.eval()  # without dropout
        try:
            with self.accelerator.autocast():
                packed, alone = map(self._hidden_states, ([_row(7), _row(5)], [_row(5)]))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{model.config.model_type} takes no packed rows ({first_line(error)})") from error
        finally:
            model.train(was_training)
        # A difference that matters is a good part of the numbers themselves.
        is_exact = model.dtype == torch.float32 and self.accelerator.mixed_precision == "no"
        tolerance = 1e-3 if is_exact else 5e-2
        if not (packed[:, 7:] - alone).abs().max() <= tolerance * alone.abs().max():  # NaN is not <= either
            raise UserError(
                f"an example packed behind another gives {model.config.model_type} something else than alone; leave "
                "packing out, or load the model with another attn_implementation"
            )

    def _hidden_states(self, rows: list[dict[str, Any]]) -> Tensor:
        batch = _context(self._prepare_inputs(self.data_collator(rows)))
        return causal.hidden_states(self.model, batch.pop("input_ids"), **batch).float()

    def _check_marks(self) -> None:
        """Raise UserError where a PLW has no effect, as the first batches are all prompt or all completion."""
        kinds: set[bool] = set()
        for row in itertools.islice(self.train_dataset or (), ROWS_LOOKED_AT):
            batch = self.data_collator([row])
            if row.get("weights") is not None or "labels" not in batch:  # whose two kinds are not all
                return
            is_token = batch.get("attention_mask", torch.ones_like(batch["labels"])).bool()
            kinds.update((batch["labels"] != IGNORED)[:, 1:][is_token[:, 1:]].tolist())
            if len(kinds) == 2:
                return
        if kinds == {True} and self.plw != 1:
            raise UserError(
                f"labels mark every token as completion, so the PLW would change nothing; let them be {IGNORED} on "
                "prompts, or have TRL do so by assistant_only_loss=True or completion_only_loss=True"
            )
        if kinds == {False}:
            raise UserError(
                "no token is marked as completion; a chat template marks what the assistant says only where it holds "
                "{% generation %}"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names = ("labels", "weights", "attention_mask", *MASKS)
        self._signature_columns += [name for name in names if name not in self._signature_columns]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """The divisor of the step whose micro-batches in this process these are."""
        if not batch_samples:
            return None
        return divisor([batch["weights"].to(device) for batch in batch_samples], self.loss_divisor)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A micro-batch's part of the loss of its step; times the processes, over which gradients are averaged."""
        whole = num_items_in_batch
        if whole is None:
            whole = self._get_num_items_in_batch([inputs], self.args.device)
        context = _context(inputs)
        with self.accelerator.autocast():
            total = weighted_nll(
                model, weights=inputs["weights"], label_smoothing=self.args.label_smoothing_factor, **context
            )
        reciprocal = torch.where(whole > 0, 1 / whole, 0.0).float()  # 0 where no token weighs anything
        loss = total * reciprocal * self.accelerator.num_processes
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**context, use_cache=False)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Any, Any]:
        """As in transformers; where only the loss is asked for, no logits are made."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


class PLWTrainer(WeightedLoss, Trainer):
    """transformers' Trainer, which trains prompt tokens with the weight `plw` and completion tokens with 1.

    Its arguments are those of transformers' Trainer, and:

    plw: the prompt loss weight.
    loss_divisor: of a step, "weights" for the sum of all weights or "tokens" for the number of those that are not 0.
    max_tokens, packing: of `PLWCollator`, which makes the batches unless `data_collator` is given. That one's batches
        need `labels`, in which tokens outside completions are -100, or `weights`.

    Rows have the columns that `PLWCollator` names. Raises UserError for what is not supported.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        *more: Any,
        plw: float,
        loss_divisor: str = "weights",
        max_tokens: int | None = None,
        packing: bool = False,
        **kwargs: Any,
    ) -> None:
        if data_collator is None:
            data_collator = PLWCollator(plw, max_tokens, packing)
        elif packing or max_tokens is not None:
            raise UserError("max_tokens and packing are those of the default collator; a data_collator has its own")
        super().__init__(model, args, data_collator, *more, plw=plw, loss_divisor=loss_divisor, **kwargs)


def _context(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch goes into the model."""
    return {name: value for name, value in batch.items() if name not in ("weights", "labels", *MASKS)}


def _row(tokens: int) -> dict[str, list[int]]:
    return {"input_ids": list(range(tokens)), "labels": list(range(tokens))}
