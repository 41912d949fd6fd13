"""A logged adapter as a pyfunc model. MLflow runs this file to load it ("models from code"); nothing is pickled.

Texts go in, and each comes out with the text that the model writes after it, by default greedily. Beside this file lie
the folders `peft`, the adapter with the name and the digest of its base, and `components/tokenizer`. The base is loaded
from where it was in training, or from the folder that `model_config={"base": ...}` names, after its digest has been
compared.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel


class AdaptedModel(PythonModel):
    """A base model with the adapter merged in."""

    def load_context(self, context: Any) -> None:
        """Load base, adapter and tokenizer. Raises ValueError where the base has other weights than in training."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

        folder = Path(__file__).parent
        adapter = folder / "peft"
        note = json.loads((adapter / "plw-base.json").read_text(encoding="utf-8"))
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        place = (context.model_config or {}).get("base") or settings["base_model_name_or_path"]
        if settings.get("revision") is None or Path(place).is_dir():  # a commit of the hub says itself what it holds
            check(Path(place), note["digest"])
        base = AutoModelForCausalLM.from_pretrained(place, revision=settings.get("revision"), dtype=torch.float32)
        merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        merged.generation_config = GenerationConfig.from_pretrained(str(adapter))
        for weight in merged.parameters():  # and not what is computed, such as the frequencies of rotary positions
            weight.data = weight.data.to(getattr(torch, note["precision"]))
        self.model = merged.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder / "components" / "tokenizer"))
        self._generate = pipeline("text-generation", model=self.model, tokenizer=self.tokenizer)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Each text with what the model writes after it.

        params: of the generation, such as max_new_tokens, do_sample, temperature and top_p. Without any it is greedy.
        """
        settings = {"do_sample": False, **(params or {})}
        return [self._generate(text, **settings)[0]["generated_text"] for text in model_input.iloc[:, 0]]


def check(base: Path, digest: str) -> None:
    """Raise ValueError unless a folder's config and weights have this digest (`plw_mlflow.models.location.digest`)."""
    if not base.is_dir():
        raise ValueError(f'the base {base} is not a folder here; say where it is: model_config={{"base": ...}}')
    sha256 = hashlib.sha256()
    weights = sorted(base.glob("*.safetensors")) or sorted(base.glob("*.bin"))
    for file in (base / "config.json", *weights):
        sha256.update(file.name.encode())
        with file.open("rb") as content:
            while block := content.read(2**24):
                sha256.update(block)
    if sha256.hexdigest() != digest:
        raise ValueError(f"the adapter was trained on {digest}, but its base {base} is {sha256.hexdigest()}")


mlflow.models.set_model(AdaptedModel())
