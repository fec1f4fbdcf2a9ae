"""Write recall.jsonl: unseen stories up to a word that they determine, that word and wrong ones."""

import json
import random
from pathlib import Path

from gptedge_models.stories import stories_with_slots

SEED, N_ROWS = 20_000, 100


def main() -> None:
    """Each line is ``{"story", "choices", "answer"}``; the wrong choices are other words of the story."""
    draw = random.Random(SEED)
    rows = []
    for story, spans in stories_with_slots(SEED, N_ROWS):
        words = sorted({story[start:end] for start, end in spans})
        start, end = draw.choice([(start, end) for start, end in spans if story[start - 1] == " "])
        wrong = [word for word in words if word != story[start:end]]
        choices = [story[start:end], *draw.sample(wrong, min(3, len(wrong)))]
        draw.shuffle(choices)
        rows.append({"story": story[: start - 1], "choices": choices, "answer": choices.index(story[start:end])})
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(__file__).with_name("recall.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    main()
