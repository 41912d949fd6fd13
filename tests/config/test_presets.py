"""Does a preset fill in what is unset and nothing else, and is the study's the study's?"""

import re
from dataclasses import fields

import pytest

from plw_mlflow.command_line import cli
from plw_mlflow.command_line.options import field_help
from plw_mlflow.config import CONFIGS, DataOptions, MainConfig, PrepareConfig, Preset, SweepConfig, TrainConfig, spell
from plw_mlflow.config.presets import HUERTA2024, MODELS, PRESETS
from plw_mlflow.sweep import grid

BY_PRESET = {
    name: field
    for config_type in (MainConfig, SweepConfig)
    for name, field in config_type.__dataclass_fields__.items()
    if field.default is None and PRESETS["toy"].get(name) is not None
}


def test_the_studys_recipe_is_the_studys():
    """arXiv:2401.13586v1 and Stanford Alpaca's training command, value by value."""
    expected = {
        "method": "full",
        "seed": 42,
        "epochs": 3,
        "batch_examples": 4 * 4 * 8,
        "micro_batch_examples": 4,
        "learning_rate": 0.00002,
        "warmup_ratio": 0.03,
        "weight_decay": 0,
        "max_grad_norm": 1,
        "precision": "bfloat16",
        "max_tokens": 512,
        "on_long": "truncate",
        "packing": False,
        "divisor_scope": "micro-batch",
        "empty_completion": "keep",
        "prompt_border": "separate",
        "template": "alpaca",
        "template_weight": None,
        "completion_weight": 1,
        "add_pad_token": True,
        "dropout": None,
        "label_smoothing": 0,
        "base_penalty": 0,
    }
    found = TrainConfig(preset="huerta2024")
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_has_what_its_preset_says(preset):
    """Also where a preset repeats a field's own default: presets.py is to hold the whole recipe."""
    found = TrainConfig(preset=preset)
    assert {name: getattr(found, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert None not in {getattr(found, name) for name in BY_PRESET}


def test_the_studys_recipe_by_lora_differs_in_what_it_says_alone():
    full, lora = TrainConfig(preset="huerta2024"), TrainConfig(preset="huerta2024-lora")
    differ = {field.name for field in fields(full) if getattr(full, field.name) != getattr(lora, field.name)}
    assert differ == {"preset", "method", "learning_rate", "add_pad_token"}


@pytest.mark.parametrize("name", BY_PRESET)
def test_an_explicit_value_wins(name):
    for preset in PRESETS:
        value = PRESETS["toy"][name]  # explicit, though it is another preset's
        assert getattr(TrainConfig(preset=preset, **{name: value}), name) == value


def test_what_is_passed_on_as_empty_is_unset(monkeypatch):
    """As `mlflow run` passes on what MLproject has as default."""
    got = []
    monkeypatch.setattr(
        "sys.argv", ["x", *(part for name in BY_PRESET for part in (f"--{name.replace('_', '-')}", ""))]
    )
    with pytest.raises(SystemExit):
        cli.command(TrainConfig)(got.append)()
    assert got == [TrainConfig()]


def test_prepare_follows_a_preset_too():
    found = PrepareConfig(preset="huerta2024")
    assert (found.on_long, found.prompt_border, found.empty_completion) == ("truncate", "separate", "keep")
    assert DataOptions().on_long == "drop"


@pytest.mark.parametrize("name", BY_PRESET)
def test_help_tells_each_presets_value(name):
    """As (toy A, huerta2024 B), and huerta2024-lora's where it is another than huerta2024's."""
    for config_type in CONFIGS.values():
        if BY_PRESET[name] not in config_type.__dataclass_fields__.values():
            continue
        told = dict(re.findall(r"\b(toy|huerta2024|huerta2024-lora) ([^ ,;)]+)", field_help(config_type)[name]))
        told.setdefault("huerta2024-lora", told["huerta2024"])
        kind = float if isinstance(PRESETS["toy"][name], float) else str
        assert {preset: kind(value) for preset, value in told.items()} == {
            preset: kind(spell(values[name])) for preset, values in PRESETS.items()
        }


def test_a_sweep_passes_resolved_values_to_its_cells():
    one, *_ = SweepConfig(preset="huerta2024-lora", plw="0,1", learning_rate=0.001).cells()
    assert (one.seed, one.method, one.learning_rate, one.batch_examples) == (42, "lora", 0.001, 128)
    given = grid.Cell(one, "", "", "").arguments()
    spelt = dict(zip(given[::2], given[1::2], strict=True))
    assert (spelt["--seed"], spelt["--method"], spelt["--packing"]) == ("42", "lora", "false")


def test_a_cell_is_what_its_values_are_and_not_its_presets_name():
    assert TrainConfig(**HUERTA2024).identity() == TrainConfig(preset="huerta2024").identity()
    assert TrainConfig().identity() != TrainConfig(preset="huerta2024").identity()


def test_an_unknown_preset_is_told():
    with pytest.raises(ValueError, match="preset must be toy or huerta2024 or huerta2024-lora, got 'mine'"):
        TrainConfig(preset="mine")
    assert set(PRESETS) == set(Preset.__args__)


def test_the_studys_models_are_pinned():
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", place, re.ASCII) for place in MODELS.values())
