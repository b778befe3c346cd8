"""Writes docs/data/instructions.jsonl and docs/data/instructions.validation.jsonl: small questions with short answers.

    python3 tools/instructions.py docs/data

They cover order (numbers, months, days, letters), sums, opposites, and copying, with several wordings each, which a
model of a million weights can learn. No question of the validation file occurs in the training file.
"""

import json
import random
import sys
from pathlib import Path

MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
OPPOSITES = [("large", "small"), ("high", "low"), ("hot", "cold"), ("old", "new"), ("good", "bad"), ("long", "short"),
             ("light", "dark"), ("rich", "poor"), ("early", "late"), ("strong", "weak"), ("first", "last"),
             ("open", "closed"), ("east", "west"), ("north", "south"), ("war", "peace"), ("land", "sea")]
WORDS = "whale ship sea captain harpoon ocean boat sail treaty congress nation law peace gold silver river union state".split()


def question(r):
    """A question and its answer."""
    kind = r.randrange(6)
    if kind < 3:
        name, items = r.choice([("month", MONTHS), ("day", DAYS), ("number", NUMBERS)])
        at = r.randrange(len(items) - 1)
        a, b = items[at], items[at + 1]
        if r.random() < 0.5:
            text = r.choice([f"Which {name} follows {a}?", f"Name the {name} after {a}.", f"What comes after {a}?"])
            return text, f"{b} follows {a}."
        text = r.choice([f"Which {name} precedes {b}?", f"Name the {name} before {b}.", f"What comes before {b}?"])
        return text, f"{a} precedes {b}."
    if kind == 3:
        a, b = r.randrange(10), r.randrange(10)
        text = r.choice([f"What is {a} plus {b}?", f"Add {a} and {b}.", f"How much is {a} and {b}?"])
        return text, f"The sum of {a} and {b} is {a + b}."
    if kind == 4:
        a, b = r.choice(OPPOSITES)
        if r.random() < 0.5:
            a, b = b, a
        text = r.choice([f"What is the opposite of {a}?", f"Name the opposite of {a}.", f"Which word is the opposite of {a}?"])
        return text, f"The opposite of {a} is {b}."
    a, b, c = r.sample(WORDS, 3)
    text = r.choice([f"Repeat these words: {a}, {b}, {c}.", f"Write {a}, {b}, {c}.", f"Say the words {a}, {b} and {c}."])
    return text, f"{a}, {b}, {c}."


def main():
    r, seen = random.Random(7), {}
    while len(seen) < 900:
        text, answer = question(r)
        seen.setdefault(text, answer)
    rows = [{"instruction": text, "response": answer} for text, answer in seen.items()]
    r.shuffle(rows)
    out = Path(sys.argv[1])
    for name, part in [("instructions.validation.jsonl", rows[:100]), ("instructions.jsonl", rows[100:])]:
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in part))


main()
