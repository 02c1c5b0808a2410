"""Several teachers, one a domain: who demonstrates what, who scores what, that each is checked on
its own, and what training knows of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd import pipeline
from lopd.artifacts import identify_model, read_manifest
from lopd.config import Config, load_config
from lopd.errors import ConsistencyError, DataError, EngineError
from lopd.objective import Distillation
from lopd.stages.context import StageContext
from lopd.stages.training import TrainingJob
from lopd.stages.training_data import distillation_objective, load_samples
from tests.cache.rollouts import publish_cache, some_responses
from tests.stand_ins import CONFIG, TINY_MODELS, Engine, StandIns, contents, write_project

STAGES = ("demonstrate", "sft", "rollout", "score")
DOMAINS = ("math", "code", "chat")  # chat has no teacher of its own
TEACHERS = """teacher = "teacher"
teachers = { math = "math_teacher", code = "code_teacher" }
"""


def write_prompts(path: Path, count: int, name: str) -> None:
    """Domains take turns, so that every shard of a careless writer would mix them."""

    def messages(index: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{index + 10:02d}+{len(name)}=?"}]

    rows = [
        {
            "prompt_id": f"{name}{index}",
            "messages": messages(index),
            "answer": "1",
            "domain": DOMAINS[index % 3],
        }
        for index in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    text = CONFIG.replace('teacher = "teacher"\n', TEACHERS)
    for name, count in (("sft", 24), ("opd", 30)):
        line = next(line for line in text.splitlines() if line.startswith(f"{name} = "))
        write_prompts(tmp_path / f"{name}.jsonl", count, "s" if name == "sft" else "roll")
        text = text.replace(line, f'{name} = {{ file = "{name}.jsonl" }}')
    path = write_project(tmp_path, text)
    for name, change in (("math_teacher", 1), ("code_teacher", 2)):
        shutil.copytree(TINY_MODELS / "teacher", tmp_path / name)
        about = json.loads((tmp_path / name / "config.json").read_text())
        # Another content makes it another model.
        (tmp_path / name / "config.json").write_text(
            json.dumps({**about, "rms_norm_eps": change * 1e-6 + 1e-7})
        )
    return load_config(path, [])


@dataclasses.dataclass
class Servers(StandIns):
    """Stand-ins that remember which model was served."""

    models: list[str] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def serve(self, context: StageContext, role: str, model: Path) -> Iterator[Engine]:
        self.models.append(model.name)
        with super().serve(context, role, model) as engine:
            yield engine


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Servers:
    made = Servers()
    made.install(monkeypatch)
    return made


def rows_of(folder: Path) -> dict[str, Counter[str]]:
    """How many rows of each domain (by prompt) each teacher has, over all shards; a shard holds one
    domain.
    """
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for path in sorted(folder.glob("shard-*.parquet")):
        table = pq.read_table(path)
        domains = [
            DOMAINS[int("".join(filter(str.isdigit, name))) % 3]
            for name in table.column("prompt_id").to_pylist()
        ]
        assert len(set(domains)) == 1, path
        for domain, teacher in zip(domains, table.column("teacher").to_pylist(), strict=True):
            found[teacher][domain] += 1
    return dict(found)


def weights(config: Config) -> dict[str, str]:
    models = config.models
    return {
        "math": identify_model(models.teachers["math"]).weights,
        "code": identify_model(models.teachers["code"]).weights,
        "chat": identify_model(models.teacher).weights,
    }


def test_each_domain_has_its_own_teacher_from_demonstrations_to_the_loss(
    config: Config, servers: Servers
) -> None:
    pipeline.run(config, STAGES)
    run = config.run.dir
    own = weights(config)
    assert len(set(own.values())) == 3
    assert rows_of(run / "demonstrate") == {own[domain]: Counter({domain: 8}) for domain in DOMAINS}
    assert rows_of(run / "score") == {own[domain]: Counter({domain: 10}) for domain in DOMAINS}
    assert servers.models == [
        "teacher",
        "code_teacher",
        "math_teacher",
        "model",
        "teacher",
        "code_teacher",
        "math_teacher",
    ]
    lineage = read_manifest(run / "score").lineage
    assert lineage["consistent"] is True
    assert {domain: entry["score_teacher"] for domain, entry in lineage["by_domain"].items()} == {
        "": own["chat"],
        "math": own["math"],
        "code": own["code"],
    }
    assert [entry["evidence"] for entry in lineage["by_domain"].values()] == ["proven"] * 3

    job = TrainingJob(
        "distill", config, run / "distill", run / "score", run / "sft" / "model", "checkpoint", 1, 0
    )
    samples = load_samples(job)
    objective = distillation_objective(job)
    assert isinstance(objective, Distillation)
    assert sorted(objective.teachers) == ["code", "math", "other"]
    for sample in samples:
        assert sample.key is not None
        assert sample.teacher_index is not None
        domain = DOMAINS[int(sample.key[0].removeprefix("roll")) % 3]
        assert objective.teachers[sample.teacher_index] == {"chat": "other"}.get(domain, domain)

    servers.models.clear()
    pipeline.run(config, STAGES)
    assert servers.models == [], "the same command again: all is reused"


def test_a_run_that_was_killed_goes_on_shard_by_shard(
    config: Config, servers: Servers, tmp_path: Path
) -> None:
    pipeline.run(config, STAGES)
    whole = {
        stage: contents(config.run.dir / stage, "shard-*.parquet")
        for stage in ("demonstrate", "rollout", "score")
    }
    again = load_config(tmp_path / "config.toml", [f"run.dir={tmp_path / 'again'}"])
    for _ in range(12):
        servers.engine = Engine(fail_after=(11, EngineError("killed")))
        with contextlib.suppress(EngineError):
            pipeline.run(again, STAGES)
            break
    else:
        raise AssertionError("it never came to an end")
    assert {stage: contents(again.run.dir / stage, "shard-*.parquet") for stage in whole} == whole


@pytest.mark.parametrize("swapped", [("math", "code"), ("math",), ("code",)])
def test_each_teacher_is_checked_on_its_own(
    config: Config, servers: Servers, tmp_path: Path, swapped: tuple[str, ...]
) -> None:
    """Demonstrations from elsewhere name the teacher of each domain; a scoring teacher of another
    domain, or of none, is refused, the others are not.
    """
    pipeline.run(config, STAGES[:1])
    folders = dict(config.models.teachers)
    other = {"math": folders["code"], "code": folders["math"]}
    teachers = {**folders, **{domain: other[domain] for domain in swapped}}
    changed = [f'models.teachers.{domain}="{folder}"' for domain, folder in teachers.items()]
    common = [
        f"sft.demonstrations={config.run.dir / 'demonstrate'}",
        f"run.dir={tmp_path / 'other'}",
    ]
    wrong = load_config(tmp_path / "config.toml", [*common, *changed])
    pipeline.run(wrong, STAGES[1:3])
    with pytest.raises(
        ConsistencyError, match="is not the teacher of the student's demonstrations"
    ):
        pipeline.run(wrong, STAGES[3:])
    assert not (wrong.run.dir / "score" / "manifest.json").exists(), "refused before any scores"
    right = load_config(tmp_path / "config.toml", [*common, f"run.dir={tmp_path / 'right'}"])
    pipeline.run(right, STAGES[1:])
    assert read_manifest(right.run.dir / "score").lineage["consistent"] is True
    alone = load_config(
        tmp_path / "config.toml", [*common, f"run.dir={tmp_path / 'alone'}", "models.teachers={}"]
    )
    pipeline.run(alone, STAGES[1:3])
    with pytest.raises(ConsistencyError, match="one of the teachers that made the demonstrations"):
        pipeline.run(alone, STAGES[3:])


def job_on(config: Config, data: Path) -> TrainingJob:
    return TrainingJob("distill", config, data, data, data, "checkpoint", 1, 0)


def test_mixed_teachers_without_a_column_are_refused_by_training(
    config: Config, tmp_path: Path
) -> None:
    publish_cache(tmp_path / "a", some_responses(4))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    second: dict[str, Any] = {**manifest["models"]["teacher"], "weights": "9" * 64}
    (tmp_path / "a" / "manifest.json").write_text(
        json.dumps({**manifest, "models": {**manifest["models"], "teachers.code": second}})
    )
    with pytest.raises(DataError, match="2 teachers, but no column with the name 'teacher'"):
        load_samples(job_on(config, tmp_path / "a"))


def test_a_row_of_a_teacher_that_the_manifest_does_not_name(
    config: Config, servers: Servers, tmp_path: Path
) -> None:
    pipeline.run(config, STAGES)
    damaged = shutil.copytree(config.run.dir / "score", tmp_path / "damaged")
    path = sorted(damaged.glob("shard-*.parquet"))[0]
    table = pq.read_table(path)
    table = table.set_column(
        table.column_names.index("teacher"), "teacher", pa.array(["0" * 64] * table.num_rows)
    )
    pq.write_table(table, path)
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="teacher 000000000000"):
        load_samples(job_on(config, damaged))


def findings(config: Config) -> list[str]:
    from lopd import checks

    return [
        str(finding)
        for name, finding in checks.check(config)
        if name in ("teachers", "refresh") and not isinstance(finding, str)
    ]


def test_what_lopd_check_says_of_them(config: Config, tmp_path: Path) -> None:
    assert findings(config) == []
    path = tmp_path / "config.toml"
    assert "no such folder" in findings(load_config(path, ['models.teachers.math="nowhere"']))[0]
    assert (
        "models.teachers.poetry: no prompt has this domain"
        in findings(load_config(path, ['models.teachers.poetry="teacher"']))[0]
    )
    other = shutil.copytree(TINY_MODELS / "teacher", tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert (
        "tokenizer of the student"
        in findings(load_config(path, ['models.teachers.math="other"']))[0]
    )


def test_lopd_check_knows_the_teacher_of_each_domains_demonstrations(
    config: Config, servers: Servers, tmp_path: Path
) -> None:
    from lopd.checks import lineage

    pipeline.run(config, STAGES[:1])
    given = f"sft.demonstrations={config.run.dir / 'demonstrate'}"
    path = tmp_path / "config.toml"
    assert list(lineage(load_config(path, [given]))) == [
        "made by models.teachers.math",
        "made by models.teachers.code",
    ]
    for wrong in ('models.teachers.math="code_teacher"', "models.teachers={}"):
        with pytest.raises(ConsistencyError):
            list(lineage(load_config(path, [given, wrong])))


def test_inspect_names_each_teacher_and_its_rows(
    config: Config, servers: Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    from lopd.cache.checks import check_cache
    from lopd.cache.statistics import inspect_cache
    from lopd.report.cache_view import show_inspection

    pipeline.run(config, STAGES)
    capsys.readouterr()
    for stage in ("demonstrate", "score"):
        assert [str(finding) for finding in check_cache(config.run.dir / stage)[0]] == []
    show_inspection(inspect_cache(config.run.dir / "score"))
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("teachers.math", "teachers.code"):
        assert f"{name}: {config.models.teachers[name.removeprefix('teachers.')]}: 10" in shown
    assert f"student {config.run.dir / 'sft' / 'model'}" in shown
