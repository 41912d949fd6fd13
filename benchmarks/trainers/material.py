"""What all trainers are given: a tiny model with a tokenizer of its own, and a dozen records in their formats."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

PAD, BOS, EOS, TURN, END_OF_TURN = SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 640

# Instructions and answers of unequal lengths, so that a mean of means is another number than a mean.
RECORDS = [
    ("Name a fruit.", "Plum."),
    ("Count to six.", "One, two, three, four, five, six."),
    ("What is the opposite of cold?", "Hot."),
    ("Give three colours that a flag may have.", "Red, white and blue; many flags have just these three."),
    ("Add 2 and 5.", "7"),
    ("Say why bread rises.", "Yeast eats sugar and gives off gas, which the dough holds."),
    ("Is the sea salt or sweet?", "Salt."),
    ("Write one line about rain.", "Rain taps the roof all night, and in the morning the garden shines."),
    ("Spell the word owl.", "O, w, l."),
    ("Which month comes after May, and how many days has it got?", "June, which has 30 days."),
    ("Who mends shoes?", "A cobbler."),
    ("Turn this into a question: the train is late.", "Is the train late?"),
]
# Two turns each.
CONVERSATIONS = [
    [("Name a tree.", "Oak."), ("And a taller one?", "The redwood, which may reach a hundred metres.")],
    [("What is 3 times 4?", "12, which is a dozen."), ("And half of it?", "6")],
    [("Translate dog into German.", "Hund."), ("And cat?", "Katze.")],
    [("Who wrote Emma?", "Jane Austen."), ("When?", "It came out in December of 1815, in three volumes.")],
]
# Where one side says nothing.
EMPTY = [("", "The moon."), ("Say nothing.", ""), ("Name a river.", "The Nile."), ("Name a bird.", "Wren.")]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation as a list of messages."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def tokenizer() -> Tokenizer:
    """A byte-level BPE that has the words of templates and records, and begins each text as LLaMA's does."""
    turns = [*RECORDS, *EMPTY, *itertools.chain.from_iterable(CONVERSATIONS)]
    texts = [ALPACA * 3, CHAT_TEMPLATE] + [" ".join(turn) for turn in turns] * 2
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return made


def model() -> LlamaForCausalLM:
    """A random tiny LLaMA in float32, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        tie_word_embeddings=False,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def write_model(folder: Path, *, pad: str = PAD) -> None:
    """Write the model and its tokenizer to a folder, from which all trainers load them.

    pad: the token that the tokenizer names as padding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    # As versions before 5 have it.
    written |= {"rope_theta": written["rope_parameters"]["rope_theta"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    tokenizer().save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": pad,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
