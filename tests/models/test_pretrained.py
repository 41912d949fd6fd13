"""Is a model loaded whole and as it is, and refused in one line where something is wrong with it?"""

import copy
import json
import pickle
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    CLIPConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from plw_mlflow.models import causal, pretrained
from tests.conftest import byte_tokenizer, tiny_llama
from tests.families import tiny


def test_weights_are_float32_whatever_the_checkpoint(tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in pretrained.load(str(tmp_path)).parameters()} == {torch.float32}


def test_an_encoder_decoder_model_is_refused_by_name(tmp_path):
    config = T5Config(vocab_size=60, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="t5 is an encoder-decoder model"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("hyperclovax", {"logits_scaling": 4.0}),  # multiplies by what Granite divides by
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1, "logit_scale": 0.5}),  # does not scale at all
    ],
)
def test_a_model_that_makes_its_logits_otherwise_is_refused_by_name(family, changes, tmp_path):
    tiny(family, **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{family} makes its logits in a way that is not known here"):
        pretrained.load(str(tmp_path))


def _lacking_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _of_another_shape(folder):
    weights = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(50, 24)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])


def _with(**settings):
    """Damage that changes a folder's config."""

    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _not_a_number(name, value):
    """Damage to one number of a weight."""

    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        weights[name][5, 3] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def _in_shards(folder):
    tiny_llama().save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink()


def _lacking_a_shard(folder):
    _in_shards(folder)
    (folder / "model-00002-of-00007.safetensors").unlink()


def _of_a_damaged_index(folder):
    _in_shards(folder)
    (folder / "model.safetensors.index.json").write_text("[]")


def _pickled(content):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(content)

    return damage


def _marked(folder, name):
    """A class of Python in a folder; as soon as the module is imported, a file `was run` is there."""
    code = f"from pathlib import Path\nPath({str(folder / 'was run')!r}).touch()\n\nclass {name}:\n    pass\n"
    (folder / "mine.py").write_text(code)


class _Marker:
    """What unpickling makes into a file."""

    def __init__(self, folder):
        self._file = folder / "was run"

    def __reduce__(self):
        return type(self._file).touch, (self._file,)


def _pickled_code(folder):
    _pickled(pickle.dumps({"lm_head.weight": _Marker(folder)}))(folder)


def _pickled_code_in_torchs_form(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Marker(folder)}, folder / "pytorch_model.bin")


def _claiming(header):
    """Damage to the header of the weights, or to the length that stands before it."""

    def damage(folder):
        file = folder / "model.safetensors"
        if isinstance(header, int):
            file.write_bytes(header.to_bytes(8, "little") + file.read_bytes()[8:])
        else:
            content = json.dumps(header).encode()
            file.write_bytes(len(content).to_bytes(8, "little") + content)

    return damage


def _with_shards_elsewhere(folder):
    _in_shards(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))


def _gguf(folder):
    (folder / "config.json").unlink()
    (folder / "model.gguf").touch()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_lacking_head, "lacks weights, among them lm_head.weight"),
        (_of_another_shape, "its weights have other shapes than its config.json says"),
        (_cut_short, "a file of its weights is damaged or cut short"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "a file of its weights is damaged or cut"),
        (_not_a_number("model.embed_tokens.weight", torch.nan), "1 numbers of model.embed_tokens.weight are NaN or"),
        (_not_a_number("lm_head.weight", -torch.inf), "1 numbers of lm_head.weight are NaN or infinite"),
        (_lacking_a_shard, "lacks 1 of the 7 files of its weights: model-00002-of-00007.safetensors"),
        (_of_a_damaged_index, "holds a damaged model.safetensors.index.json"),
        (_pickled(b"hello"), "cannot be loaded: KeyError"),
        (_pickled(b""), "cannot be loaded: EOFError"),
        (_pickled_code, "cannot be loaded: a file of its weights is damaged, or holds more than weights"),
        (_pickled_code_in_torchs_form, "cannot be loaded: a file of its weights is damaged, or holds more than"),
        (_claiming(2**40), "a file of its weights is damaged or cut short"),
        (
            _claiming({"lm_head.weight": {"dtype": "F32", "shape": [2**17, 2**17], "data_offsets": [0, 2**36]}}),
            "a file of its weights is damaged or cut short",
        ),
        (_with_shards_elsewhere, r"names '\.\./model-00002-of-00007.safetensors'"),
        (_with(num_hidden_layers=1), "does not use, among them model.layers.1.input_layernorm.weight"),
        (_with(num_hidden_layers=-1), "has -1 layers by its config.json"),
        (_with(num_hidden_layers=9000), "has 9000 layers by its config.json, but 21 weights in its files"),
        (_with(num_hidden_layers=100_000), "num_hidden_layers is 100000, more than any model's"),
        (_with(num_key_value_heads=10**9), "num_key_value_heads is 1000000000, more than any model's"),
        (_with(hidden_size=10**9), r"has \d{12} numbers by its config.json, but \d{5} in its files"),
        (_with(vocab_size=10**9), r"has \d{11} numbers by its config.json, but \d{5} in its files"),
        (_with(max_position_embeddings=10**12), "max_position_embeddings is 1000000000000, more than any model's"),
        (_with(max_position_embeddings=-1), "has -1 positions by its config.json"),
        (_with(rope_parameters={"factors": [1, 10**30]}), "factors is 1000000000000000000000000000000, more"),
        (_with(architectures=3), "cannot be loaded: TypeError"),
        (_with(architectures=[3]), "cannot be loaded: AttributeError"),
        (_gguf, "it has no config.json; GGUF files are not read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "cannot be loaded: .*`model_type` key"),
        (_with(num_attention_heads=0), "cannot be loaded: ZeroDivisionError"),
        (_with(hidden_act="nonsense"), "cannot be loaded: KeyError"),
        (_with(model_type="mine", auto_map={"AutoConfig": "mine.Config"}), "code of its own, which is not run"),
        (_with(quantization_config={"quant_method": "gptq", "bits": 4}), "cannot be loaded: .*GPTQ"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*no file named"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: .*not a valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "x"})),
            "cannot be loaded: .*`x`.* This is transformers 5",
        ),
        (lambda folder: (folder / "config.json").unlink(), "holds no model: it has no config.json"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_one_line(damage, expected, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=expected) as raised:
        pretrained.load(str(tmp_path))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.layers.3.self_attn.q_proj.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "score.weight",
    ],
)
def test_weights_that_do_not_make_the_logits_may_be_there(name, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {name: torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(5).unsqueeze(0)
    torch.testing.assert_close(pretrained.load(str(tmp_path))(tokens).logits, tiny_llama()(tokens).logits)


@pytest.mark.parametrize("name", ["lm_head.bias", "model.layers.1.self_attn.q_proj.bias"])
def test_weights_that_make_the_logits_have_to_be_used(name, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {name: torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"has weights that its config.json does not use, among them {name}"):
        pretrained.load(str(tmp_path))


def _ask(*_):
    raise AssertionError("somebody was asked")


def test_a_models_own_code_is_neither_run_nor_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", _ask)
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    _marked(tmp_path, "Mine")
    parts = {name: "mine.Mine" for name in ("AutoConfig", "AutoModelForCausalLM")}
    _with(model_type="mine", auto_map=parts)(tmp_path)
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for load in (pretrained.load_config, pretrained.load, pretrained.load_tokenizer):
        with pytest.raises(ValueError, match="it needs program code of its own, which is not run"):
            load(str(tmp_path))
    assert not (tmp_path / "was run").exists()


def test_a_machine_without_memory_is_not_the_models_fault(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    for error in (MemoryError(), torch.OutOfMemoryError(), KeyboardInterrupt()):
        monkeypatch.setattr(pretrained, "_trial", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            pretrained.load(str(tmp_path))


def test_a_library_that_panics_is_told_of_in_one_line(tmp_path, monkeypatch):
    class PanicException(BaseException):  # as libraries in Rust raise it
        pass

    def panic(*_, **__):
        raise PanicException("index out of bounds")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ValueError, match=r"the tokenizer of model .* cannot be loaded: index out of bounds"):
        pretrained.load_tokenizer(str(tmp_path))


ODD = (None, [], {}, "", "x", -1, 0, 0.5, 100_000, 10**9, 10**30, True, [1], {"a": 1}, "../../etc", ["a", "b"])


def _places(content, above=()):
    """Where something stands in a JSON file: the keys on the way to it."""
    items = content.items() if isinstance(content, dict) else enumerate(content[:5] if type(content) is list else ())
    for key, value in items:
        yield (*above, key)
        yield from _places(value, (*above, key))


def _mutated(content, choose):
    """A copy in which something is missing, or is something else."""
    changed = part = copy.deepcopy(content)
    *above, last = choose.choice([place for place in _places(content) if len(place) < 4])
    for key in above:
        part = part[key]
    if choose.random() < 0.15:
        del part[last]
    else:
        part[last] = choose.choice(ODD)
    return changed


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_whatever_stands_in_a_models_files_it_loads_or_is_refused_in_one_line(name, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer(("a", "b")).save_pretrained(tmp_path)
    load = pretrained.load_tokenizer if "token" in name else pretrained.load
    original, choose, refused = json.loads((tmp_path / name).read_text()), random.Random(1), []
    for _ in range(30):
        (tmp_path / name).write_text(json.dumps(_mutated(original, choose)))
        try:
            load(str(tmp_path))
        except ValueError as error:
            refused.append(str(error))
    assert all(str(tmp_path) in message and "\n" not in message for message in refused)
    assert len(refused) > 5 or name == "generation_config.json"


def test_a_model_in_shards_loads(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 7
    pretrained.load(str(tmp_path))


SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        (BertConfig(**SMALL), BertForMaskedLM, "is BertForMaskedLM, which is no causal language model"),
        (LlamaConfig(**SMALL), LlamaForSequenceClassification, "is LlamaForSequenceClassification, which is no causal"),
        (CLIPConfig(), None, "is of type clip, which is no causal language model"),
        (T5Config(**SMALL), T5ForConditionalGeneration, "t5 is an encoder-decoder model"),
    ],
)
def test_a_model_for_another_task_is_refused_before_its_weights_are_read(config, architecture, expected, tmp_path):
    config.architectures = architecture and [architecture.__name__]
    config.save_pretrained(tmp_path)  # and there are no weights
    with pytest.raises(ValueError, match=expected):
        pretrained.load(str(tmp_path))


def test_a_model_that_sees_what_follows_is_refused(tmp_path):
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(**SMALL)).save_pretrained(tmp_path)  # its config says nothing of it
    with pytest.raises(ValueError, match="bert lets the tokens that follow change what it gives for a token"):
        pretrained.load(str(tmp_path))


def test_a_model_that_padding_changes_is_refused(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    hidden_states = causal.hidden_states

    def without_mask(model, tokens, attention_mask):
        return hidden_states(model, tokens) + (1 - attention_mask).sum(1)[:, None, None]

    monkeypatch.setattr(causal, "hidden_states", without_mask)
    with pytest.raises(ValueError, match="llama lets padding change what it gives for a token"):
        pretrained.load(str(tmp_path))


def test_an_adapters_folder_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "org/base", "revision": "abc"})
    )
    tiny_llama().save_pretrained(tmp_path)  # with a config, transformers would load the base and train what is on it
    with pytest.raises(ValueError, match="holds adapters on org/base@abc, which can be scored, but not be a base"):
        pretrained.load(str(tmp_path))


@pytest.mark.parametrize("load", [pretrained.load, pretrained.load_tokenizer])
@pytest.mark.parametrize("name", ["no/such/folder", "./none", "/none", "nobody/nothing", "nothing@main", "not a name"])
def test_an_unknown_name_is_refused_in_one_line(load, name):
    with pytest.raises(ValueError, match=r"is not a folder on this machine|cannot be loaded") as raised:
        load(name)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_model_without_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer .* cannot be loaded"):
        pretrained.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", "", ""),
        ("tokenizer.json", "{", "one of its files is not JSON"),
        ("tokenizer.json", "[]", "TypeError"),
        ("tokenizer.json", "{}", "KeyError"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "BPE", "vocab": 3, "merges": []}}', ""),
        ("tokenizer_config.json", "[]", "AttributeError"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}', ""),
        ("tokenizer_config.json", '{"model_max_length": "long"}', "TypeError"),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(file, content, expected, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"the tokenizer of model .* cannot be loaded: .*{expected}") as raised:
        pretrained.load_tokenizer(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_another_tokenizer_may_be_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert pretrained.load_tokenizer(str(tmp_path / "model"), str(tmp_path / "tokenizer")).eos_token == "</s>"


def test_the_real_llama_weights_load(shared):
    model = pretrained.load(str(shared / "data/models/stories260K-hf"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
