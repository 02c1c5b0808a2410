"""lopd cache import: transcripts of agents, as messages or as ids with a mask."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd.artifacts import identify_model, read_manifest
from lopd.cache.checks import check_cache
from lopd.cache.reader import CacheReader
from lopd.cache.transcript_import import import_transcripts
from lopd.errors import ArtifactError, DataError
from lopd.records import Response
from lopd.tasks.rendering import ConversationRenderer
from lopd.tasks.tokenizer import decode, load_tokenizer
from lopd.tasks.turns import render_between
from tests.stand_ins import TINY_MODELS, Result, command, write_prompts

STUDENT = TINY_MODELS / "student"
END = 2
# The tool quotes what the model answers before and after it, as tools do.
CONVERSATION = [
    {"role": "user", "content": "81+06-02=?"},
    {"role": "assistant", "content": "81+06=87"},
    {"role": "user", "content": "81+06=87"},
    {"role": "assistant", "content": "87"},
    {"role": "user", "content": "87-02=85"},
    {"role": "assistant", "content": "85"},
]
# <|im_start|>user\n81+06-02=?<|im_end|>\n<|im_start|>assistant\n by hand.
PROMPT = [1, 5, 7, 16, 9, 18, 8, 14, 19, 8, 10, 21, 22, 2, 7, 1, 6, 7]
IDS = {
    "prompt_id": "p",
    "prompt_ids": PROMPT,
    "token_ids": [16, 9, 2, 7, 1, 5, 7, 16, 2, 7, 1, 6, 7, 17, 2],
    "loss_mask": [True] * 3 + [False] * 10 + [True] * 2,
    "sampling_logprobs": [-0.5, -0.4, -0.1] + [None] * 10 + [-0.2, -0.3],
    "teacher_logprobs": [-0.3, -0.2, -0.1] + [0.0] * 10 + [-0.2, -0.1],
}


@pytest.fixture
def lopd(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    return command(monkeypatch, capsys)


def import_rows(folder: Path, rows: list[Any], **named: Any) -> list[Response]:
    write_prompts(folder / "rows.jsonl", rows)
    import_transcripts(folder / "rows.jsonl", folder / "out", STUDENT, **named)
    reader = CacheReader(folder / "out", without_sampling=True)
    return [response for response, _ in reader.rows()]


def texts_of(response: Response) -> list[str]:
    """The texts of the runs of tokens with loss."""
    tokenizer = load_tokenizer(STUDENT)
    assert response.loss_mask is not None
    runs: list[list[int]] = []
    for place, token in enumerate(response.token_ids.tolist()):
        if response.loss_mask[place]:
            if place == 0 or not response.loss_mask[place - 1]:
                runs.append([])
            runs[-1].append(token)
    return [decode(tokenizer, run) for run in runs]


def test_messages_carry_loss_where_the_assistant_wrote(tmp_path: Path) -> None:
    (response,) = import_rows(tmp_path, [{"messages": CONVERSATION}])
    assert response.prompt_ids.tolist() == PROMPT
    # Each answer with its end token. The same text in a message of the tool carries none.
    assert texts_of(response) == ["81+06=87<|im_end|>", "87<|im_end|>", "85<|im_end|>"]
    assert response.token_ids[-1] == END
    assert response.finish_reason == "stop"
    whole = decode(load_tokenizer(STUDENT), response.token_ids)
    assert whole.count("81+06=87") == 2
    manifest = read_manifest(tmp_path / "out")
    assert manifest.kind == "rollouts"
    assert manifest.extra["num_turns"] == 3
    assert any("sampled token ids" in reason for reason in manifest.extra["lacks"])
    assert not [*check_cache(tmp_path / "out")[0]]


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    one = {"prompt_id": "a", "messages": CONVERSATION}
    longer = {
        "prompt_id": "b",
        "messages": [*CONVERSATION, {"role": "user", "content": "7"}],
    }
    first, second = import_rows(tmp_path, [one, longer])
    np.testing.assert_array_equal(first.token_ids, second.token_ids)


def test_ids_stay_what_they_are(tmp_path: Path) -> None:
    write_prompts(tmp_path / "rows.jsonl", [IDS, {**IDS, "finish_reason": "length"}])
    import_transcripts(
        tmp_path / "rows.jsonl",
        tmp_path / "out",
        STUDENT,
        student=STUDENT,
        teacher=TINY_MODELS / "teacher",
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.kind == "teacher_cache"
    assert manifest.models["student"].weights == identify_model(STUDENT).weights
    assert manifest.lineage["consistent"] is False
    assert manifest.extra["lacks"] == []
    rows = [*CacheReader(tmp_path / "out").scored_rows()]
    assert [response.key for response, _ in rows] == [("p", 0), ("p", 1)]
    assert [response.finish_reason for response, _ in rows] == ["stop", "length"]
    response, scores = rows[0]
    assert scores is not None
    assert response.token_ids.tolist() == IDS["token_ids"]
    assert response.loss_mask is not None
    assert response.loss_mask.tolist() == IDS["loss_mask"]
    np.testing.assert_allclose(response.sampling_logprobs[[0, 3, 14]], [-0.5, 0.0, -0.3])
    np.testing.assert_allclose(scores.teacher_logprobs[[0, 3, 14]], [-0.3, 0.0, -0.1])
    assert not [*check_cache(tmp_path / "out")[0]]


def test_parquet_is_read_too_and_a_killed_import_goes_on(tmp_path: Path) -> None:
    rows = [{"prompt_id": f"p{n}", "messages": CONVERSATION} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_prompts(tmp_path / "rows.jsonl", rows)
    by_line = import_transcripts(tmp_path / "rows.jsonl", tmp_path / "lines", STUDENT, batch_rows=2)
    for _ in range(2):
        by_column = import_transcripts(
            tmp_path / "rows.parquet", tmp_path / "columns", STUDENT, batch_rows=2
        )
        (tmp_path / "columns" / "manifest.json").unlink()
        (tmp_path / "columns" / "shard-00001.parquet").unlink()
    assert [shard.sha256 for shard in by_line.shards] != []
    assert [shard.rows for shard in by_column.shards] == [2, 2, 1]
    assert by_column.rows == by_line.rows


def test_an_import_with_another_template_is_another_one(tmp_path: Path) -> None:
    """Half of the rows by one template and half by another would be no error of any row."""
    write_prompts(tmp_path / "rows.jsonl", [{"messages": CONVERSATION}])
    before = import_transcripts(tmp_path / "rows.jsonl", tmp_path / "out", STUDENT)
    same = import_transcripts(tmp_path / "rows.jsonl", tmp_path / "out", STUDENT)
    assert same.fingerprint == before.fingerprint
    student = with_template(tmp_path, ORIGINAL.replace("'\\n'", "'\\n\\n'"))
    with pytest.raises(ArtifactError):
        import_transcripts(tmp_path / "rows.jsonl", tmp_path / "out", student)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"loss_mask": None}, "loss_mask is missing"),
        ({"loss_mask": [True] * 14}, "loss_mask has 14 values for 15 token_ids"),
        ({"loss_mask": [False] * 15}, "loss_mask is false everywhere"),
        ({"loss_mask": [2] * 15}, "loss_mask must be a list of true and false"),
        ({"teacher_logprobs": [-0.1] * 16}, "teacher_logprobs has 16 values for 15 token_ids"),
        ({"sampling_logprobs": [-0.1] * 3}, "sampling_logprobs has 3 values for 15 token_ids"),
        (
            {"teacher_logprobs": [None, *IDS["teacher_logprobs"][1:]]},
            "teacher_logprobs is None at token 0, which carries loss",
        ),
        ({"teacher_logprobs": [0.7] * 15}, "values above 0 in teacher_logprobs"),
        ({"token_ids": [*IDS["token_ids"][:14], 32]}, "token_ids has the token id 32"),
        ({"prompt_ids": [151_644, 872]}, "prompt_ids has the token id 151644"),
        ({"prompt_ids": []}, "prompt_ids must be a list of at least one token id"),
        ({"messages": CONVERSATION}, "either messages or token_ids"),
        ({"sampling_logprobs": None}, "this row has no sampling_logprobs, unlike the first one"),
        ({"teacher_logprobs": None}, "this row has no teacher_logprobs, unlike the first one"),
        ({"finish_reason": "ended"}, "finish_reason 'ended'"),
        ({"sample_index": 0}, "the same prompt_id and sample_index twice"),
        ({"token_ids": None}, "either messages or token_ids"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_its_place(
    lopd: Callable[..., Result], tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    """The first row is right, so the place is the second line."""
    write_prompts(tmp_path / "rows.jsonl", [IDS, {**IDS, **change}])
    refused = lopd(
        "cache", "import", tmp_path / "rows.jsonl", "--tokenizer", STUDENT, "--out", tmp_path / "o"
    )
    line = refused.refused(expected)
    assert "rows.jsonl:2" in line or "p/0" in line or "p/1" in line
    # Nothing takes an import for whole that was refused.
    assert not read_manifest(tmp_path / "o").complete


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": CONVERSATION[:1]}, "there is no message of the assistant"),
        ({"messages": CONVERSATION[1:]}, "the first message is from the assistant"),
        ({"messages": "81+06"}, "messages must be a list of objects with a role"),
        ({"messages": [{"content": "8"}]}, "messages must be a list of objects with a role"),
        (
            {"messages": CONVERSATION, "loss_mask": [True]},
            "loss_mask is given for messages, but belongs to token_ids",
        ),
        ({"messages": [{"role": "user"}, CONVERSATION[1]]}, "the chat template refuses"),
        ([1, 2], "the row is no JSON object"),
    ],
)
def test_messages_that_cannot_be_used(tmp_path: Path, row: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        import_rows(tmp_path, [row])


def with_template(folder: Path, template: str) -> Path:
    student = shutil.copytree(STUDENT, folder / "model")
    (student / "chat_template.jinja").write_text(template)
    return student


ORIGINAL = (STUDENT / "chat_template.jinja").read_text()
# As templates of thinking models do: only the last answer keeps what stands before </think>.
FORGETS = ORIGINAL.replace(
    "message['content'] +",
    "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +",
)
NO_END = ORIGINAL.replace("<|im_end|>", "<|endoftext|>").replace("<|endoftext|>", ";")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (FORGETS, "it writes the first 2 messages in another way when others follow"),
        (NO_END, "it ends an answer with none of the end tokens"),
    ],
)
def test_a_template_that_does_not_only_append_is_refused_in_one_line(
    lopd: Callable[..., Result], tmp_path: Path, template: str, expected: str
) -> None:
    assert template != ORIGINAL
    thinking = [
        {**one, "content": f"<think>1+1=2</think>{one['content']}"}
        if one["role"] == "assistant"
        else one
        for one in CONVERSATION
    ]
    write_prompts(tmp_path / "rows.jsonl", [{"messages": thinking}])
    arguments = ("cache", "import", tmp_path / "rows.jsonl", "--out", tmp_path / "o")
    student = with_template(tmp_path, template)
    refused = lopd(*arguments, "--tokenizer", student)
    line = refused.refused("cannot be used turn by turn", expected, "rows.jsonl:1")
    assert "give token_ids and loss_mask" in line
    # The control: the template that only appends takes the same conversation.
    lopd(*arguments, "--tokenizer", STUDENT).succeeded()


def test_a_conversation_grown_turn_by_turn_has_the_ids_of_the_whole(tmp_path: Path) -> None:
    """What an environment appends is what an import finds, so both have one form."""
    (response,) = import_rows(tmp_path, [{"messages": CONVERSATION}])
    tokenizer = load_tokenizer(STUDENT)
    renderer = ConversationRenderer(tokenizer)
    ids = renderer.ids(CONVERSATION[:1], to_answer=True).tolist()
    for place in (1, 3, 5):
        text = CONVERSATION[place]["content"]
        ids += [*tokenizer.encode(text, add_special_tokens=False), END]
        if place < 5:
            between = render_between(
                renderer, CONVERSATION[: place + 1], CONVERSATION[place + 1], [END], where="test"
            )
            assert between.end_id == END
            ids += between.token_ids.tolist()
    assert ids == [*response.prompt_ids.tolist(), *response.token_ids.tolist()]


def test_the_verbs(lopd: Callable[..., Result], tmp_path: Path) -> None:
    write_prompts(tmp_path / "rows.jsonl", [{"messages": CONVERSATION}])
    shown = lopd(
        "cache",
        "import",
        tmp_path / "rows.jsonl",
        "--tokenizer",
        STUDENT,
        "--as",
        "demonstrations",
        "--teacher",
        TINY_MODELS / "teacher",
        "--out",
        tmp_path / "out",
    ).succeeded()
    assert "lacks sampled token ids" in shown.out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.kind == "demonstrations"
    teacher = identify_model(TINY_MODELS / "teacher").weights
    assert manifest.lineage["sft_teacher"] == teacher
    assert manifest.lineage["evidence"] == "declared"
    shown = lopd("cache", "inspect", tmp_path / "out", "--sample", "1").succeeded()
    assert "in 3.00 turns per response" in shown.out
    figures = json.loads(lopd("cache", "inspect", tmp_path / "out", "--json").succeeded().out)
    assert figures["loss_tokens"] == manifest.extra["num_loss_tokens"]
    reference = tmp_path / "reference.parquet"
    pq.write_table(pa.table({"prompt": ["1"], "metadata": [{"response_tokens": [1]}]}), reference)
    lopd(
        "cache",
        "import",
        reference,
        "--tokenizer",
        STUDENT,
        "--as",
        "demonstrations",
        "--out",
        tmp_path / "no",
    ).refused("--as has no effect for the file of the reference code")


QWEN3 = Path(os.environ.get("LOPD_TEST_DATA", "absent")) / "qwen3_tokenizer"
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
THINKING = [
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n", "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "<think>\nfive\n</think>\n\nIt is 5."},
]


@pytest.mark.skipif(
    not QWEN3.is_dir(), reason="LOPD_TEST_DATA names no folder with qwen3_tokenizer"
)
def test_the_template_of_qwen3(tmp_path: Path) -> None:
    """It keeps the thinking of answers where a tool has replied, and not where a user has."""
    write_prompts(tmp_path / "rows.jsonl", [{"messages": THINKING}])
    import_transcripts(tmp_path / "rows.jsonl", tmp_path / "tool", QWEN3)
    reader = CacheReader(tmp_path / "tool", without_sampling=True)
    ((response, _),) = reader.rows()
    assert response.loss_mask is not None
    tokenizer = load_tokenizer(QWEN3)
    learnt = decode(tokenizer, response.token_ids[response.loss_mask])
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    assert learnt == (
        f"<think>\nadd\n</think>\n\n{call}<|im_end|><think>\nfive\n</think>\n\nIt is 5.<|im_end|>"
    )
    others = decode(tokenizer, response.token_ids[~response.loss_mask])
    assert others == (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    by_user = [*THINKING[:2], {"role": "user", "content": "5"}, THINKING[3]]
    write_prompts(tmp_path / "rows.jsonl", [{"messages": by_user}])
    with pytest.raises(DataError, match="it writes the first 2 messages in another way"):
        import_transcripts(tmp_path / "rows.jsonl", tmp_path / "user", QWEN3)
