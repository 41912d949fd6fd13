"""transformers' Trainer with a prompt loss weight.

Weights travel as a column of the batch. What is replaced in the Trainer is what counts the divisor of a step's loss and
what computes the loss of a micro-batch. Besides, the loss of evaluation is divided once, by the divisor of all of it;
evaluation makes no logits that nobody asks for; the columns that make weights are not taken for unused ones; and a
saved model has a file with its PLW.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer

from plw_mlflow.errors import UserError, first_line
from plw_mlflow.integrations.collator import IGNORED, MASKS, PLWCollator, Weighing, completions, prompts
from plw_mlflow.integrations.own_loop import check_divisor, check_model, check_plw, divisor, mass, weighted_nll
from plw_mlflow.models import causal

TRIED = "transformers 5.23.0 and TRL 1.16.0"
ROWS_LOOKED_AT = 1000  # at most, for both prompt and completion
BY_TRL = "have TRL mark prompts by assistant_only_loss=True or completion_only_loss=True"
SAVED_AS = "plw.json"  # beside a saved model, with its PLW and divisor
# What is replaced or relied on, with the arguments that it is called with.
CALLED_WITH = {
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "evaluation_loop": [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    "_save": ["self", "output_dir", "state_dict"],
    "_get_collator_with_removed_columns": ["self", "data_collator", "description"],
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
        self.plw, self.loss_divisor = float(plw), loss_divisor  # numpy's numbers cannot be written as JSON
        self._evaluated: list[Tensor] = []  # of each batch, its summed loss and its divisor
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise UserError("compute_loss_func cannot be given, as the loss is what a PLW is about")
        if self.args.n_gpu > 1 or self.is_model_parallel:
            raise UserError(
                "several GPUs in one process are not supported; start a process for each by torchrun, and leave "
                "device_map out"
            )
        if (shares := self.get_tp_size() * self.get_cp_size() * self.get_sp_size()) > 1:
            raise UserError(f"{shares} processes share each batch, which is not supported; give each its own batches")
        check_model(self.model)
        self.data_collator = Weighing(self.data_collator, plw, _vocabulary(self.model))
        self._check_marks()
        self._try_model()

    @torch.no_grad()
    def _try_model(self) -> None:
        """Raise UserError where a model's loss would not be its own, or depends on what an example is packed with."""
        model = causal.unwrap(self.model)
        if any(parameter.is_meta for parameter in model.parameters()):  # which have no numbers yet
            return
        was_training = model.training
        model.eval()  # without dropout
        try:
            with self.accelerator.autocast():
                self._check_logits(model)
                if getattr(self.data_collator.collator, "packing", False) or getattr(self, "padding_free", False):
                    self._check_packing(model)
        finally:
            model.train(was_training)

    @property
    def _is_exact(self) -> bool:
        return causal.unwrap(self.model).dtype == torch.float32 and self.accelerator.mixed_precision == "no"

    def _check_logits(self, model: Any) -> None:
        """Raise UserError where the model makes its logits otherwise than by its head."""
        tokens = torch.arange(5, device=model.device).unsqueeze(0)  # any do
        logits = model(input_ids=tokens, use_cache=False).logits[0]
        hidden = causal.hidden_states(model, tokens)[0]
        if not causal.makes_own_logits(model, hidden, logits, 1e-4 if self._is_exact else 0.5):
            raise UserError(
                f"{model.config.model_type} makes its logits in a way that is not known here, so that the loss would "
                "not be its own"
            )

    def _check_packing(self, model: Any) -> None:
        """Raise UserError where a model gives an example that is packed behind another something else than alone."""
        try:
            packed, alone = map(self._hidden_states, ([_row(7), _row(5)], [_row(5)]))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{model.config.model_type} takes no packed rows ({first_line(error)})") from error
        # A difference that matters is a good part of the numbers themselves.
        tolerance = 1e-3 if self._is_exact else 5e-2
        if not (packed[:, 7:] - alone).abs().max() <= tolerance * alone.abs().max():  # NaN is not <= either
            raise UserError(
                f"an example packed behind another gives {model.config.model_type} something else than alone; leave "
                "packing out, or load the model with another attn_implementation"
            )

    def _hidden_states(self, rows: list[dict[str, Any]]) -> Tensor:
        batch = _context(self._prepare_inputs(self.data_collator(rows)))
        return causal.hidden_states(self.model, batch.pop("input_ids"), **batch).float()

    def _check_marks(self) -> None:
        """Raise UserError where the first rows are all prompt or all completion, or where none of them has a weight."""
        rows = self.train_dataset
        if rows is None or iter(rows) is iter(rows):  # a stream that can be read once
            return
        collate = self._get_collator_with_removed_columns(self.data_collator)
        kinds: set[bool] = set()
        row, have_weights = None, False
        for row in itertools.islice(rows, ROWS_LOOKED_AT):
            batch = collate([row])
            if "labels" not in batch or (isinstance(row, Mapping) and row.get("weights") is not None):
                have_weights = True
                if batch["weights"].any():
                    return  # to weights, whose two kinds are not all
                continue
            labels = batch["labels"][:, 1:]
            _check_carried(row, batch["labels"][0])
            kinds |= {kind for kind, there in ((True, labels != IGNORED), (False, prompts(labels))) if there.any()}
            if len(kinds) == 2:
                return
        name, is_ours = "labels", isinstance(self.data_collator.collator, PLWCollator)
        if is_ours and isinstance(row, Mapping):
            name = next((name for name in ("labels", *MASKS) if row.get(name) is not None), name)
        if kinds == {True} and self.plw != 1:
            raise UserError(
                f"the values of {name} mark every token as completion, so the PLW would change nothing; let them be "
                f"{IGNORED if name == 'labels' else 0} on prompts{'' if is_ours else f', or {BY_TRL}'}"
            )
        if have_weights and not kinds:
            raise UserError("no token has a weight above 0, so that nothing would be trained on; see to the weights")
        if row is not None and True not in kinds:
            raise UserError(
                f"no token is marked as completion by {name}; see that completions are not cut away, and that a "
                "chat template holds {% generation %} around what the assistant says"
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
        context, weights = _context(inputs), inputs["weights"].float()
        with self.accelerator.autocast():
            total = weighted_nll(model, weights=weights, label_smoothing=self.args.label_smoothing_factor, **context)
        if num_items_in_batch is None:  # in evaluation, where each batch of each process stands for itself
            whole = mass(weights, self.loss_divisor)
            self._evaluated.append(torch.stack([total.detach().to(whole), whole]))
            loss = total * _reciprocal(whole, total)
        else:
            loss = total * _reciprocal(num_items_in_batch, total) * self.accelerator.num_processes
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

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As in transformers; the loss is that of all examples together, divided once."""
        self._evaluated.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._evaluated and (name := f"{metric_key_prefix}_loss") in output.metrics:
            both = torch.stack(self._evaluated).sum(0, keepdim=True)
            total, whole = self.accelerator.gather(both.float().to(self.args.device)).double().sum(0)
            output.metrics[name] = float(total * _reciprocal(whole, total))
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            told = {"plw": self.plw, "loss_divisor": self.loss_divisor}
            Path(output_dir or self.args.output_dir, SAVED_AS).write_text(json.dumps(told) + "\n")


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
        if args is not None and args.accelerator_config.dispatch_batches is None:
            # Or the first process would make the batches of a stream for all, which have to be of one shape for that.
            args.accelerator_config.dispatch_batches = False
        super().__init__(model, args, data_collator, *more, plw=plw, loss_divisor=loss_divisor, **kwargs)


def _context(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch goes into the model."""
    return {name: value for name, value in batch.items() if name not in ("weights", "labels", *MASKS)}


def _reciprocal(whole: Tensor, like: Tensor) -> Tensor:
    """One over a divisor in float32, where another number is; 0 where no token weighs anything."""
    return torch.where(whole != 0, 1 / whole, 0.0).float().to(like.device)


def _vocabulary(model: Any) -> int | None:
    """How many tokens a model has embeddings for, with adapters or without; None where that is not known."""
    embeddings = causal.unwrap(model).get_input_embeddings()
    return next((part.num_embeddings for part in embeddings.modules() if isinstance(part, nn.Embedding)), None)


def _check_carried(row: Any, labels: Tensor) -> None:
    """Raise UserError where a collator marks tokens as completion that their row does not."""
    has_marks = isinstance(row, Mapping) and any(row.get(name) is not None for name in ("labels", *MASKS))
    if has_marks and len(own := completions(row)) == len(labels) and (labels != IGNORED)[~own].any():
        raise UserError(
            "the data collator marks tokens as completion that their row does not, so the PLW would change nothing or "
            f"little; leave it out, give one that keeps labels, or {BY_TRL}"
        )


def _row(tokens: int) -> dict[str, list[int]]:
    return {"input_ids": list(range(tokens)), "labels": list(range(tokens))}
