"""Write prompts: everyday requests to an assistant, made of kinds of request and subjects.

    python examples/real_model/prompts.py FOLDER

Three files of different prompts, in lopd's own form: sft.jsonl, opd.jsonl and eval.jsonl. No prompt
of one file is in another one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

SIZES = {"sft": 256, "opd": 512, "eval": 48}
REQUESTS = (
    "Explain {} in one sentence.",
    "Explain {} to a child.",
    "List three facts about {}.",
    "Give me two reasons to like {}.",
    "Write a short poem about {}.",
    "Write one sentence about {}.",
    "What is the best thing about {}?",
    "What should everybody know about {}?",
    "Describe {} in two sentences.",
    "Write a riddle about {}.",
    "Give a title for a book about {}.",
    "What do people often get wrong about {}?",
    "Ask me a question about {}.",
    "Write a slogan for a shop that sells things about {}.",
    "How would you start a talk about {}?",
    "Name a word that goes with {}, and say why.",
)
SUBJECTS = (
    "rain", "bread", "the moon", "friendship", "bicycles", "volcanoes", "honey", "music", "winter",
    "the sea", "clocks", "trees", "cats", "dogs", "trains", "bridges", "gardens", "sleep", "tea",
    "coffee", "rivers", "mountains", "birds", "bees", "maps", "books", "painting", "chess",
    "football", "swimming", "rice", "potatoes", "glass", "paper", "iron", "gold", "salt", "light",
    "sound", "wind", "deserts", "islands", "cities", "villages", "schools", "teachers", "doctors",
    "cooking", "dancing", "singing", "holidays", "birthdays", "letters", "photographs", "robots",
    "computers", "rockets", "stars", "planets", "dreams", "memory", "laughter", "courage",
    "patience",
    "honesty", "curiosity", "apples", "oranges", "soup", "cheese", "shoes", "hats", "umbrellas",
    "windows", "doors", "candles", "fire", "ice", "snow", "thunder",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the three files go")
    folder = parser.parse_args().folder
    pairs = list(itertools.product(REQUESTS, SUBJECTS))
    random.Random(17).shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    rest = iter(pairs)
    for name, size in SIZES.items():
        rows = [
            {
                "prompt_id": f"{name}-{number}",
                "messages": [{"role": "user", "content": request.format(subject)}],
            }
            for number, (request, subject) in enumerate(itertools.islice(rest, size))
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
