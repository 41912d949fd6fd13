"""A causal transformers model in two parts: a body, which gives hidden states, and a head, which makes logits of them.

The loss and the scorer make logits only where they need them, so both take the two parts from here. Whether the parts
make the model's own logits is tried whenever a model is loaded (`pretrained.load`).

Letters: B rows, T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plw_mlflow.errors import UserError

# By what the logits are multiplied, or divided where the power is -1. Cohere and Falcon-H1 multiply, Granite divides;
# other families took over their names.
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


@dataclass(frozen=True)
class Head:
    """What makes logits of last hidden states."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None  # Gemma's cap: no logit is larger, or smaller than its negative

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V] of last hidden states [..., H]."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def unwrap(model: Any) -> Any:
    """The transformers model inside the wrapper that peft puts around one; adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> Any:
    """The part of an unwrapped model that gives hidden states.

    Raises UserError where it has no known name.
    """
    part = model.base_model
    if part is model:  # as of Llama 4's text model, whose part has another name than `base_model` looks for
        part = getattr(model, "model", model)
    if part is model:
        raise UserError(f"{model.config.model_type} has no part of a known name that gives hidden states")
    return part


def head(model: Any) -> Head:
    """The head of a model. Raises UserError where it has none whose weights make its logits."""
    model = unwrap(model)
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(getattr(layer, "weight", None), Tensor):
        raise UserError(f"{config.model_type} has no head whose weights make its logits")
    if hasattr(layer, "base_layer"):  # as peft wraps what has adapters, whose `weight` is then without them
        raise UserError(
            "adapters on the head (lm_head) are not supported; take it out of the adapters' target modules, or train "
            "all of it as one of peft's modules_to_save"
        )
    scale = math.prod((getattr(config, name, None) or 1) ** power for name, power in SCALES.items())
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, softcap)


def hidden_states(model: Any, tokens: Tensor, **context: Any) -> Tensor:
    """Last hidden states [B, T, H] of tokens [B, T].

    context: the other arguments of the forward pass, such as `Batch.context` gives.
    """
    return body(unwrap(model))(input_ids=tokens, use_cache=False, **context).last_hidden_state


def makes_own_logits(model: Any, hidden: Tensor, logits: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether a model's head makes its own logits [T, V] of its last hidden states [T, H].

    A scale or a cap that differs shows in the losses of the most and the least likely token, which must agree within
    the tolerance, in nats.
    """
    from_head = head(model).logits(hidden)
    for targets in (logits.argmax(1), logits.argmin(1)):
        own, ours = (nn.functional.cross_entropy(x.float(), targets, reduction="none") for x in (logits, from_head))
        if not torch.allclose(ours, own, atol=tolerance):
            return False
    return True


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a model by the names that it has for what is to stay together; none where it has no such names.

    model: may be wrapped in any way, and have adapters.
    """
    names = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return [part for part in model.modules() if type(part).__name__ in names]


def text_ends(model: Any) -> set[int]:
    """The tokens that end a text by a model's own generation settings; none where it has no such settings."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def length_limit(config: Any) -> int | None:
    """The most tokens a text may have without changing what is computed for others in its batch; None: any number.

    Some rotary frequencies (those of the types in `dynamic_rope_update` of transformers) depend on the longest text of
    a batch as soon as that has more tokens than this limit, and so change the hidden states of all the others.

    config: of a model, as transformers has it.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limits: list[int] = []
    for part in (rope, *rope.values()):  # some models have parameters for each type of layer
        kind = part.get("rope_type") or "" if isinstance(part, dict) else ""
        if "dynamic" in kind:
            limits.append(text.max_position_embeddings)
        elif kind == "longrope":
            limits.append(part["original_max_position_embeddings"])
    return min(limits, default=None)


def check_length(config: Any, longest: int) -> None:
    """Raise UserError where a text of `longest` tokens would change what is computed for others in its batch."""
    limit = length_limit(config)
    if limit is not None and longest > limit:
        raise UserError(
            f"an example has {longest} tokens, but beyond {limit} tokens the position frequencies of this "
            f"{config.model_type} model follow the longest example beside another, so that a step would depend on how "
            f"it is cut; set --max-tokens to {limit} or less"
        )
