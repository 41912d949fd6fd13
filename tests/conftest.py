"""What the tests share: a tiny random model, a tokenizer whose tokens are bytes, and the real data where they are."""

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # No test asks the hub for anything; read when huggingface_hub is imported.
if os.environ.get("PLW_TEST_GPU") != "1":  # the tests are of a CPU's arithmetic; read when torch looks for devices
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["MLFLOW_EXPERIMENT_NAME"] = "Default"  # where tests look for runs, unless they are about experiments
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-")  # what tests prepare, they prepare anew

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plw_mlflow.data.tokens import Example

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Shared machines make time limits a matter of luck; a fixed draw makes every run the same test.
settings.register_profile("steady", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("steady")

# A shell's background jobs ignore interrupts, and so would the entry points that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

BOS, EOS = 0, 1
BYTES = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=2)}
VOCABULARY = 2 + len(BYTES)


def byte_tokenizer(*merges: tuple[str, str], bos: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A byte-level BPE with the given merges and no others: without any, a token is a byte."""
    vocabulary = {"<s>": BOS, "</s>": EOS} | BYTES
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, clean_up_tokenization_spaces=False
    )


def make_example(tokens, segment):
    """An example of plain lists."""
    return Example(np.array(tokens, np.int32), np.array(segment, np.int8))


def tiny_llama(*, tied: bool = False, **changes) -> LlamaForCausalLM:
    """A random model, the same every time; its weights are large enough that no two tokens are equally likely."""
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def shared():
    folder = Path(__file__).resolve().parents[1] / "../shared"
    if not folder.is_dir():
        pytest.skip("needs the real data and tokenizer of ../shared, which are not here")
    return folder
