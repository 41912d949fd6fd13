"""Do the exported folders load with transformers and peft alone, and is nothing else replaced?"""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plw_mlflow.config import RecipeOptions
from plw_mlflow.models import adapters, export, pad_token, pretrained, saved_adapters
from tests.conftest import VOCABULARY, byte_tokenizer, tiny_llama
from tests.families import tiny

TOKENS = torch.arange(2, 30).unsqueeze(0)


def exported(folder, output, method, *, add_pad_token=False, base=None):
    """Write a model as a cell does, and return its logits."""
    model, tokenizer = base or tiny_llama(), byte_tokenizer()
    is_added = add_pad_token and pad_token.add(model, tokenizer)
    model = adapters.adapt(model, method, RecipeOptions(), 1).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    folder.mkdir()
    adapters.save(model, folder, with_embeddings=is_added)
    merged = adapters.merge(model, folder)
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
    assert {path.name for path in (tmp_path / "output").iterdir() if path.name[0] != "."} == names
    if method == "lora":
        base = tiny_llama()
        if add_pad_token:
            pad_token.add(base, byte_tokenizer())
            base.lm_head.weight.data[-1] = 0  # the adapter has the row itself
        on_base = PeftModel.from_pretrained(base, tmp_path / "output/adapter").eval()
        torch.testing.assert_close(on_base(TOKENS).logits, expected)


@pytest.mark.parametrize(
    "base", [tiny_llama, lambda: tiny_llama(tied=True), lambda: tiny("gptj", vocab_size=VOCABULARY)]
)
def test_an_adapter_with_an_added_token_loads_again(base, tmp_path, monkeypatch):
    """By this package, and as the page in its folder says; the tied and the one whose head has a bias, too."""
    base().save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    loaded = pretrained.load(str(tmp_path / "base"))
    expected = exported(tmp_path / "adapter", tmp_path / "output", "lora", add_pad_token=True, base=loaded)
    folder = tmp_path / "output/adapter"
    model, _ = pretrained.load_for_scoring(str(folder))
    torch.testing.assert_close(model(TOKENS).logits, expected)

    page = (folder / "README.md").read_text()
    assert f"of {VOCABULARY + 1} tokens" in page
    monkeypatch.chdir(folder.parent)
    found = {}
    exec(page.split("```python\n")[1].split("```")[0].replace("this folder", "adapter"), found)
    torch.testing.assert_close(found["model"].eval()(TOKENS).logits, expected)


def test_an_adapter_without_one_needs_no_page(tmp_path):
    exported(tmp_path / "adapter", tmp_path / "output", "lora")
    assert "added token" not in (tmp_path / "output/adapter/README.md").read_text()


def test_an_adapter_that_is_damaged_is_refused_in_one_line(tmp_path):
    exported(tmp_path / "adapter", tmp_path / "output", "lora")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "up_proj.lora_A" in name)
    for value, expected in ((torch.nan, "lora_A.* are NaN or infinite"), (None, "size mismatch for .*lora_A")):
        changed = weights[name][:1].clone() if value is None else weights[name].fill_(value)
        save_file(weights | {name: changed}, file)
        with pytest.raises(ValueError, match=expected) as raised:
            saved_adapters.attach(tiny_llama(), tmp_path / "adapter")
        assert "\n" not in str(raised.value)
        assert not str(raised.value).endswith(":")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the adapter of .* cannot be loaded: a file of its weights is damaged"):
        saved_adapters.attach(tiny_llama(), tmp_path / "adapter")


def test_an_earlier_export_is_replaced_whole(tmp_path):
    exported(tmp_path / "first", tmp_path / "out", "lora")
    exported(tmp_path / "second", tmp_path / "out", "full")
    assert not (tmp_path / "out/adapter").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == ["model"]


def test_one_with_something_else_in_it_is_not(tmp_path):
    exported(tmp_path / "first", tmp_path / "out", "lora")
    (tmp_path / "out/model/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model/notes.txt is there, and was not written by plw_mlflow"):
        exported(tmp_path / "second", tmp_path / "out", "full")
    assert (tmp_path / "out/model/notes.txt").read_text() == "mine"
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
