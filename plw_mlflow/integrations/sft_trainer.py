"""TRL's SFTTrainer with a prompt loss weight."""

from __future__ import annotations

from typing import Any

from plw_mlflow.errors import UserError
from plw_mlflow.integrations.trainer import TRIED, WeightedLoss, check_signatures

try:
    import trl
    from trl import SFTTrainer
except ImportError as error:
    raise UserError(f"PLWSFTTrainer needs TRL, which cannot be imported ({error}); it was tried with {TRIED}") from None

check_signatures(SFTTrainer, "TRL", trl.__version__)


class PLWSFTTrainer(WeightedLoss, SFTTrainer):
    """TRL's SFTTrainer, which trains prompt tokens with the weight `plw` and completion tokens with 1.

    Its arguments are those of TRL's SFTTrainer, and `plw` and `loss_divisor` as `PLWTrainer` has them. TRL marks what
    is outside completions in its labels, and carries those through templates, truncation and packing: by itself for
    prompts and completions, for messages with `assistant_only_loss=True`. What it leaves out of the loss here has the
    weight `plw`.

    Raises UserError for what is not supported, such as labels that mark no prompt.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *more: Any,
        plw: float,
        loss_divisor: str = "weights",
        **kwargs: Any,
    ) -> None:
        if data_collator is None and "weights" in (getattr(train_dataset, "column_names", None) or ()):
            raise UserError("TRL loses a column of weights, as it cuts and packs labels alone; use PLWTrainer for them")
        if (loss_type := getattr(args, "loss_type", "nll")) == "dft":
            raise UserError(f"loss_type={loss_type!r} is another loss than the weighted one; leave it out")
        super().__init__(model, args, data_collator, train_dataset, *more, plw=plw, loss_divisor=loss_divisor, **kwargs)
