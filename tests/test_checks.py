"""lopd check finds everything that is wrong at once and touches nothing; lopd run and each stage
refuse before they start anything.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopd import checks
from lopd.config import load_config
from lopd.errors import LopdError
from tests.checking import forbid_processes, wrong
from tests.stand_ins import (
    STAGES,
    Lopd,
    StandIns,
    command,
    contents,
    cut,
    write_project,
    write_prompts,
)

CORES = len(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the number of devices is that of CPU cores here"
)


@pytest.fixture
def lopd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lopd:
    return command(monkeypatch, capsys)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return forbid_processes(monkeypatch)


# ---- a project in which nothing is wrong ----


def test_a_right_project_passes_and_nothing_is_written_or_started(
    config: Path, lopd: Lopd, nothing_starts: StandIns
) -> None:
    before = contents(config.parent)
    shown = lopd("check", config).succeeded().out
    assert "wrong" not in shown
    assert {line.split()[1] for line in shown.splitlines()} >= {
        "teacher",
        "student",
        "tokenizers",
        "layouts",
        "prompts",
        "server",
        "folders",
        "disk",
    }
    rows = json.loads(lopd("check", config, "--json").succeeded().out)
    assert all(row["ok"] for row in rows)
    assert contents(config.parent) == before
    assert not nothing_starts.started


# ---- all at once ----


def test_everything_wrong_is_found_in_one_go_and_run_refuses(
    config: Path, lopd: Lopd, nothing_starts: StandIns
) -> None:
    # override -> what must be said of it
    mistakes = {
        "models.teacher=absent": "models.teacher: no such folder",
        "sft.parallel.expert=3": "number of experts (8) does not divide by expert (3)",
        "distill.parallel.tensor=4": "number of key-value heads (2) does not divide by tensor (4)",
        "distill.parallel.pipeline=2": "number of layers (3) does not divide by pipeline (2)",
        f"distill.parallel.ranks={256 * CORES}": (
            f"distill.parallel.ranks = {256 * CORES} is too large; limit: at most {CORES} CPU cores"
        ),
        "sft.max_tokens_per_microbatch=64": (
            "sft.max_tokens_per_microbatch = 64 is too small; "
            "limit: at least one full sequence: 128"
        ),
        "prompts.sft.seed=3": "also held-out prompts of prompts.eval",
        "prompts.opd.file=absent.jsonl": "absent.jsonl: no such file",
        f"sglang.tensor={32 * CORES}": (
            f"sglang.tensor = {32 * CORES} is too large; limit: at most {CORES} CPU cores"
        ),
        "sglang.expert=2": (
            "sglang.expert = 2: SGLang cannot split experts in plain torch; limit: exactly 1 on "
            "a machine without a GPU"
        ),
        "sglang.max_total_tokens=64": "sglang.max_total_tokens = 64",
        "sglang.extra_args.atention_backend=triton": (
            "unknown SGLang argument atention_backend; remedy: the nearest known argument is "
            "attention_backend"
        ),
        "evaluate.min_p=0.1": "evaluate.min_p = 0.1 cannot be used with sglang.deterministic",
        "run.dir=teacher": "run.dir holds files that no run made",
        "export.dir=student": "lopd did not make its files",
    }
    before = contents(config.parent)
    shown = lopd("check", config, *mistakes)
    assert shown.code == 2
    for said in mistakes.values():
        assert said in shown.out, said
    refused = lopd("run", config, *mistakes).refused(
        "models.teacher: no such folder", "more: lopd check shows all"
    )
    assert f"and {shown.out.count('wrong ') - 1} more" in refused
    assert contents(config.parent) == before
    assert not nothing_starts.started


def test_every_mistake_of_the_file_itself_is_listed(config: Path, lopd: Lopd) -> None:
    mistakes = ("distill.num_step=3", "sft.dtype=fp32", "rollout.top_p=2", "run.seed=true", "lr=1")
    shown = lopd("check", config, *mistakes)
    assert shown.code == 2
    assert shown.out.count("wrong") == len(mistakes) == len(shown.out.splitlines())
    for said in (
        "unknown key distill.num_step; remedy: the nearest known key is distill.num_steps",
        "'float32' or 'bfloat16'",
        "at most 1",
        "run.seed = true",
    ):
        assert said in shown.out
    lopd("run", config, *mistakes).refused("and 4 more", "lopd check shows all")


# ---- one by one ----


@pytest.mark.parametrize("stage", ["sft", "distill"])
@pytest.mark.parametrize(
    ("layout", "fragments"),
    [
        (
            {"tensor": 3, "ranks": 3},
            ["attention heads (4) does not divide by tensor (3)", "key-value heads (2) does"],
        ),
        (
            {"expert": 3, "ranks": 3},
            [
                (
                    "number of experts (8) does not divide by expert (3); remedy: set expert to a "
                    "divisor of 8, for example 1, 2"
                )
            ],
        ),
        (
            {"pipeline": 2, "ranks": 2},
            [
                (
                    "number of layers (3) does not divide by pipeline (2); remedy: set pipeline to "
                    "a divisor of 3, for example 1"
                )
            ],
        ),
        ({"expert_tensor": 7, "ranks": 7}, ["hidden size of an expert", "expert_tensor (7)"]),
        (
            {"tensor": 2, "ranks": 1},
            [
                (
                    "ranks = 1 is not a multiple of tensor * pipeline * context = 2; "
                    "remedy: set ranks to a multiple of 2"
                )
            ],
        ),
        (
            {"expert": 2, "ranks": 1},
            ["ranks = 1 is not a multiple of expert * expert_tensor * pipeline = 2"],
        ),
        (
            {"context": 2, "ranks": 2},
            [
                (
                    "context = 2 needs Transformer Engine, which does not import here; limit: "
                    "exactly 1 without Transformer Engine"
                )
            ],
        ),
        (
            {"ranks": CORES + 1},
            [
                (
                    f"parallel.ranks = {CORES + 1} is too large; limit: at most {CORES} CPU "
                    "cores; remedy: set"
                )
            ],
        ),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit(
    config: Path, stage: str, layout: dict[str, int], fragments: list[str]
) -> None:
    found = wrong(config, *(f"{stage}.parallel.{key}={value}" for key, value in layout.items()))
    assert found
    assert all(line.startswith("layouts | ") and stage in line for line in found)
    for fragment in fragments:
        assert any(fragment in line for line in found), f"{fragment!r} not in {found}"


def test_layouts_that_fit(config: Path) -> None:
    found = checks.layouts(
        load_config(
            config,
            [
                f"{stage}.parallel.{key}=2"
                for stage in ("sft", "distill")
                for key in ("ranks", "tensor", "expert")
            ],
        )
    )
    assert all(isinstance(finding, str) for finding in found) or CORES < 2


def other_tokenizer(folder: Path) -> None:
    path = folder / "student" / "tokenizer.json"
    table = json.loads(path.read_text())
    vocabulary = table["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(table))


def small_vocabulary(folder: Path) -> None:
    for role in ("teacher", "student"):
        edit_json(folder / role / "config.json", vocab_size=16)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_a_tensor(folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)


SPOILED: list[tuple[Callable[[Path], object], list[str]]] = [
    (
        lambda folder: shutil.rmtree(folder / "student"),
        ["student | ", "models.student: no such folder"],
    ),
    (
        lambda folder: (folder / "student" / "config.json").unlink(),
        ["student | ", "student/config.json: no such file"],
    ),
    (
        lambda folder: cut(folder / "teacher" / "config.json"),
        ["teacher | ", "teacher/config.json: cannot be read"],
    ),
    (
        lambda folder: (folder / "teacher" / "config.json").write_text("[]"),
        ["teacher | ", "teacher/config.json"],
    ),
    (
        lambda folder: edit_json(folder / "student" / "config.json", model_type="gpt2"),
        ["student | ", "model_type 'gpt2' is not supported; limit: one of"],
    ),
    (
        lambda folder: edit_json(folder / "teacher" / "config.json", max_position_embeddings=64),
        ["context | ", "context_length = 128 is too large; limit:", "of the teacher: 64"],
    ),
    (
        lambda folder: (folder / "teacher" / "model.safetensors").unlink(),
        ["teacher | ", "teacher/model.safetensors: no such file"],
    ),
    (
        lambda folder: cut(folder / "teacher" / "model.safetensors"),
        ["teacher | ", "teacher/model.safetensors: the file is damaged"],
    ),
    (
        lambda folder: cut(folder / "student" / "model.safetensors", to=0.0),
        ["student | ", "student/model.safetensors: the file is damaged"],
    ),
    (without_a_tensor, ["student | ", "1 tensors are missing, for example model.norm.weight"]),
    (
        lambda folder: edit_json(folder / "student" / "config.json", num_hidden_layers=4),
        ["student | ", "tensors are missing, for example model.layers.3."],
    ),
    (
        lambda folder: edit_json(folder / "student" / "config.json", moe_intermediate_size=96),
        ["student | ", "but config.json gives"],
    ),
    (
        other_tokenizer,
        [
            "tokenizers | ",
            "tokenizer of the student",
            "differs from the tokenizer of the teacher; limit: the same sha256 of tokenizer.json",
        ],
    ),
    (
        small_vocabulary,
        [
            "tokenizers | ",
            (
                "the tokenizer of the teacher has 32 tokens; limit: at most vocab_size of "
                "config.json: 16"
            ),
        ],
    ),
    (
        lambda folder: (folder / "teacher" / "tokenizer.json").unlink(),
        ["tokenizers | ", "teacher: this folder has no tokenizer.json"],
    ),
    (
        lambda folder: cut(folder / "student" / "tokenizer.json"),
        ["tokenizers | ", "student: the tokenizer cannot be loaded"],
    ),
    (
        lambda folder: cut(folder / "student" / "tokenizer_config.json"),
        ["tokenizers | ", "student"],
    ),
    (
        lambda folder: edit_json(folder / "teacher" / "generation_config.json", eos_token_id=99),
        [
            "tokenizers | ",
            "the end token 99 of the teacher has no row in the embeddings of every model; limit",
        ],
    ),
]


@pytest.mark.parametrize(
    ("spoil", "fragments"), SPOILED, ids=[fragments[-1][:50] for _, fragments in SPOILED]
)
def test_a_spoiled_model(
    config: Path, spoil: Callable[[Path], object], fragments: list[str]
) -> None:
    spoil(config.parent)
    found = wrong(config)
    assert any(all(fragment in line for fragment in fragments) for line in found), found


QUESTION = {"prompt_id": "a", "question": "81+06=?", "answer": "87"}
OTHER = {"prompt_id": "b", "question": "11+06=?", "answer": "17"}


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([], ["the prompt set is empty"]),
        (
            [QUESTION, {**OTHER, "prompt_id": "a"}],
            ["eval.jsonl:2: the prompt_id 'a' is not unique: it is also on line 1"],
        ),
        (
            [QUESTION, {**OTHER, "question": "1+" * 100}],
            [
                "prompt 'b' has",
                (
                    "so no token is left for a response; limit: fewer than 128 tokens "
                    "(sglang.context_length)"
                ),
            ],
        ),
        (
            [QUESTION, {"prompt_id": "b", "question": "11+06=?"}],
            ["eval.jsonl:2: prompt 'b' has no answer"],
        ),
        ([QUESTION, {"prompt_id": 7, "question": "x"}], ["eval.jsonl:2: prompt_id is 7"]),
        ([{**QUESTION, "question": "Was ist das?"}], ["prompt 'a' cannot be rendered"]),
    ],
    ids=lambda value: value[-1][:40] if value and isinstance(value[-1], str) else None,
)
def test_a_prompts_file_that_cannot_be_used(
    config: Path, rows: list[dict[str, Any]], fragments: list[str]
) -> None:
    write_prompts(config.parent / "eval.jsonl", rows)
    (line,) = wrong(config, 'prompts.eval={file="eval.jsonl"}')
    assert line.startswith("prompts | prompts.eval: ")
    for fragment in fragments:
        assert fragment in line


def test_prompts_that_are_trained_on_and_held_out(config: Path) -> None:
    write_prompts(config.parent / "eval.jsonl", [QUESTION])
    write_prompts(
        config.parent / "opd.jsonl", [OTHER, {**QUESTION, "prompt_id": "other name, same question"}]
    )
    (line,) = wrong(
        config,
        'prompts.eval={file="eval.jsonl"}',
        'prompts.opd={file="opd.jsonl"}',
        "distill.batch_size=1",
    )
    assert (
        "prompts.opd: 1 prompts are also held-out prompts of prompts.eval, for example "
        "'other name, same question'"
    ) in line
    assert wrong(config, 'prompts.eval={file="eval.jsonl"}') == [], "the control"


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        (
            "task.name=arithmetic",
            (
                "task.name: unknown task 'arithmetic'; "
                "remedy: the nearest known one is register_arithmetic"
            ),
        ),
        (
            "task.options.num_operation=3",
            "no option num_operation; remedy: the nearest known one is num_operations",
        ),
        ("task.options.num_operations=99", "task.options.num_operations"),
        ("prompts.sft={seed=1}", "prompts.sft: a prompt set has neither file nor num_prompts"),
        (
            "prompts.sft.seed=999",
            "seed 999 of generated prompts is out of range; limit: at least 0 and at most 255",
        ),
        (
            "prompts.sft.format=gsm8k",
            (
                "prompts.sft: format gsm8k, fields or where describe a file, but there is no "
                "file: the task generates the prompts"
            ),
        ),
        (
            "prompts.sft.num_prompts=10000001",
            "num_prompts = 10000001 is too large; limit: at most 10,000,000; remedy: lower",
        ),
    ],
)
def test_a_task_or_prompt_set_that_does_not_exist(
    config: Path, override: str, fragment: str
) -> None:
    assert any(fragment in line for line in wrong(config, override))


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken_matters_to_the_stages_that_serve(
    config: Path, lopd: Lopd, listening: int, nothing_starts: StandIns
) -> None:
    (line,) = wrong(config, f"sglang.port={listening}")
    assert (
        f"server | 127.0.0.1: sglang.port = {listening} is taken; remedy: remove sglang.port"
        in line
    )
    for verb in ("run", "demonstrate"):
        lopd(verb, config, f"sglang.port={listening}").refused(
            f"sglang.port = {listening} is taken"
        )
    lopd("export", config, f"sglang.port={listening}").refused(
        "export needs distill, which is absent"
    )
    assert not nothing_starts.started


SERVER = "http://127.0.0.1:30001"
ANOTHER = "http://127.0.0.1:30002"


def test_ranks_may_share_cores_where_a_trial_on_a_cpu_is_meant(config: Path) -> None:
    many = ("sft.parallel={ranks=64}", f"sglang.replicas={2 * CORES}")
    assert len(wrong(config, *many)) == 2
    assert wrong(config, *many, "launch.device=cpu") == []


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        *(
            ([f"sglang.student_urls=['{url}']"], [f"sglang.student_urls: {url!r} is not a URL"])
            for url in ("http://", "http://a b:1", "http://[::1", "http://h:99999")
        ),
        (
            ["sglang.teacher_urls=['http://me:secret@127.0.0.1:1']"],
            [
                "the URL of a server must not contain a user name or a password",
                "LOPD_SGLANG_KEY",
            ],
        ),
        (
            [f"sglang.student_urls=['{SERVER}', '{SERVER}/']"],
            ["is in the list 2 times; limit: each server exactly once"],
        ),
        (
            [f"sglang.student_urls=['{SERVER}']", f"sglang.teacher_urls=['{SERVER}/']"],
            ["is also in sglang.teacher_urls; limit: exactly one model per server"],
        ),
        (
            [f"sglang.teacher_urls=['{SERVER}']", "models.teachers.register_arithmetic=teacher"],
            [
                (
                    "sglang.teacher_urls and models.teachers cannot be used together; limit: "
                    "sglang.teacher_urls are servers of exactly one"
                )
            ],
        ),
        (
            ["sync.host=auto"],
            [
                (
                    'sync.host = "auto" has no effect with sync.transport = "disk"; limit: '
                    'only with sync.transport = "distributed"; remedy: remove sync.host'
                )
            ],
        ),
        (
            ["sync.host=192.0.2.1", "sync.transport=distributed"],
            ["sync.host = 192.0.2.1: no network interface of this machine has this address"],
        ),
        (
            [f"sglang.replicas={2 * CORES}"],
            [
                (
                    f"sglang.replicas = {2 * CORES} is too large; limit: at most {CORES} CPU "
                    f"cores; remedy: set sglang.replicas={CORES} or fewer"
                )
            ],
        ),
        (
            ["sglang.tensor=2", f"sglang.replicas={2 * CORES}"],
            [f"remedy: set sglang.replicas={CORES // 2} or fewer"] if CORES > 1 else [],
        ),
        (
            ["score.top_k=33"],
            [
                (
                    "score.top_k = 33 is too large; limit: at most the vocabulary of the "
                    "teacher: 32; remedy: lower score.top_k"
                )
            ],
        ),
    ],
    ids=str,
)
def test_servers_and_transports_that_do_not_go_together(
    config: Path, overrides: list[str], fragments: list[str]
) -> None:
    (line,) = wrong(config, *overrides)
    for fragment in fragments:
        assert fragment in line


def test_servers_and_transports_that_do(config: Path) -> None:
    both = [
        f"sglang.student_urls=['{SERVER}/']",
        f"sglang.teacher_urls=['{ANOTHER}', 'https://[::1]:30003']",
    ]
    assert (
        wrong(config, *both, "sync.transport=distributed", "sync.host=127.0.0.2", "score.top_k=32")
        == []
    )


def test_context_ranks_of_the_scorer_need_transformer_engine(config: Path) -> None:
    forward = ["score.forward.parallel.context=2", "score.forward.parallel.ranks=2"]
    assert any(
        "score.forward.parallel: context = 2 needs Transformer Engine" in line
        for line in wrong(config, "score.engine=megatron", *forward)
    )
    assert wrong(config, *forward) == [], (
        "the control: SGLang scores, and these ranks are never started"
    )


def test_what_can_be_downloaded_is_said_to_be(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPD_HUB", str(config.parent / "hub"))
    found = wrong(
        config,
        "models.teacher=hf://Qwen/Qwen3-8B@49e3418",
        "prompts.opd={file='hf://datasets/a/b@main/c.jsonl'}",
    )
    assert any(
        line.endswith("remedy: lopd fetch CONFIG, or lopd fetch hf://Qwen/Qwen3-8B@49e3418")
        for line in found
    ), found
    assert any(
        "hf://datasets/a/b@main is not downloaded yet; remedy: lopd fetch CONFIG, or lopd fetch "
        "hf://datasets/a/b@main" in line
        for line in found
    ), found
    assert not any(
        "lopd fetch" in line
        for line in wrong(config, "models.teacher=absent", "prompts.opd={file='absent.jsonl'}")
    ), "the control"


def test_what_cannot_be_used_together(config: Path) -> None:
    refreshed = wrong(config, "distill.cache=absent", "distill.refresh.every=2")
    assert any(
        (
            "distill.refresh and distill.cache cannot be used together: fresh rollouts are "
            "added to those of the score stage"
        )
        in line
        for line in refreshed
    ), "said before the SFT student is there"
    given = [
        "sft.checkpoint=student",
        "sft.declared_teacher=teacher",
        "evaluate.equal_compute_baseline=false",
    ]
    assert wrong(config, *given) == []
    (line,) = wrong(config, *given, "sft.init=random")
    assert (
        'sft.init = "random" and sft.checkpoint cannot be used together: nothing is '
        "trained from a given checkpoint"
    ) in line


def test_folders_that_cannot_be_written_or_are_not_ours(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for override, fragment in (
        ("run.dir=file", "run.dir cannot be created: a file has this path"),
        ("run.dir=file/run", "run.dir cannot be created: a file has this path"),
        ("run.dir=full", "run.dir holds files that no run made, for example 'thesis.tex'"),
        ("run.dir=.", "run.dir holds files that no run made, for example 'config.toml'"),
        ("export.dir=file", "export.dir cannot be created: a file has this path"),
        (
            "export.dir=full",
            "the folder has no lopd.json, so lopd did not make its files and does not replace them",
        ),
    ):
        found = wrong(config, override)
        assert len(found) == 1, found
        assert fragment in found[0]
    (tmp_path / "empty").mkdir()
    assert wrong(config, "run.dir=empty", "export.dir=empty/export") == [], "the control"


def test_demonstrations_from_elsewhere(config: Path) -> None:
    assert any(
        "demonstrations | " in line and "absent: there is no manifest.json" in line
        for line in wrong(config, "sft.demonstrations=absent")
    )


def test_too_little_room(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    )  # type: ignore[attr-defined]
    (line,) = wrong(config)
    assert line.startswith("disk | ")
    assert "the disk has only 1 MiB free; limit: at least about 11 MiB" in line


def test_every_check_belongs_to_stages_that_exist() -> None:
    assert checks.ALL_STAGES == STAGES
    for name, (_, stages) in checks.CHECKS.items():
        assert set(stages) <= set(STAGES), name


def test_one_failing_check_keeps_no_other_from_running(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> NoReturn:
        raise LopdError("broken", where="here", remedy="mend it")

    monkeypatch.setitem(checks.CHECKS, "teacher", (failing, STAGES))
    names = [name for name, _ in checks.check(load_config(config))]
    assert names[0] == "teacher"
    assert set(names) >= {"layouts", "prompts", "disk"}
