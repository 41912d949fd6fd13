"""The token [PAD], as the training code of Stanford Alpaca and of the study adds it.

Nothing here needs it: padding is hidden by the attention mask and weighs 0. But each row of the head is a class of the
softmax, so one more makes every other token a little less likely: it begins with the mean of all logits.
"""

from __future__ import annotations

from typing import Any

import torch

from plw_mlflow.errors import UserError

PAD = "[PAD]"


@torch.no_grad()
def add(model: Any, tokenizer: Any) -> bool:
    """Give a tokenizer without padding token one, whose rows of embedding and head are the means of all others.

    Returns whether there was none. Both are changed in place. Raises UserError for a tokenizer of more tokens than
    the model knows, whose surplus would get random embeddings.
    """
    if tokenizer.pad_token is not None:
        return False
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, but the model knows only {known}")
    tokenizer.add_special_tokens({"pad_token": PAD})
    number = tokenizer.pad_token_id
    if number >= known:  # some models have spare rows
        model.resize_token_embeddings(number + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    parts = [embedding, getattr(head, "bias", None)] + ([] if head.weight is embedding else [head.weight])
    for part in parts:
        if part is not None:
            part[number] = (part.sum(0) - part[number]) / (len(part) - 1)
    model.config.get_text_config().pad_token_id = number
    return True
