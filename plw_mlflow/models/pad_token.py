"""The token [PAD], as the training code of Stanford Alpaca and of the study adds it.

Training does not need it: padding is hidden by the attention mask and has weight 0. But each row of the head is a class
of the softmax, so one more makes every other token a little less likely. Its logit begins as the mean of all others.
"""

from __future__ import annotations

from typing import Any

import torch

from plw_mlflow.errors import UserError

PAD = "[PAD]"


@torch.no_grad()
def add(model: Any, tokenizer: Any) -> bool:
    """Add the token to a tokenizer without padding token; its rows of embedding and head are the means of all others.

    Tokenizer and model are changed in place. Returns whether the token was added. Raises UserError for a tokenizer with
    more tokens than the model knows, as the others would get random embeddings.
    """
    if tokenizer.pad_token is not None:
        return False
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, but the model knows only {rows}")
    tokenizer.add_special_tokens({"pad_token": PAD})
    number = tokenizer.pad_token_id
    if number >= rows:  # some models have spare rows
        model.resize_token_embeddings(number + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    parts = [embedding, getattr(head, "bias", None)] + ([] if head.weight is embedding else [head.weight])
    for part in parts:
        if part is not None:
            part[number] = (part.sum(0) - part[number]) / (len(part) - 1)
    model.config.get_text_config().pad_token_id = number
    return True
