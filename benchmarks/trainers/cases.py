"""The steps that each trainer is asked to take."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.trainers import material


@dataclass(frozen=True)
class Case:
    """One step: of what, and how it is cut."""

    name: str
    records: str = "records"  # of material: records, pair, conversations or empty
    micro_batch: int = 12  # examples, or rows where packed, a process
    accumulation: int = 1
    processes: int = 1
    packing: bool = False
    max_tokens: int = 256  # of an example, or of a packed row
    plw: float | None = None  # None: the trainer's own way
    pad: str = material.PAD
    options: dict[str, Any] = field(default_factory=dict)  # of a trainer, beside those that the case needs


WHOLE = Case("1 micro-batch")
CASES = (
    WHOLE,
    Case("2 micro-batches", micro_batch=6, accumulation=2),
    Case("4 micro-batches", micro_batch=3, accumulation=4),
    Case("2 processes", micro_batch=3, accumulation=2, processes=2),
    Case("packed", packing=True),
    Case("truncated", max_tokens=46),
    Case("two turns", "conversations", micro_batch=4),
    Case("empty", "empty", micro_batch=4),
    Case("padding is end of text", pad=material.EOS),
    Case("PLW 0.242", plw=0.242),
)


# What is asked of some trainers besides: other options, of which their documentation tells.
VARIANTS = {
    "transformers": [
        Case("collator for language models", pad=material.EOS, options={"collator": "language modeling"}),
    ],
    "TRL": [
        Case("two turns by default", "conversations", micro_batch=4, options={"assistant_only_loss": False}),
        Case("packed, wrapped", micro_batch=4, packing=True, options={"packing_strategy": "wrapped"}),
    ],
    "litgpt": [
        Case("by default", options={"data.mask_prompt": "false"}),
        Case("2 records, one at a time", "pair", micro_batch=1, accumulation=2),
    ],
    "LLaMA-Factory": [
        Case("packed by default", packing=True, options={"packing": True, "neat_packing": False}),
        Case("two turns, mask_history", "conversations", micro_batch=4, options={"mask_history": True}),
    ],
    "LLaMA-Factory v1": [
        Case("PLW 0.242, 4 micro-batches", micro_batch=3, accumulation=4, plw=0.242),
        Case("PLW 0.242, 2 records, one at a time", "pair", micro_batch=1, accumulation=2, plw=0.242),
        Case("truncated to 30", max_tokens=30),
        Case(
            "packed, dynamic_padding_free",
            micro_batch=1,
            packing=True,
            max_tokens=60,
            options={"batching_strategy": "dynamic_padding_free"},
        ),
    ],
    "ms-swift": [
        Case("PLW 0.242, 4 micro-batches", micro_batch=3, accumulation=4, plw=0.242),
        Case("truncated to 30", max_tokens=30),
        Case("two turns, last_round", "conversations", micro_batch=4, options={"loss_scale": "last_round"}),
    ],
    "axolotl": [
        Case("2 records, one at a time", "pair", micro_batch=1, accumulation=2),
        Case("two turns, eot_tokens", "conversations", micro_batch=4, options={"eot_tokens": [material.END_OF_TURN]}),
    ],
    "Unsloth": [Case("truncated to 30", max_tokens=30)],
    "our loop": [Case("PLW 0.242, 4 micro-batches", micro_batch=3, accumulation=4, plw=0.242)],
    "PLWTrainer": [Case("PLW 0.242, 4 micro-batches", micro_batch=3, accumulation=4, plw=0.242)],
}


def write(case: Case, folder: Path) -> dict[str, Any]:
    """Write the model and the records of a case, in all formats, to a folder. Returns the case with their places."""
    folder.mkdir(parents=True, exist_ok=True)
    material.write_model(folder / "model", pad=case.pad)
    chosen: dict[str, Any] = {
        "records": material.RECORDS,
        "empty": material.EMPTY,
        "pair": material.PAIR,
        "conversations": material.CONVERSATIONS,
    }
    conversations = [turns if isinstance(turns, list) else [turns] for turns in chosen[case.records]]
    firsts = [turns[0] for turns in conversations]
    written: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": prompt, "input": "", "output": answer} for prompt, answer in firsts],
        "prompts": [{"prompt": material.ALPACA.format(prompt), "completion": answer} for prompt, answer in firsts],
        "messages": [{"messages": material.messages(turns)} for turns in conversations],
    }
    places = {name: str(folder / f"{name}.jsonl") for name in written}
    for name, rows in written.items():
        Path(places[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "alpaca.json").write_text(json.dumps(written["alpaca"]))
    (folder / "messages.json").write_text(json.dumps(written["messages"]))
    given = asdict(case) | places | {"model": str(folder / "model"), "folder": str(folder)}
    (folder / "case.json").write_text(json.dumps(given, indent=2))
    return given
