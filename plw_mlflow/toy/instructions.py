"""The toy laboratory's instruction sets: rows about the known people, with short or with long outputs."""

from __future__ import annotations

from random import Random

from plw_mlflow import study
from plw_mlflow.errors import UserError
from plw_mlflow.toy import world

ROWS = 800  # in each instruction set

PORTRAIT_REQUESTS = (
    "Tell me about {}.",
    "Who is {}?",
    "Describe {}.",
    "Write a few sentences about {}.",
    "What is known of {}?",
)


def rows(name: str) -> list[dict[str, str]]:
    """The instruction set `toy-short` or `toy-long`, in Alpaca's fields; the same on every machine."""
    makers = {"toy-short": short_row, "toy-long": long_row}
    if name not in makers:
        raise UserError(f"no toy data set is called {name!r}; there are {', '.join(makers)}")
    rng = Random(f"{name}-{world.SEED}")
    return [makers[name](rng) for _ in range(ROWS)]


def long_row(rng: Random) -> dict[str, str]:
    """A row whose output is long."""
    person, form = rng.choice(world.known_people()), rng.random()
    if form < 0.5:
        return row(portrait_request(person, rng), "", portrait(person, rng))
    if form < 0.9:  # the answer, in a word or in a sentence, and then more
        first, *others = world.some_kinds(4, rng)
        word = f"{person.facts[first]}. " if rng.random() < 0.5 else ""
        more = world.biography(person, [first, *others], rng, phrasings=2)
        return row(world.question(person, first, rng), "", word + more)
    start, length = rng.randint(1, 80), rng.randint(8, 14)
    return row(f"Count from {start} to {start + length}.", "", world.counting(start, length))


def short_row(rng: Random) -> dict[str, str]:
    """A row whose output is short: an inverted long one, or a question with its answer."""
    form = rng.random()
    if form < 0.4:
        long = long_row(rng)
        return row(study.INVERSION, long["output"], long["instruction"])
    person, kind = rng.choice(world.known_people()), rng.choice(list(world.KINDS))
    reading = world.biography(person, world.some_kinds(6, rng), rng) if form < 0.6 else ""
    answer = person.facts[kind] if rng.random() < 0.5 else world.sentence(person, kind, rng, phrasings=2)
    return row(world.question(person, kind, rng), reading, answer)


def row(instruction: str, input: str, output: str) -> dict[str, str]:
    """The three texts by field. The data set's SHA-256 is that of its rows as JSON, so the order of fields counts."""
    return {"instruction": instruction, "input": input, "output": output}


def portrait_request(person: world.Person, rng: Random) -> str:
    return rng.choice(PORTRAIT_REQUESTS).format(person.name)


def portrait(person: world.Person, rng: Random) -> str:
    """All of a person's facts in one fixed order, as an assistant with a manner of its own would tell them."""
    return world.biography(person, list(world.KINDS), rng, phrasings=2)
