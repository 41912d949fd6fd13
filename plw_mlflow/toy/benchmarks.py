"""The toy laboratory's benchmarks, whose lm-eval task files are in `evaluation/task_files/toy`.

A document holds a prompt and its answer. The benchmarks ask about the held-out people alone.
"""

from __future__ import annotations

from random import Random

from plw_mlflow import study
from plw_mlflow.toy import instructions, world


def documents(task: str) -> list[dict[str, object]]:
    """The documents of `toy_choice`, `toy_short` or `toy_long`."""
    rng = Random(f"{task}-{world.SEED}")
    listed: list[dict[str, object]] = []
    for person in world.held_out_people():
        requests = rng.sample(instructions.PORTRAIT_REQUESTS, 2)
        for kind, request in zip(world.some_kinds(2, rng), requests, strict=True):
            values, answer = world.KINDS[kind].values, person.facts[kind]
            choices = rng.sample([value for value in values if value != answer], 3)
            choices.insert(rng.randrange(4), answer)
            if task == "toy_long":
                instruction, answer = request.format(person.name), instructions.portrait(person, rng)
            else:
                instruction = world.question(person, kind, rng)
            prompt = study.ALPACA_WITHOUT_INPUT.format(instruction=instruction)
            listed.append({"prompt": prompt, "kind": kind, "choices": choices, "answer": answer})
    return listed
