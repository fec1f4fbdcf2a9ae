"""Little stories from a grammar: the text that the demo model learns from, and unseen text to measure it on.

``stories.txt`` holds the grammar: first the pools from which a cast is drawn, then the plots, parted by blank lines.
Each row of a plot is a turn of the story; a row after ``| `` is another way to tell that turn. What a story names once
it names again later, so that a reader who foretells the next word has to look back.
"""

import random
import re
import string
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

PRONOUNS = {  # of the hero
    "girl": {"girl": "girl", "She": "She", "she": "she", "him": "her", "his": "her"},
    "boy": {"girl": "boy", "She": "He", "she": "he", "him": "him", "his": "his"},
}

_pools, *_plots = (Path(__file__).parent / "stories.txt").read_text(encoding="ascii").strip().split("\n\n")
POOLS = {
    slot: values.split(", ")
    for slots, values in (row.split(": ") for row in _pools.splitlines())
    for slot in slots.split()
}
NAMES = {kind: POOLS.pop(kind) for kind in PRONOUNS}
PLOTS = [[turn.split("\n| ") for turn in re.split(r"\n(?!\| )", plot)] for plot in _plots]
_LINES = [line for plot in PLOTS for turn in plot for line in turn]


def stories(seed: int, n: int) -> Iterator[str]:
    """Yield ``n`` stories, each one paragraph of ASCII text. Equal seeds give equal stories, others others."""
    return (story for story, _ in stories_with_slots(seed, n))


def stories_with_slots(seed: int, n: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield ``n`` stories with their recall slots: spans (start, end) of characters that the text before determines."""
    rng = random.Random(seed)
    for _ in range(n):
        plot = rng.choice(PLOTS)
        yield _tell([rng.choice(turn) for turn in plot], _draw_cast(rng))


def read_story(story: str) -> dict[str, str] | None:
    """Return the cast of a story, slot by slot; ``None`` where it leaves its plot, mixes up its cast or
    gives two slots the same value.
    """
    for kind, pronouns in PRONOUNS.items():
        others = {name for other in NAMES for name in NAMES[other] if other != kind}
        for plot in PLOTS:
            told = _follow(plot, story, pronouns) or {}
            cast = {slot: value for slot, value in told.items() if slot not in pronouns}
            if cast and cast["hero"] not in others and len(set(cast.values())) == len(cast):
                return cast
    return None


def _draw_cast(rng: random.Random) -> dict[str, str]:
    """Draw a value for each slot; no two slots of one story hold the same."""
    kind = rng.choice(["girl", "boy"])
    cast = {"hero": _draw_name(rng, kind), "friend": _draw_name(rng, rng.choice(["girl", "boy"]))}
    while cast["friend"] == cast["hero"]:
        cast["friend"] = _draw_name(rng, kind)
    for slot, pool in POOLS.items():
        cast[slot] = rng.choice([value for value in pool if value not in cast.values()])
    return cast | PRONOUNS[kind]


def _draw_name(rng: random.Random, kind: str) -> str:
    """One name in four is made up, so that a model cannot know them all by heart."""
    if rng.random() < 0.75:
        return rng.choice(NAMES[kind])
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice([1, 2]))]
    return "".join([*syllables, rng.choice("lnr"), "a" if kind == "girl" else "o"]).capitalize()


def _tell(lines: list[str], cast: Mapping[str, str]) -> tuple[str, list[tuple[int, int]]]:
    story, spans, named = "", [], set()
    for line in lines:
        prefix = ""
        for literal, slot in _pieces(line):
            prefix += literal
            story += literal
            if slot:
                if slot in named and _is_determined(prefix, slot):
                    spans.append((len(story), len(story) + len(cast[slot])))
                named |= {slot} - PRONOUNS["girl"].keys()
                prefix += f"{{{slot}}}"
                story += cast[slot]
        story += " "
    return story.rstrip(), spans


@cache
def _pieces(line: str) -> list[tuple[str, str | None]]:
    return [(literal, slot) for literal, slot, _, _ in string.Formatter().parse(line)]


@cache
def _is_determined(prefix: str, slot: str) -> bool:
    """True where each line of any plot that starts with ``prefix`` goes on with ``slot``."""
    return all(line.startswith(f"{prefix}{{{slot}}}") for line in _LINES if line.startswith(prefix))


def _follow(turns: list[list[str]], text: str, cast: Mapping[str, str]) -> Mapping[str, str] | None:
    """Match ``text`` turn by turn; each turn may add to the cast and must repeat what is there."""
    if not turns:
        return None if text else cast
    for line in turns[0]:
        found = _pattern(line).match(text)
        if found and all(cast.get(slot, value) == value for slot, value in found.groupdict().items()):
            rest = _follow(turns[1:], text[found.end() :], {**cast, **found.groupdict()})
            if rest:
                return rest
    return None


@cache
def _pattern(line: str) -> re.Pattern[str]:
    pattern, slots = "", set[str]()
    for literal, slot in _pieces(line):
        pattern += re.escape(literal)
        if slot in slots:
            pattern += f"(?P={slot})"
        elif slot:
            pattern += f"(?P<{slot}>{'|'.join(map(re.escape, POOLS[slot])) if slot in POOLS else '[A-Za-z][a-z]+'})"
            slots.add(slot)
    return re.compile(pattern + "(?: |$)")
