"""What the study fixed: its prompt loss weights, its templates, and the prompts of its inverted records.

"The study" is Huerta-Enochian and Ko, arXiv:2401.13586.
"""

PUBLISHED_PLWS = (0.0, 0.0005, 0.002236, 0.01, 0.02463, 0.05, 0.1, 0.2463, 0.5, 1.0)  # v1, section 3.1

# The templates of Stanford Alpaca, PROMPT_DICT in its train.py at 761dc5b, which the study used unchanged.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# The instructions of inverted records (`data/inversion.py`), v1, section 3.3. The second is followed by the record's
# own input.
INVERSION = "Predict the prompt that generated the following AI output."
INVERSION_WITH_CONTEXT = "Predict the prompt that generated the below AI output given the following context. Context: "
