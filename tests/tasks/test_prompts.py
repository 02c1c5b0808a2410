"""Prompt sets from files and tasks, the chat template, tokenizers: what goes in, and one clear line
for what cannot.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lopd.config import PromptSet
from lopd.errors import ConfigError, DataError
from lopd.records import Prompt
from lopd.tasks.prompts import read_prompts
from lopd.tasks.register_arithmetic import Problem, RegisterArithmetic
from lopd.tasks.rendering import render
from lopd.tasks.tokenizer import decode, load_tokenizer, stop_token_ids, token_texts

TASK = RegisterArithmetic()
GOOD = {"prompt_id": "a", "question": "01+01=?", "answer": "02"}
PROMPT = TASK.to_prompt(Problem(81, (("+", 6), ("+", 2), ("+", 7), ("+", 3), ("-", 10))))
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "user",
    "assistant",
    "\n",
]


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines),
        encoding="utf-8",
    )
    return path


# ---- reading ----


def test_reads_questions_and_messages_in_order_and_skips_blank_lines(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write_lines(
        tmp_path / "prompts.jsonl",
        GOOD,
        "",
        {"prompt_id": "b", "messages": chat, "domain": "chat", "source": "ours"},
    )
    first, second = read_prompts(PromptSet(file=path), TASK)
    assert first == Prompt(
        "a", ({"role": "user", "content": "01+01=?"},), "register_arithmetic", "02"
    )
    assert second == Prompt("b", tuple(chat), "chat", None)


def test_num_prompts_takes_the_first_ones(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "prompts.jsonl", *({**GOOD, "prompt_id": f"p{index}"} for index in range(5))
    )
    assert [
        prompt.prompt_id for prompt in read_prompts(PromptSet(file=path, num_prompts=2), TASK)
    ] == ["p0", "p1"]


def test_without_a_file_the_task_generates() -> None:
    assert read_prompts(PromptSet(num_prompts=3, seed=4), TASK) == TASK.generate_prompts(3, 4)
    with pytest.raises(ConfigError, match="neither file nor num_prompts"):
        read_prompts(PromptSet(), TASK)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "{not json"], r":2: the line is not valid JSON"),
        ([GOOD, "", [1, 2]], r":3: a JSON object is needed, but the row is a list"),
        ([{"prompt_id": " ", "question": "q"}], r":1: prompt_id is ' ', but it must be"),
        ([{"answer": "1"}], r":1: a prompt must have either messages or question"),
        ([{"prompt_id": 7, "question": "q"}], r":1: prompt_id is 7, but it must be a non-empty"),
        ([{"prompt_id": "a"}], r":1: prompt 'a' must have either messages or question"),
        ([{**GOOD, "messages": []}], r":1: prompt 'a' must have either messages or question"),
        ([{"prompt_id": "a", "messages": []}], r":1: messages must be a non-empty list"),
        (
            [{"prompt_id": "a", "messages": [{"role": "user"}]}],
            r":1: messages\[0\] must have role and content",
        ),
        (
            [{"prompt_id": "a", "messages": [{"role": "user", "content": 3}]}],
            r":1: messages\[0\] must have role and content",
        ),
        (
            [{"prompt_id": "a", "messages": [{"role": "assistant", "content": "x"}]}],
            r":1: the last message is from the assistant",
        ),
        ([{**GOOD, "answer": 2}], ":1: answer is 2, but it must be a non-empty string"),
        (
            [GOOD, {**GOOD, "prompt_id": "b"}, GOOD],
            (r":3: the prompt_id 'a' is not unique: it is also on line 1"),
        ),
        ([GOOD, {"prompt_id": "b", "question": "q"}], r":2: prompt 'b' has no answer"),
        ([], r"the prompt set is empty"),
        (["", " "], r"the prompt set is empty"),
    ],
)
def test_bad_prompt_file_names_the_line(tmp_path: Path, lines: list[object], message: str) -> None:
    path = write_lines(tmp_path / "prompts.jsonl", *lines)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(PromptSet(file=path), TASK, need_answers=True)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_without_an_id_is_named_by_its_question(tmp_path: Path) -> None:
    """The id is a hash of the question, whatever the answer, the file and the row's place."""
    first = write_lines(
        tmp_path / "first.jsonl",
        {"question": "What is 1+1?", "answer": "2"},
        {"prompt_id": None, "question": "What is 2+2?", "answer": "4"},
        # The same question in the other spelling of the form.
        {"messages": [{"role": "user", "content": "What is 1+1?"}], "answer": "2"},
        {"prompt_id": "mine", "question": "What is 1+1?", "answer": "2"},
        {"question": "What is 1+1?", "answer": "2"},
    )
    ids = [prompt.prompt_id for prompt in read_prompts(PromptSet(file=first), TASK)]
    text = json.dumps([{"role": "user", "content": "What is 1+1?"}])
    hashed = f"lopd-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    # A repeated question stays, as in a file with ids, and is told apart by a number.
    assert [ids[0], *ids[2:]] == [hashed, f"{hashed}#2", "mine", f"{hashed}#4"]
    assert ids[1] not in ids[2:]
    second = write_lines(tmp_path / "second.jsonl", {"question": "What is 1+1?", "answer": "3"})
    assert read_prompts(PromptSet(file=second), TASK)[0].prompt_id == hashed
    # Dropped where the set says so.
    dropped = read_prompts(PromptSet(file=first, duplicates="drop"), TASK)
    assert [prompt.prompt_id for prompt in dropped] == ids[:2]


class ByteTokenizer:
    """A token is a byte."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")


def test_the_texts_of_tokens_are_the_text() -> None:
    """Pieces join to the whole text, and a character of several tokens stands at its last one."""
    bytes_of: Any = ByteTokenizer()
    for text in ("12 + 3", "caf\u00e9 \u20ac \U0001f600 end", "\u00e9"):
        ids = list(text.encode())
        pieces = [*token_texts(bytes_of, ids)]
        assert "".join(pieces) == text
        assert len(pieces) == len(ids)
    assert [*token_texts(bytes_of, list("\u20ac".encode()))] == ["", "", "\u20ac"]
    # The control: a cut character is shown as one, and bytes that are no text hold nothing back.
    assert "".join(token_texts(bytes_of, [97, 0xE2, 0x82])) == "a\N{REPLACEMENT CHARACTER}"
    assert "".join(token_texts(bytes_of, [0xFF] * 5 + [98])).endswith("b")


def test_missing_unreadable_and_short_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_prompts(PromptSet(file=tmp_path / "absent.jsonl"), TASK)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt_id": "\xe9"}')
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(PromptSet(file=tmp_path / "latin.jsonl"), TASK)
    with pytest.raises(DataError, match="num_prompts is 9, but the file has only 1 prompts"):
        read_prompts(PromptSet(file=write_lines(tmp_path / "one.jsonl", GOOD), num_prompts=9), TASK)


# ---- rendering ----


def test_render_gives_the_documented_prompt(tokenizer: Any) -> None:
    """27 tokens; expected ids are spelled out from the order of the vocabulary, not by the
    tokenizer.
    """
    expected = [SPECIAL.index(token) for token in ("<|im_start|>", "user", "\n")]
    expected += [
        len(SPECIAL) + "0123456789+-*=?".index(character) for character in "81+06+02+07+03-10=?"
    ]
    expected += [
        SPECIAL.index(token) for token in ("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
    ]
    (ids,) = render([PROMPT], tokenizer, context_length=256)
    assert len(ids) == 27
    assert ids.dtype == "int32"
    assert ids.tolist() == expected
    assert (
        decode(tokenizer, ids)
        == "<|im_start|>user\n81+06+02+07+03-10=?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_prompt_that_fills_the_context_is_named_with_its_length_and_the_limit(
    tokenizer: Any,
) -> None:
    render([PROMPT], tokenizer, context_length=28)
    with pytest.raises(
        DataError,
        match=r"prompt 'reg-81\+06\+02\+07\+03-10' has 27 tokens.*limit: fewer than 27 tokens",
    ):
        render([PROMPT], tokenizer, context_length=27)


def test_unknown_character_and_missing_template_are_named(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"prompt 'x' cannot be rendered"):
        render(
            [Prompt("x", ({"role": "user", "content": "why?"},), "other")],
            tokenizer,
            context_length=256,
        )
    without = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        render([PROMPT], without, context_length=256)


# ---- tokenizers ----


def test_vocabulary_order_and_lossless_round_trip(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(range(32))[:29] == [*SPECIAL, *"0123456789+-*=?:;,>c "]
    assert len(tokenizer) == 32
    every = decode(tokenizer, range(32))
    assert tokenizer(every, add_special_tokens=False)["input_ids"] == list(range(32))


def test_config_is_what_transformers_builds(architecture: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(architecture, local_files_only=True)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 749_632
    assert config.rope_parameters["rope_theta"] == 10_000
    assert not config.tie_word_embeddings


def test_stop_tokens_come_from_every_file(
    architecture: Path, tokenizer: Any, tmp_path: Path
) -> None:
    assert stop_token_ids(architecture, tokenizer) == (2,)
    folder = shutil.copytree(architecture, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert stop_token_ids(folder, tokenizer) == (0, 2)
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"generation_config.json: cannot be read as a JSON object"):
        stop_token_ids(folder, tokenizer)


def test_no_stop_token_at_all_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    without_end = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="the folder names no token that ends a response"):
        stop_token_ids(tmp_path, without_end)


def test_missing_and_damaged_tokenizers_are_refused(architecture: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"this folder has no tokenizer.json and no tokenizer_config.json"
    ):
        load_tokenizer(tmp_path)
    folder = shutil.copytree(architecture, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_code_inside_a_checkpoint_is_never_run(architecture: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(architecture, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    settings["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Evil: pass\n")
    tokenizer = load_tokenizer(folder)  # from tokenizer.json, which suffices
    assert decode(tokenizer, range(8)) == "".join(SPECIAL)
    assert not (tmp_path / "proof").exists()
