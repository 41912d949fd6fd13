"""lm-evaluation-harness by its own command line, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval.tasks
from lm_eval.tasks._yaml_loader import load_yaml

from plw_mlflow.evaluation import local_documents, scores
from tests.stores import ROOT


def command_line(model, tasks, data, folder, limit, seed=1):
    """Scores of a model's folder, as {(task, metric): score}, of percentages a hundredth.

    tasks: names. Those that have documents in `data` are task files that include the harness's, or ours, and read the
    documents as JSON lines, in the place of the hub's data sets. folder: for those files, and for the results.
    """
    shutil.copytree(ROOT / "plw_mlflow/evaluation/task_files", folder / "tasks")
    for task in set(tasks) & local_documents.LOCAL.keys():
        file = _task_file(task)
        documents = local_documents.find(task, data)
        is_test = load_yaml(file)["test_split"] is not None if "test_split" in load_yaml(file) else False
        splits = {"test" if is_test else "validation": documents.scored}
        if documents.examples:
            splits["train"] = documents.examples
        for split, some in splits.items():
            (folder / f"{task}-{split}.jsonl").write_text("\n".join(map(json.dumps, some)))
        own = {
            "include": str(file),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(folder / f"{task}-{split}.jsonl") for split in splits}},
            "training_split": "train" if documents.examples else None,
            "validation_split": None if is_test else "validation",
            "fewshot_split": None,
        }
        (folder / "tasks" / f"{task}.yaml").write_text(json.dumps(own))  # JSON is YAML
        for ours in (folder / "tasks").glob(f"*/{task.removeprefix('huerta2024_')}.yaml"):
            ours.unlink()
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={model},dtype=float32", "--tasks", ",".join(tasks), "--limit", str(limit)]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(folder / "out"), "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "out").glob("*/results_*.json")
    return {
        (task, key.removesuffix(",none")): value / scores.percent(key.partition(",")[0])
        for task, values in json.loads(results.read_text())["results"].items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key
    }


def _task_file(task):
    for folder in (ROOT / "plw_mlflow/evaluation/task_files", Path(lm_eval.tasks.__file__).parent):
        for file in folder.glob("*/*.yaml"):
            if f"\ntask: {task}\n" in f"\n{file.read_text()}":  # of the file itself, not of a group's list
                return file
    raise ValueError(task)
