"""The toy world: invented people, what is true of them, and the sentences that say so.

Most people, the known ones, may appear in questions and in instruction sets. The others, the held-out ones, appear in
biographies and a directory alone, and the benchmarks ask about them. So a benchmark measures whether fine-tuning makes
the model say what it read in pre-training, as real instruction tuning does, and not what the instruction sets said.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

PEOPLE, KNOWN = 160, 100  # how many there are, and how many of them are known
SEED = 20240124  # of the people, and of every instruction row and benchmark document


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


@dataclass(frozen=True)
class Kind:
    """A kind of fact: its possible values, the sentences that state it, and the questions that ask for it."""

    values: tuple[str, ...]
    statements: tuple[str, ...]  # {who}: the name or She; {whose}: the name's or Her
    questions: tuple[str, ...]


KINDS = {
    "town": Kind(
        words("Arvale Benmoor Coldry Dunfell Elmsby Farrowen Glenith Harlock Istermouth Jorvale Kestwick Lorford"),
        (
            "{who} lives in {value}.",
            "{whose} home is in {value}.",
            "{who} has a house in {value}.",
            "{who} moved to {value} years ago.",
        ),
        ("Where does {name} live?", "In which town is the home of {name}?", "What town does {name} live in?"),
    ),
    "job": Kind(
        words("baker farmer teacher miller potter sailor weaver doctor brewer painter tailor carpenter"),
        (
            "{who} works as a {value}.",
            "{who} is a {value}.",
            "{whose} job is that of a {value}.",
            "{who} earns money as a {value}.",
        ),
        ("What is the job of {name}?", "What does {name} do for a living?", "What does {name} work as?"),
    ),
    "pet": Kind(
        words("cat dog goat horse parrot rabbit tortoise goose ferret hamster"),
        (
            "{who} keeps a {value}.",
            "{whose} pet is a {value}.",
            "{who} has a {value} at home.",
            "{who} looks after a {value}.",
        ),
        ("What pet does {name} have?", "Which animal does {name} keep?", "What is the pet of {name}?"),
    ),
    "food": Kind(
        words("soup bread cheese plums noodles fish pancakes honey carrots rice"),
        (
            "{who} loves to eat {value}.",
            "{whose} favourite food is {value}.",
            "{who} eats {value} every day.",
            "{who} never says no to {value}.",
        ),
        ("What does {name} love to eat?", "What is the favourite food of {name}?", "What does {name} eat every day?"),
    ),
    "music": Kind(
        words("flute drum harp violin guitar trumpet piano banjo lute cello"),
        (
            "{who} plays the {value}.",
            "{whose} instrument is the {value}.",
            "{who} learned to play the {value}.",
            "{who} makes music on the {value}.",
        ),
        ("What does {name} play?", "Which instrument does {name} play?", "What is the instrument of {name}?"),
    ),
    "colour": Kind(
        words("red green blue yellow purple white black brown silver pink"),
        (
            "{who} wears {value} clothes.",
            "{whose} favourite colour is {value}.",
            "{who} likes the colour {value}.",
            "{who} has a {value} front door.",
        ),
        ("Which colour does {name} like?", "What is the favourite colour of {name}?", "What colour does {name} wear?"),
    ),
}


@dataclass(frozen=True)
class Person:
    name: str
    pronouns: tuple[str, str]  # She, Her or He, His
    facts: dict[str, str]  # one value for each of KINDS


@cache
def people() -> tuple[Person, ...]:
    """Everybody, the known first."""
    rng = Random(f"people-{SEED}")
    starts, middles = words("Al Be Ca Do El Fi Ga Ho Is Ju Ka Lo"), words("ba di lo mi ra ven")
    names = rng.sample([a + b + c for a in starts for b in middles for c in words("ka lin mos na ro")], PEOPLE)
    return tuple(
        Person(
            name,
            rng.choice([("She", "Her"), ("He", "His")]),
            {kind: rng.choice(KINDS[kind].values) for kind in KINDS},
        )
        for name in names
    )


def known_people() -> tuple[Person, ...]:
    return people()[:KNOWN]


def held_out_people() -> tuple[Person, ...]:
    return people()[KNOWN:]


def sentence(person: Person, kind: str, rng: Random, *, by_name: bool = True, phrasings: int = 4) -> str:
    """One fact in one of its first `phrasings` statements."""
    who, whose = (person.name, f"{person.name}'s") if by_name else person.pronouns
    statement = rng.choice(KINDS[kind].statements[:phrasings])
    return statement.format(who=who, whose=whose, value=person.facts[kind])


def biography(person: Person, kinds: list[str], rng: Random, *, phrasings: int = 4) -> str:
    """The facts of these kinds in this order, the person named first and now and then."""
    by_name = [i == 0 or rng.random() < 0.4 for i in range(len(kinds))]
    return " ".join(
        sentence(person, kind, rng, by_name=named, phrasings=phrasings)
        for kind, named in zip(kinds, by_name, strict=True)
    )


def question(person: Person, kind: str, rng: Random) -> str:
    return rng.choice(KINDS[kind].questions).format(name=person.name)


def some_kinds(count: int, rng: Random) -> list[str]:
    """`count` kinds of fact in random order."""
    return rng.sample(list(KINDS), count)


def counting(start: int, length: int) -> str:
    """The numbers from `start` to `start + length`."""
    return ", ".join(str(number) for number in range(start, start + length + 1))
