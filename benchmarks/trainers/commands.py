"""How each trainer is started: by its own command, with the options that its documentation has for instructions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"

Start = Callable[[dict[str, Any]], list[str] | str]  # the program of a case and its arguments, or why there is none


@dataclass(frozen=True)
class Trainer:
    """A trainer, the environment that it needs and how it is started."""

    name: str
    environment: str
    start: Start
    imports: tuple[str, ...] = ()  # what takes long to import, and is imported once for all steps
    variables: dict[str, str] = field(default_factory=dict)


def by_python(name: str, has_plw: bool, case: dict[str, Any]) -> list[str] | str:
    if case["plw"] and not has_plw:
        return "no weights between 0 and 1"
    return [str(HERE / "by_python.py"), name, f"{case['folder']}/case.json"]


def litgpt(case: dict[str, Any]) -> list[str] | str:
    if case["packing"]:
        return "no packing"
    if case["records"] == "conversations":
        return "no records of several turns but those that it downloads"
    return by_python("litgpt", False, case)


def llama_factory(case: dict[str, Any]) -> list[str] | str:
    """`llamafactory-cli train config.yaml`, which starts this file."""
    if case["plw"]:
        return "no weights between 0 and 1 in this engine"
    folder = Path(case["folder"])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    sets = {
        "records": {"file_name": "alpaca.json"},
        "conversations": {
            "file_name": "messages.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": tags,
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(sets))
    is_chat = case["records"] == "conversations"
    config = {
        "model_name_or_path": case["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": case["folder"],
        "dataset": "conversations" if is_chat else "records",
        "template": "chatml" if is_chat else "alpaca",
        "cutoff_len": case["max_tokens"],
        "neat_packing": case["packing"],  # packing without it lets examples attend to each other, by intent
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 1 if case["packing"] else case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_gradient_checkpointing": True,
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0,
    } | case["options"]
    return ["-m", "llamafactory.launcher", written(folder, config)]


def llama_factory_v1(case: dict[str, Any]) -> list[str] | str:
    """`USE_V1=1 llamafactory-cli sft config.yaml`, which starts this file."""
    folder = Path(case["folder"])
    rows = []
    for row in json.loads((folder / "messages.json").read_text()):
        messages = [
            {
                "role": message["role"],
                "content": [{"type": "text", "value": message["content"]}],
                "loss_weight": 1.0 if message["role"] == "assistant" else case["plw"] or 0.0,
            }
            for message in row["messages"]
        ]
        rows.append({"messages": messages})
    (folder / "v1.json").write_text(json.dumps(rows))
    config = {
        "model": case["model"],
        "template": "chatml",
        "train_dataset": str(folder / "v1.json"),
        "output_dir": str(folder / "out"),
        "micro_batch_size": case["micro_batch"],
        "global_batch_size": case["micro_batch"] * case["accumulation"] * case["processes"],
        "cutoff_len": case["max_tokens"],
        "max_steps": 1,
        "max_grad_norm": 1e9,
        "bf16": False,
        "enable_activation_checkpointing": False,
        "batching_workers": 0,
        "batching_strategy": "padding_free" if case["packing"] else "normal",
    } | case["options"]
    return ["-m", "llamafactory.v1.launcher", "sft", written(folder, config)]


SWIFT_PLW = """
from swift.loss_scale import LossScale, loss_scale_map

class PLW(LossScale):
    is_binary = False

    def _inner_call(self, context, context_type, query, loss, loss_scale, is_last_round):
        contexts, scales = super()._inner_call(context, context_type, query, loss, loss_scale, is_last_round)
        return contexts, [scale or {plw} for scale in scales]

loss_scale_map["plw"] = PLW
"""


def ms_swift(case: dict[str, Any]) -> list[str] | str:
    """`swift sft`, which starts this file."""
    folder = Path(case["folder"])
    options = {
        "model": case["model"],
        "model_type": "llama",
        "template": "chatml",
        "dataset": case["messages"],
        "tuner_type": "full",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "max_length": case["max_tokens"],
        "truncation_strategy": "right",
        "packing": case["packing"],
        "per_device_train_batch_size": 1 if case["packing"] else case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "split_dataset_ratio": 0,
        "dataloader_num_workers": 0,
        "dataset_num_proc": 1,
        "report_to": "none",
        "use_hf": True,
        "use_cpu": True,
        "output_dir": folder / "out",
    }
    if case["plw"]:
        (folder / "plw.py").write_text(SWIFT_PLW.format(plw=case["plw"]))
        options |= {"external_plugins": folder / "plw.py", "loss_scale": "plw"}
    options |= case["options"]
    return ["-m", "swift.cli.sft", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def axolotl(case: dict[str, Any]) -> list[str] | str:
    """`axolotl train config.yaml`, which starts this file."""
    if case["plw"]:
        return "weights of messages are 0 or 1"
    folder = Path(case["folder"])
    if case["records"] == "conversations":
        data = {"path": case["messages"], "type": "chat_template", "field_messages": "messages"}
    else:
        data = {"path": case["alpaca"], "type": "alpaca"}
    config = {
        "base_model": case["model"],
        "datasets": [{"ds_type": "json"} | data],
        "chat_template": "tokenizer_default",
        "train_on_inputs": False,
        "sequence_len": case["max_tokens"],
        "excess_length_strategy": "truncate",
        "sample_packing": case["packing"],
        "attn_implementation": "sdpa",
        "micro_batch_size": 1 if case["packing"] else case["micro_batch"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": 1,
        "num_epochs": 1,
        "seed": 1,  # or the order of records is another each time, and so are its micro-batches
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "max_grad_norm": 0.0,
        "val_set_size": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "output_dir": str(folder / "out"),
    } | case["options"]
    return ["-m", "axolotl.cli.train", written(folder, config)]


def written(folder: Path, config: dict[str, Any]) -> str:
    """A YAML file of a config, which JSON is, too."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(config, indent=2))
    return str(file)


PACKAGES = {
    "trl": [[TORCH, "transformers==5.23.0", "trl==1.16.0"]],
    "litgpt": [[TORCH, "litgpt==0.5.13", "requests"]],
    "llamafactory": [
        ["--no-deps", "llamafactory==0.9.5"],
        [
            *(TORCH, "accelerate<=1.11.0", "datasets<=4.0.0", "peft<=0.18.1", "transformers<=5.6.0", "trl<=0.24.0"),
            *("torchdata<=0.11.0", "tyro<0.9.0", "gradio<=5.50.0", "av<=16.0.0", "einops", "fastapi", "fire"),
            *("hf-transfer", "matplotlib", "modelscope", "omegaconf", "pandas", "protobuf", "scipy", "sentencepiece"),
            *("sse-starlette", "tiktoken", "uvicorn"),
        ],
    ],
    "ms-swift": [[TORCH, "ms-swift==4.6.0"]],
    # All that it names but kernels for GPUs and cloud storage.
    "axolotl": [
        ["--no-deps", "axolotl==0.19.0"],
        [
            *(TORCH, "transformers==5.16.1", "accelerate==1.13.0", "datasets==4.8.4", "trl==1.9.0", "peft==0.20.0"),
            *("huggingface_hub==1.17.0", "tokenizers==0.23.1", "hf_xet==1.4.3", "kernels<0.17.0", "optimum==1.16.2"),
            *("packaging==26.0", "typing-extensions==4.15.0", "pydantic==2.12.5", "PyYAML==6.0.3", "typer==0.25.1"),
            *("numba<1.0", "numpy<3.0", "evaluate==0.4.1", "python-dotenv==1.0.1", "zstandard==0.22.0"),
            *("immutabledict==4.2.0", "antlr4-python3-runtime==4.13.2", "schedulefree==1.4.1", "posthog==6.7.11"),
            *("axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6", "mistral-common==1.11.5"),
            *("bitsandbytes==0.50.2", "torchao==0.17.0", "nvidia-ml-py==12.560.30", "trackio==0.19.0"),
            *("s3fs==2025.10.0", "addict", "art", "colorama", "einops", "fastcore", "fire", "hf_transfer"),
            *("langdetect", "requests", "scipy", "sentencepiece", "tensorboard", "triton", "wandb"),
        ],
    ],
    # All that it names but kernels for GPUs and torchvision.
    "unsloth": [
        ["--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "cut_cross_entropy"],
        [
            *(TORCH, "transformers==5.16.1", "accelerate==1.13.0", "datasets==4.8.4", "trl==1.9.0", "peft==0.20.0"),
            *("bitsandbytes==0.50.2", "torchao==0.17.0", "triton", "hf_transfer", "protobuf", "sentencepiece", "tyro"),
            *("einops", "json5", "msgspec", "nest-asyncio", "pillow", "pydantic", "structlog", "typer", "wheel"),
        ],
    ],
}
# LLaMA-Factory imports torchaudio, which has no release for this torch; no audio is read here.
EMPTY_MODULES = {"llamafactory": ["torchaudio"]}
TRAINERS = (
    Trainer("our loop", "ours", partial(by_python, "our loop", True), ("plw_mlflow.training.train", "transformers")),
    Trainer("PLWTrainer", "ours", partial(by_python, "PLWTrainer", True), ("plw_mlflow.integrations.trainer",)),
    Trainer("transformers", "ours", partial(by_python, "transformers", False), ("transformers.trainer",)),
    Trainer("TRL", "trl", partial(by_python, "trl", False), ("trl.trainer.sft_trainer", "datasets")),
    Trainer("Unsloth", "unsloth", partial(by_python, "unsloth", False), ("unsloth",)),
    Trainer("litgpt", "litgpt", litgpt, ("litgpt.finetune.full",)),
    Trainer("LLaMA-Factory", "llamafactory", llama_factory, ("llamafactory.train.tuner",)),
    Trainer(
        "LLaMA-Factory v1", "llamafactory", llama_factory_v1, ("llamafactory.v1.trainers.sft_trainer",), {"USE_V1": "1"}
    ),
    Trainer("ms-swift", "ms-swift", ms_swift, ("swift.pipelines.train.sft", "swift.trainers")),
    Trainer("axolotl", "axolotl", axolotl, ("axolotl.cli.train", "axolotl.train"), {"AXOLOTL_DO_NOT_TRACK": "1"}),
)
