"""Plain English from a small grammar: short paragraphs in which people draw, count, sort and trade coloured shapes.

A paragraph keeps to one story (a person, a number, a colour, a kind of shape, a place), so that what was said earlier
helps to predict what comes, and its sums are right. It belongs to the split its digest names.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from splits import Split, split_of

PEOPLE = (
    *("Ada", "Ben", "Clara", "Daniel", "Emma", "Felix", "Grace", "Henry", "Iris", "Jonas", "Katya", "Leo"),
    *("Maria", "Noah", "Olga", "Peter", "Rosa", "Samuel", "Tara", "Viktor"),
)
WOMEN = frozenset({"Ada", "Clara", "Emma", "Grace", "Iris", "Katya", "Maria", "Olga", "Rosa", "Tara"})
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white", "grey", "brown")
KINDS = ("circle", "square", "triangle", "star", "cross")
NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
PLACES = ("in the kitchen", "at school", "in the garden", "at the museum", "on the train", "by the window", "in the library")
SURFACES = ("sheet of paper", "wooden board", "grey stone", "long wall", "small card", "piece of cloth")
TIMES = ("In the morning", "After lunch", "On Monday", "Late in the evening", "Before breakfast", "Last week", "At noon")
SIZES = ("small", "large", "tiny", "wide", "narrow")
TOOLS = ("a brush", "a pencil", "a piece of chalk", "an old pen", "two fingers", "a ruler")
MOODS = ("happy", "tired", "proud", "surprised", "quiet", "patient")


@dataclass(frozen=True)
class Story:
    """What the sentences of one paragraph agree on."""

    person: str
    friend: str
    number: int
    more: int
    colour: str
    other: str
    kind: str
    size: str
    place: str
    surface: str


def paragraph(rng: random.Random) -> str:
    """Four to seven sentences that tell one story."""
    person, friend = rng.sample(PEOPLE, 2)
    colour, other = rng.sample(COLOURS, 2)
    story = Story(
        person=person,
        friend=friend,
        number=rng.randint(2, 9),
        more=rng.randint(1, 6),
        colour=colour,
        other=other,
        kind=rng.choice(KINDS),
        size=rng.choice(SIZES),
        place=rng.choice(PLACES),
        surface=rng.choice(SURFACES),
    )
    middle = rng.sample(_middles(rng, story), rng.randint(2, 5))
    return " ".join([rng.choice(_openings(rng, story)), *middle, rng.choice(_endings(rng, story))])


def heading(rng: random.Random) -> str:
    """A short title on a line of its own."""
    kind, colour = rng.choice(KINDS), rng.choice(COLOURS)
    number = rng.randint(2, 9)
    titles = (
        f"= The {colour} {kind} =",
        f"= {NUMBERS[number].capitalize()} {colour} {_plural(kind, number)} =",
        f"= How {rng.choice(PEOPLE)} learned to draw a {kind} =",
        f"= {_plural(kind, 2).capitalize()} {rng.choice(PLACES)} =",
    )
    return rng.choice(titles)


def paragraphs(split: Split, seed: int) -> Iterator[str]:
    """Endless paragraphs of a split, none twice."""
    rng = random.Random(f"text {split} {seed}")
    seen: set[str] = set()
    while True:
        found = paragraph(rng)
        if split_of(found) == split and found not in seen:
            seen.add(found)
            yield found


def text(split: Split, seed: int, characters: int) -> str:
    """At least `characters` characters of paragraphs, an empty line between them, some under a heading."""
    rng = random.Random(f"headings {split} {seed}")
    parts: list[str] = []
    length = 0
    for found in paragraphs(split, seed):
        if length >= characters:
            break
        block = f"{heading(rng)}\n\n{found}\n\n" if rng.random() < 0.2 else f"{found}\n\n"
        parts.append(block)
        length += len(block)
    return "".join(parts)


def _plural(kind: str, number: int) -> str:
    if number == 1:
        return kind
    return "crosses" if kind == "cross" else f"{kind}s"


def _count(number: int, colour: str, kind: str) -> str:
    return f"{NUMBERS[number]} {colour} {_plural(kind, number)}"


def _openings(rng: random.Random, story: Story) -> tuple[str, ...]:
    time, tool = rng.choice(TIMES), rng.choice(TOOLS)
    shapes = _count(story.number, story.colour, story.kind)
    return (
        f"{time} {story.person} drew {shapes} on a {story.surface}.",
        f"{story.person} took {tool} and drew {shapes} {story.place}.",
        f"{time} {story.person} and {story.friend} met {story.place} and found {shapes}.",
        f"There are {shapes} on the {story.surface} that {story.person} left {story.place}.",
        f"{story.person} has {shapes} and {story.friend} has {_count(story.more, story.other, story.kind)}.",
    )


def _middles(rng: random.Random, story: Story) -> list[str]:
    subject = "She" if story.person in WOMEN else "He"
    owner = "her" if story.person in WOMEN else "his"
    kinds, total = _plural(story.kind, 2), story.number + story.more
    noun = _plural(story.kind, story.more)
    elsewhere = rng.choice([kind for kind in KINDS if kind != story.kind])
    corners = {"circle": "no corners", "square": "four corners", "triangle": "three corners", "star": "five points"}
    return [
        f"The {kinds} are {story.size}, and none of them touch.",
        f"{subject} added {NUMBERS[story.more]} more {noun}, so that there were {NUMBERS[total]} in all.",
        f"All of the {kinds} are {story.colour}, but the {story.surface} is {story.other}.",
        f"{story.friend} counted the {kinds} twice and was {rng.choice(MOODS)}.",
        f'"How many {kinds} do you see?" asked {story.friend}. "{NUMBERS[story.number].capitalize()}," said {story.person}.',
        f'"What colour are they?" asked {story.friend}. "They are {story.colour}," said {story.person}.',
        f"A {story.kind} has {corners.get(story.kind, 'four arms')}, which is easy to remember.",
        f"There was no {elsewhere} to be seen {story.place}.",
        f"{subject} likes {story.colour} better than {story.other}, and {owner} friends know it.",
        f"Each {story.kind} is as wide as {rng.choice(('a coin', 'a hand', 'a leaf', 'a cup', 'a door'))}.",
        f"The {'first' if rng.random() < 0.5 else 'last'} {story.kind} was drawn with {rng.choice(TOOLS)}.",
        f"It took {story.person} {NUMBERS[rng.randint(2, 20)]} minutes to draw the {kinds}.",
        f"{story.friend} asked for a {story.other} {elsewhere} instead, but {story.person} only laughed.",
    ]


def _endings(rng: random.Random, story: Story) -> tuple[str, ...]:
    subject = "she" if story.person in WOMEN else "he"
    left = rng.randint(0, story.number - 1)
    verb = "was" if left == 1 else "were"
    remaining = "none" if left == 0 else NUMBERS[left]
    return (
        f"In the end {subject} gave {_count(story.number - left, story.colour, story.kind)} away and {remaining} {verb} left.",
        f"Then {story.person} went home, and {subject} was {rng.choice(MOODS)}.",
        f"The {story.surface} still hangs {story.place}.",
        f"{story.friend} will draw a {story.other} {story.kind} next time.",
        f"Nobody else saw the {_plural(story.kind, story.number)} that day.",
    )
