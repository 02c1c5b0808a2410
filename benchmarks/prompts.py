"""What it costs to render prompts: in batches and once a run, against one call at a time.

    python -m benchmarks.prompts --tokenizer FOLDER --json prompts.json

The prompts have the shape of OpenThoughts3: each question stands in the data set 16 times, and a
part of the rows is taken at random (300,000 of 1,200,000). They are written as a file in that
format, and `load_prompts` reads and renders them. `--tokenizer` is a folder with tokenizer.json,
tokenizer_config.json and a chat template, for example of a Qwen3 checkpoint. `--text` is a JSONL
file whose field `question` has the questions; without it they are made of words.

A run used to render each set twice: its checks with their own tokenizer, and the stage with
transformers. `before` is both, one call a prompt and in one thread. `first` is a run that has kept
nothing, and `again` one that finds everything: the check and the stage together. Reading the file
is the same in all three and is not part of `cpu_ratio`, the processor time of `first` over that of
`before`. `cpu_ratio_distinct` has a set in which no question comes twice. `cores_in_use` is
processor time over wall time while the tokenizer cuts texts.

The three are measured in alternation, in processes of their own, and the medians count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from lopd.config import PromptSet
from lopd.records import Prompt
from lopd.tasks.light_tokenizer import light_tokenizer
from lopd.tasks.prompts import load_prompts, read_prompts
from lopd.tasks.rendered import kept_in, write_held
from lopd.tasks.rendering import Renderer
from lopd.tasks.tokenizer import load_tokenizer

# How often OpenThoughts3 has each question, and which part of its rows the paper uses.
COPIES = 16
PART = 0.25
CONTEXT = 1 << 20
WORDS = [
    "let",
    "a",
    "prime",
    "number",
    "x",
    "satisfy",
    "the",
    "equation",
    "where",
    "function",
    "returns",
    "list",
    "of",
    "n",
    "integers",
]


def questions_of(text: Path | None, count: int) -> list[str]:
    """Return different questions, of a file or of random words."""
    chosen = random.Random(1)
    given = []
    if text is not None:
        lines = text.read_text(encoding="utf-8").splitlines()
        given = [json.loads(line)["question"] for line in lines]
    made = []
    for index in range(count):
        # Another question where the file has too few: two of them, and a number.
        if given:
            question = given[index % len(given)]
            if index >= len(given):
                question = f"{chosen.choice(given)} {question}"
        else:
            question = " ".join(chosen.choices(WORDS, k=chosen.randint(20, 120)))
        made.append(f"{index}. {question}")
    return made


def write_rows(path: Path, count: int, text: Path | None, *, is_repeated: bool) -> None:
    """Write a prompt file in the format of OpenThoughts3."""
    chosen = random.Random(2)
    if is_repeated:
        different = questions_of(text, max(1, round(count / PART / COPIES)))
        questions = chosen.sample(different * COPIES, count)
    else:
        questions = questions_of(text, count)
    with path.open("w", encoding="utf-8") as handle:
        for question in questions:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "..."}]
            handle.write(json.dumps({"conversations": turns, "domain": "math"}) + "\n")


def prompt_set(file: Path) -> PromptSet:
    # As in the flagship's configuration: each time a question comes, it is answered anew.
    return PromptSet(file=file, format="openthoughts3", duplicates="keep")


def one_call_at_a_time(prompts: list[Prompt], tokenizer: Any) -> list[list[int]]:
    """Render as it was done before: one call a prompt, in one thread."""
    named = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    ids = []
    for prompt in prompts:
        conversation = [dict(message) for message in prompt.messages]
        is_batched = not hasattr(tokenizer, "backend_tokenizer")
        # The checks' tokenizer takes lists of conversations only.
        given: Any = [conversation] if is_batched else conversation
        found = tokenizer.apply_chat_template(given, enable_thinking=True, **named)
        ids.append(found[0] if is_batched else found)
    return ids


def before(file: Path, folder: Path, work: Path) -> dict[str, float]:
    del work
    prompts = read_prompts(prompt_set(file), "any")
    tokenizers = (light_tokenizer(folder), load_tokenizer(folder))
    return measured(lambda: [one_call_at_a_time(prompts, one) for one in tokenizers])


def of_a_run(file: Path, folder: Path, work: Path) -> dict[str, float]:
    """Render as the checks do it, and then as a stage does it."""
    read_prompts(prompt_set(file), "any")
    tokenizers = (light_tokenizer(folder), load_tokenizer(folder))
    spent: list[dict[str, float]] = []
    real = Renderer.render
    real_keep = Renderer.keep

    def render(self: Renderer, *given: Any, **named: Any) -> Any:
        ids: list[Any] = []
        spent.append(measured(lambda: ids.extend(real(self, *given, **named))))
        return ids

    def keep(self: Renderer) -> None:
        spent.append(measured(lambda: real_keep(self)))

    # Only rendering and keeping count, and reading the rows does not.
    Renderer.render = render  # type: ignore[method-assign]
    Renderer.keep = keep  # type: ignore[method-assign]
    for tokenizer, can_write in zip(tokenizers, (False, True), strict=True):
        kept = kept_in(work, "sft", can_write=can_write)
        load_prompts(prompt_set(file), "any", tokenizer, context_length=CONTEXT, kept=kept)
        spent.append(measured(lambda: write_held(work)))
    return {name: sum(one[name] for one in spent) for name in spent[0]}


def measured(function: Callable[[], object]) -> dict[str, float]:
    """Return processor and wall time of a call, in seconds."""
    wall = time.perf_counter()
    processor = time.process_time()
    function()
    return {
        "processor_s": time.process_time() - processor,
        "wall_s": time.perf_counter() - wall,
    }


def in_a_process(
    function: Callable[[Path, Path, Path], dict[str, float]], *given: Path
) -> dict[str, float]:
    # Nothing that one measurement has in memory must help the next one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *given).result()


def compare(file: Path, folder: Path, repeats: int) -> dict[str, float]:
    """Measure the three in alternation."""
    rows: dict[str, list[dict[str, float]]] = {"before": [], "first": [], "again": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as work:
            rows["before"].append(in_a_process(before, file, folder, Path(work)))
            rows["first"].append(in_a_process(of_a_run, file, folder, Path(work)))
            rows["again"].append(in_a_process(of_a_run, file, folder, Path(work)))
    figures = {}
    for name, found in rows.items():
        for unit in found[0]:
            figures[f"{name}_{unit}"] = statistics.median(one[unit] for one in found)
    pairs = list(zip(rows["first"], rows["before"], strict=True))
    figures["cpu_ratio"] = statistics.median(
        first["processor_s"] / whole["processor_s"] for first, whole in pairs
    )
    figures["wall_ratio"] = statistics.median(
        first["wall_s"] / whole["wall_s"] for first, whole in pairs
    )
    return figures


def cores_in_use(file: Path, folder: Path) -> float:
    """Return processor time over wall time of the tokenizer's batches."""
    prompts = read_prompts(prompt_set(file), "any")
    renderer = Renderer(load_tokenizer(folder), thinking=True, time=None)
    spent = measured(lambda: renderer.render(prompts, context_length=CONTEXT))
    return spent["processor_s"] / spent["wall_s"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--text", type=Path, help="JSONL with the field question")
    parser.add_argument("--prompts", type=int, default=300_000, help="rows of the set")
    parser.add_argument("--repeats", type=int, default=3, help="alternations")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    figures: dict[str, float] = {"prompts": options.prompts}
    with tempfile.TemporaryDirectory() as work:
        repeated = Path(work) / "repeated.jsonl"
        write_rows(repeated, options.prompts, options.text, is_repeated=True)
        distinct = Path(work) / "distinct.jsonl"
        write_rows(distinct, options.prompts, options.text, is_repeated=False)
        figures |= compare(repeated, options.tokenizer, options.repeats)
        of_distinct = compare(distinct, options.tokenizer, options.repeats)
        figures["cpu_ratio_distinct"] = of_distinct["cpu_ratio"]
        figures["wall_ratio_distinct"] = of_distinct["wall_ratio"]
        figures["cores_in_use"] = cores_in_use(distinct, options.tokenizer)
    for name, value in figures.items():
        print(f"{name:24} {value:10.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
