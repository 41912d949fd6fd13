"""Do the exported folders load with transformers and peft alone, and is nothing else replaced?"""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from plw_mlflow import adapters, export, padding
from plw_mlflow.config import RecipeOptions
from tests.conftest import byte_tokenizer, tiny_llama

TOKENS = torch.arange(2, 30).unsqueeze(0)


def exported(folder, output, method, *, add_pad_token=False):
    """Write a model as a cell does, and return its logits."""
    model, tokenizer = tiny_llama(), byte_tokenizer()
    is_added = add_pad_token and padding.add(model, tokenizer)
    model = adapters.adapt(model, method, RecipeOptions(), 1).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    merged = adapters.merge(model, folder, with_embeddings=is_added)
    export.check(output, None)
    export.write(merged, tokenizer, folder, output)
    return merged(TOKENS).logits


@pytest.mark.parametrize("add_pad_token", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_folders_load_without_this_package(method, add_pad_token, tmp_path):
    expected = exported(tmp_path / "adapter", tmp_path / "output", method, add_pad_token=add_pad_token)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "output/model")
    torch.testing.assert_close(found(TOKENS).logits, expected, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "output/model")
    assert tokenizer("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]
    names = {"model"} | ({"adapter"} if method == "lora" else set())
    assert {path.name for path in (tmp_path / "output").iterdir()} == names
    if method == "lora":
        base = tiny_llama()
        if add_pad_token:
            padding.add(base, byte_tokenizer())
            base.lm_head.weight.data[-1] = 0  # the adapter has the row itself
        on_base = PeftModel.from_pretrained(base, tmp_path / "output/adapter").eval()
        torch.testing.assert_close(on_base(TOKENS).logits, expected)


def test_an_earlier_export_is_replaced_whole(tmp_path):
    exported(tmp_path / "first", tmp_path, "lora")
    (tmp_path / "model" / "left over").touch()
    exported(tmp_path / "second", tmp_path, "full")
    assert not (tmp_path / "model" / "left over").exists()
    assert not (tmp_path / "adapter").exists()


def test_nothing_else_is_replaced(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"the trained model would replace its base in .*model; give another --output"):
        export.check(tmp_path, tmp_path / "model")
    export.check(tmp_path, tmp_path / "elsewhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"adapter exists and is no earlier export \(it has no adapter_config.json\)"):
        export.check(tmp_path, None)
    export.check(None, None)
