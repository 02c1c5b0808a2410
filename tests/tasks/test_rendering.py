"""Prompts are rendered in batches, with the ids of one call at a time, and once a run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lopd.config import PromptSet
from lopd.errors import DataError
from lopd.records import Ints, Prompt
from lopd.tasks import rendered, rendering
from lopd.tasks.light_tokenizer import LightTokenizer, light_tokenizer
from lopd.tasks.prompts import load_prompts
from lopd.tasks.rendered import kept_in
from lopd.tasks.rendering import Renderer, render
from lopd.tasks.tokenizer import load_tokenizer
from tests.stand_ins import (
    TINY_MODELS,
    Lopd,
    StandIns,
    command,
    contents,
    flip_bit,
    write_project,
    write_prompts,
)

WORDS = ["what", "is", "x+1?", "naïve", "\n\n", "<|im_end|>", "    def f():", "数", "🙂", "e\u0301"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example's model with a tokenizer that knows every byte."""
    folder = Path(shutil.copytree(TINY_MODELS / "teacher", tmp_path / "model"))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "th", "<|im_end|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def questions(count: int) -> list[Prompt]:
    """Prompts of several messages and of any letters; each question comes twice."""
    random = np.random.default_rng(1)
    prompts = []
    for index in range(count // 2):
        text = " ".join(random.choice(WORDS, size=int(random.integers(1, 40))))
        user = {"role": "user", "content": f"{index} {text}"}
        messages = (user,) if index % 3 else ({"role": "system", "content": "th"}, user)
        prompts += [Prompt(f"{index}-{copy}", messages, "any") for copy in range(2)]
    return [prompts[index] for index in random.permutation(len(prompts))]


def one_by_one(prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
    """What transformers says of each prompt alone."""
    named = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [
        tokenizer.apply_chat_template([*map(dict, prompt.messages)], enable_thinking=True, **named)
        for prompt in prompts
    ]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of a tokenizer gets from now on."""
    counts: list[int] = []
    real = Renderer._ids_of

    def ids_of(self: Renderer, prompts: Sequence[Prompt]) -> list[Ints]:
        counts.append(len(prompts))
        return real(self, prompts)

    monkeypatch.setattr(Renderer, "_ids_of", ids_of)
    return counts


@pytest.mark.parametrize("load", [light_tokenizer, load_tokenizer], ids=["light", "transformers"])
def test_a_batch_has_the_ids_of_one_call_at_a_time(
    folder: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "_BATCH", 100)
    prompts = questions(700)
    expected = one_by_one(prompts, load_tokenizer(folder))
    counts = counted(monkeypatch)
    tokenizer = load(folder)
    found = [ids.tolist() for ids in render(prompts, tokenizer, context_length=4096)]
    assert found == expected
    # Batches, and each question once.
    assert counts == [100, 100, 100, 50]
    assert isinstance(tokenizer, LightTokenizer) == (load is light_tokenizer)
    # The control: a comparison that is off by one prompt, or by one token, is not equal.
    assert found[1:] != expected[:-1]
    assert [*found[:-1], [*found[-1], 0]] != expected


def test_threads_are_on_for_the_batch_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = light_tokenizer(folder)
    seen: list[str | None] = []
    real = tokenizer.apply_chat_template

    def asked(*given: Any, **named: Any) -> Any:
        seen.append(os.environ.get("TOKENIZERS_PARALLELISM"))
        return real(*given, **named)

    monkeypatch.setattr(tokenizer, "apply_chat_template", asked)
    render(questions(4), tokenizer, context_length=4096)
    assert seen == ["true"]
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_the_first_prompt_that_cannot_be_rendered_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('refused') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    texts = ["yes", "a much longer text", "no", "no"]
    prompts = [
        Prompt(f"p{index}", ({"role": "user", "content": text},), "any")
        for index, text in enumerate(texts)
    ]
    for load in (light_tokenizer, load_tokenizer):
        with pytest.raises(DataError, match=r"prompt 'p2' cannot be rendered \(refused\)"):
            render(prompts, load(folder), context_length=4096)
        # An earlier prompt that is too long is the first mistake.
        with pytest.raises(DataError, match="prompt 'p1' has 18 tokens"):
            render(prompts, load(folder), context_length=10)


def test_prompts_that_are_too_long_are_replaced_and_the_rest_is_not_read(
    folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt_id": f"p{index}", "question": "q" * (200 if index % 3 == 1 else 5) + str(index)}
        for index in range(9)
    ]
    file = write_prompts(tmp_path / "prompts.jsonl", rows)
    # Not reached, because six prompts are found before.
    file.write_text(file.read_text() + "{damaged\n")
    chosen = PromptSet(file=file, num_prompts=6, max_prompt_tokens=100)
    prompts, ids = load_prompts(chosen, "any", light_tokenizer(folder), context_length=4096)
    assert [prompt.prompt_id for prompt in prompts] == ["p0", "p2", "p3", "p5", "p6", "p8"]
    alone = one_by_one(prompts, load_tokenizer(folder))
    assert [one.tolist() for one in ids] == alone
    # The control: one more is wanted, and the damaged row is read.
    more = chosen.model_copy(update={"num_prompts": 7})
    with pytest.raises(DataError, match=r":10: the line is not valid JSON"):
        load_prompts(more, "any", light_tokenizer(folder), context_length=4096)


# ---- kept beside the run ----


def load(
    tmp_path: Path, folder: Path, rows: list[dict[str, Any]], *, light: bool = True
) -> list[list[int]]:
    """The ids of a prompt file, with what the run keeps."""
    file = write_prompts(tmp_path / "prompts.jsonl", rows)
    tokenizer: Any = light_tokenizer(folder) if light else load_tokenizer(folder)
    kept = kept_in(tmp_path / "run", "sft", can_write=True)
    _, ids = load_prompts(PromptSet(file=file), "any", tokenizer, context_length=4096, kept=kept)
    return [one.tolist() for one in ids]


ROWS = [{"prompt_id": f"p{index}", "question": f"the {index}?"} for index in range(200)]


def test_what_is_kept_is_not_rendered_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted(monkeypatch)
    first = load(tmp_path, folder, ROWS)
    assert counts == [200]
    # Only the sample is rendered, also by the other tokenizer of the same files.
    assert load(tmp_path, folder, ROWS) == load(tmp_path, folder, ROWS, light=False) == first
    assert counts == [200, 64, 64]


def test_every_change_is_noticed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path, folder, ROWS)
    counts = counted(monkeypatch)
    # A changed prompt is rendered, and no other one.
    rows = [*ROWS[:7], {"prompt_id": "p7", "question": "changed?"}, *ROWS[8:]]
    changed = load(tmp_path, folder, rows)
    assert counts == [64, 1]
    assert changed[7] != load(tmp_path, folder, ROWS)[7]

    def all_again() -> bool:
        counts.clear()
        load(tmp_path, folder, ROWS)
        return counts == [200]

    assert not all_again()
    template = folder / "chat_template.jinja"
    template.write_text("Be brief. " + template.read_text())
    assert all_again()
    about = json.loads((folder / "tokenizer.json").read_text())
    about["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(about))
    assert all_again()
    monkeypatch.setattr(rendered.importlib.metadata, "version", lambda name: "9")
    assert all_again()
    flip_bit(tmp_path / "run/prompts/sft.parquet")
    assert all_again()
    # The control: nothing was changed.
    assert not all_again()


def test_kept_ids_that_the_tokenizer_does_not_confirm_are_not_used(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = load(tmp_path, folder, ROWS)
    real = rendered._from_table
    monkeypatch.setattr(
        rendered, "_from_table", lambda table: {key: ids[1:] for key, ids in real(table).items()}
    )
    assert load(tmp_path, folder, ROWS) == right
    # The control: without the sample they would be used.
    monkeypatch.setattr(Renderer, "_check_found", lambda *_: None)
    assert load(tmp_path, folder, ROWS) == [ids[1:] for ids in right]


def test_a_template_that_reads_the_present_time_is_kept_with_its_time_only(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}{{ messages }}")
    assert rendered.fingerprint_of(light_tokenizer(folder), True, None) == ""


# ---- in a run ----


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


def test_a_run_renders_each_set_once(
    tmp_path: Path, lopd: Lopd, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIns().install(monkeypatch)
    config = write_project(tmp_path)
    counts = counted(monkeypatch)
    # A check writes nothing.
    lopd("check", config).succeeded()
    assert sorted(counts)[-3:] == [8, 24, 24]
    assert not (tmp_path / "run").exists()
    rendered._HELD.clear()
    whole: list[int] = []
    real = rendering.Renderer._batch

    def batch(self: Renderer, prompts: Any, places: Sequence[int], context_length: int) -> Any:
        # The check of the templates shows single prompts.
        if len(places) > 1:
            whole.append(len(places))
        return real(self, prompts, places, context_length)

    monkeypatch.setattr(Renderer, "_batch", batch)
    lopd("run", config).succeeded()
    assert sorted(whole) == [8, 24, 24]
    files = contents(tmp_path / "run/prompts")
    assert sorted(files) == ["eval.parquet", "opd.parquet", "sft.parquet"]
    assert not rendered._HELD
    # A second command, of another process, reads them.
    whole.clear()
    lopd("run", config).succeeded()
    assert not whole
    assert contents(tmp_path / "run/prompts") == files
    # The control: without them the sets are rendered again.
    shutil.rmtree(tmp_path / "run/prompts")
    whole.clear()
    lopd("run", config).succeeded()
    assert sorted(whole) == [8, 24, 24]
    assert contents(tmp_path / "run/prompts") == files
