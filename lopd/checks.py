"""Everything that can be found wrong before anything starts: models, tokenizers, layouts, prompts, servers, folders, disk. Starts nothing, writes nothing."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lopd import consistency, processes
from lopd.artifacts import EXPORT_MARK, MANIFEST, check_replaceable, identify_model, read_manifest
from lopd.cache.reader import CacheReader
from lopd.config import Config, ForwardSection, TrainSection
from lopd.errors import ConfigError, DataError, LopdError
from lopd.lineage_checks import cache, checkpoint, demonstrations, lineage, teachers
from lopd.megatron.architecture import Architecture, context_problems, layout_problems, read_architecture, scorer_problems
from lopd.megatron.hf_files import CheckpointReader
from lopd.records import Prompt
from lopd.tasks import get_task
from lopd.tasks.prompts import load_prompts, read_prompts
from lopd.tasks.tokenizer import load_tokenizer, stop_token_ids

Finding = str | LopdError  # what was found right, or what is wrong
ALL_STAGES = ("demonstrate", "sft", "rollout", "score", "distill", "evaluate", "export")
SERVING = ("demonstrate", "rollout", "score", "distill", "evaluate")
TRAINING = ("sft", "distill", "evaluate")  # evaluate trains the equal-compute baseline
CORES = "CPU cores"
_ROLES = ("teacher", "student")


def check(config: Config, stage: str | None = None) -> Iterator[tuple[str, Finding]]:
    """Runs every check (or those that matter to one stage); yields (name, finding). A check that fails keeps no other from running."""
    for name, (function, stages) in CHECKS.items():
        if stage is None or stage in stages:
            try:
                for finding in function(config):
                    yield name, finding
            except LopdError as error:
                yield name, error


def check_all(config: Config, stage: str | None = None) -> None:
    """Raises the first error of all checks; what ``lopd run`` and each stage's verb do before anything else."""
    problems = [finding for _, finding in check(config, stage) if isinstance(finding, LopdError)]
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more: lopd check tells all)" if len(problems) > 1 else ""
        raise type(first)(first.what + more, where=first.where, limit=first.limit, remedy=first.remedy)


def as_rows(config: Config) -> list[dict[str, Any]]:
    """The checks as rows for a table or JSON: name, ok, finding."""
    return [{"name": name, "ok": not isinstance(finding, LopdError), "finding": str(finding)} for name, finding in check(config)]


def _attempt(function: Callable[[], str]) -> Finding:
    try:
        return function()
    except LopdError as error:
        return error


# ---- models ---------------------------------------------------------------------------------------------------------------------------------------


def teacher(config: Config) -> Iterator[Finding]:
    yield _model(config, "teacher")


def student(config: Config) -> Iterator[Finding]:
    yield _model(config, "student")


def _model(config: Config, role: str) -> str:
    """A folder of a known architecture whose safetensors hold every tensor of it."""
    folder: Path = getattr(config.models, role)
    if not folder.is_dir():
        raise ConfigError(f"models.{role}: no such folder", where=str(folder), remedy="give the folder of a Hugging Face checkpoint")
    architecture = read_architecture(folder)
    if not (role == "student" and config.sft.init == "random"):
        with CheckpointReader(folder, architecture):  # reads the headers
            pass
    return f"{architecture.family}, {architecture.num_layers} layers, vocabulary {architecture.vocab_size}"


def context(config: Config) -> Iterator[Finding]:
    """Both models' positions reach as far as prompt and response together."""
    for role in _ROLES:
        architecture = _architecture(config, role)
        if architecture is not None and config.sglang.context_length > architecture.max_position_embeddings:
            yield ConfigError(
                f"sglang.context_length = {config.sglang.context_length}",
                where=str(getattr(config.models, role)),
                limit=f"max_position_embeddings of the {role}: {architecture.max_position_embeddings}",
                remedy="lower sglang.context_length",
            )
    yield f"{config.sglang.context_length} tokens"


def _architecture(config: Config, role: str) -> Architecture | None:
    """None where it cannot be read, which ``teacher`` and ``student`` have said."""
    try:
        return read_architecture(getattr(config.models, role))
    except LopdError:
        return None


def tokenizers(config: Config) -> Iterator[Finding]:
    """The teacher's and the student's are the same, fit the vocabulary, and know how a response ends."""
    readable = {role: getattr(config.models, role) for role in _ROLES if _architecture(config, role) is not None}
    for role, folder in readable.items():
        yield _attempt(partial(_tokenizer, role, folder))
    if len(readable) == len(_ROLES):
        consistency.check_same_tokenizer(*(identify_model(folder) for folder in readable.values()))
        yield "teacher and student share one tokenizer"


def _tokenizer(role: str, folder: Path) -> str:
    tokenizer, size = load_tokenizer(folder), read_architecture(folder).vocab_size
    if len(tokenizer) > size:
        limit = f"vocab_size of config.json: {size}"
        raise DataError(f"the tokenizer of the {role} has {len(tokenizer)} tokens", where=str(folder), limit=limit, remedy="use the model's own tokenizer")
    ends = stop_token_ids(folder, tokenizer)
    if max(ends) >= size:
        raise DataError(f"end token {max(ends)} of the {role}", where=str(folder), limit=f"vocab_size {size}", remedy="mend generation_config.json")
    return f"{role}: {len(tokenizer)} tokens, responses end with {', '.join(map(str, ends))}"


# ---- layouts --------------------------------------------------------------------------------------------------------------------------------------


def layouts(config: Config) -> Iterator[Finding]:
    """The student divides by the layout of sft and of distill, and the machine can start their ranks."""
    architecture = _architecture(config, "student")
    for name, section in (("sft", config.sft), ("distill", config.distill)):
        problems = [] if architecture is None else [*layout_problems(architecture, section.parallel, where=f"{name}.parallel")]
        problems += _oversized(name, section, _longest(config, name))
        yield from problems
        if not problems:
            parallel = section.parallel
            yield f"{name}: {parallel.ranks} ranks (tensor {parallel.tensor}, pipeline {parallel.pipeline}, expert {parallel.expert})"


def _longest(config: Config, training: str) -> int:
    """Tokens that a sequence of a training may have: the context's; of distill fewer, where prompts.opd bounds its prompts."""
    prompt = config.prompts.opd.max_prompt_tokens if training == "distill" else None
    return config.sglang.context_length if prompt is None else min(config.sglang.context_length, prompt + config.rollout.max_new_tokens)


def scorer(config: Config) -> Iterator[Finding]:
    """The chosen engine gives what is asked of it, and the teacher divides by the layout of its ranks."""
    engine, forward = config.score.engine, config.score.forward
    problems: list[Finding] = [*scorer_problems(config.score, _architecture(config, "teacher"))]
    problems += _oversized("score.forward", forward, config.sglang.context_length) if engine == "megatron" else []
    yield from problems or [engine]


def _oversized(name: str, section: TrainSection | ForwardSection, context_length: int) -> Iterator[ConfigError]:
    most, unit = _devices()
    yield from context_problems(section.parallel, section.dtype, where=f"{name}.parallel")
    if section.parallel.ranks > most * section.parallel.nodes:
        what = f"{name}.parallel.ranks = {section.parallel.ranks}" + (f" on {section.parallel.nodes} nodes" if section.parallel.nodes > 1 else "")
        remedy = f"set {name}.parallel.ranks={most * section.parallel.nodes} or fewer"
        yield ConfigError(what, where="this machine", limit=f"{most} {unit}", remedy=remedy)
    if section.max_tokens_per_microbatch < context_length:
        what, limit = f"{name}.max_tokens_per_microbatch = {section.max_tokens_per_microbatch}", f"at least one full sequence: {context_length}"
        remedy = f"raise {name}.max_tokens_per_microbatch or lower sglang.context_length"
        yield ConfigError(what, where="sglang.context_length", limit=limit, remedy=remedy)


def _devices() -> tuple[int, str]:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), "GPUs"
    return len(os.sched_getaffinity(0)), CORES


def objective(config: Config) -> Iterator[Finding]:
    """The pieces of the loss go together, and the cache and the trainer give what they need."""
    from lopd.objective import RefreshRule, objective_from_config
    from lopd.objective.registry import AVAILABLE, TOP_K

    available = AVAILABLE | TOP_K if config.score.top_k else AVAILABLE
    if config.distill.cache is not None:
        columns = CacheReader(config.distill.cache).columns
        available = (AVAILABLE | TOP_K if "teacher_top_ids" in columns else AVAILABLE) - ({"sampling_logprobs"} - columns)
    yield str(objective_from_config(config.distill, available))
    tempered = config.rollout.temperature != 1 or config.rollout.top_p != 1
    if config.distill.objective.importance_cap is not None and tempered:
        yield f"importance weights undo the student's drift, not the rollouts' temperature {config.rollout.temperature} or top_p {config.rollout.top_p}"
    yield str(RefreshRule.from_config(config.distill))


def megatron(config: Config) -> Iterator[Finding]:
    """Fields beside the knobs exist in Megatron-Core, have their type, are nobody else's, and Megatron-Core takes them together with the rest."""
    tables = {name: section for name, section in (("sft", config.sft), ("distill", config.distill)) if section.megatron}
    for name, section in tables.items():
        with warnings.catch_warnings(action="ignore"):  # importing Megatron-Core tells at length of what is not installed
            yield _attempt(partial(_megatron_fields, f"{name}.megatron", section, _architecture(config, "student")))
    if not tables:
        yield "no fields beside the knobs"


def _megatron_fields(where: str, section: TrainSection, architecture: Architecture | None) -> str:
    from lopd.megatron import overrides
    from lopd.megatron.model import DTYPES, transformer_config
    from lopd.megatron.optimizer import optimizer_config
    from lopd.megatron.trainer import ddp_config

    fields = overrides.read_overrides(section.megatron, where=where)
    distributed = section.parallel.distributed_optimizer
    try:
        if architecture is not None:
            about: Any = {"parallel": section.parallel, "dtype": section.dtype, "recompute": section.recompute, "moe_aux_loss": section.moe_aux_loss}
            transformer_config(architecture, **about, overrides=fields.transformer)
        optimizer_config(section.optimizer, dtype=DTYPES[section.dtype], distributed=distributed, overrides=fields.optimizer)
        ddp_config(distributed, fields.distributed)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, limit=error.limit, remedy=error.remedy) from None
    return f"{where}: {', '.join(section.megatron)}"


# ---- prompts and demonstrations -------------------------------------------------------------------------------------------------------------------


def prompts(config: Config) -> Iterator[Finding]:
    """Every set can be read and rendered, and no held-out prompt is trained on."""
    task = get_task(config.task.name, config.task.options)
    try:
        tokenizer = load_tokenizer(config.models.student)
    except LopdError:  # ``tokenizers`` has said so
        tokenizer = None
    sets: dict[str, list[Prompt]] = {}
    for name in ("eval", "opd", *(("sft",) if config.sft.demonstrations is None and config.sft.checkpoint is None else ())):
        try:
            chosen, answers = getattr(config.prompts, name), name == "eval"
            if tokenizer is None:
                sets[name] = read_prompts(chosen, task, need_answers=answers)
            else:
                sets[name], _ = load_prompts(chosen, task, tokenizer, context_length=config.sglang.context_length, need_answers=answers)
        except LopdError as error:
            where = f"prompts.{name}: {error.where}" if error.where != "prompts" else f"prompts.{name}"
            yield type(error)(error.what, where=where, limit=error.limit, remedy=error.remedy)
            continue
        held_out = {_question(prompt) for prompt in sets["eval"]} if name != "eval" and "eval" in sets else set()
        shared = [prompt.prompt_id for prompt in sets[name] if _question(prompt) in held_out]
        if shared:
            what = f"{len(shared)} prompts are also held-out prompts of prompts.eval, first {shared[0]!r}"
            yield DataError(what, where=f"prompts.{name}", limit="0", remedy="remove them, or give the sets different seeds")
        else:
            yield f"{name}: {len(sets[name])}"


def _question(prompt: Prompt) -> str:
    return json.dumps([dict(message) for message in prompt.messages], sort_keys=True)


def verifier(config: Config) -> Iterator[Finding]:
    """This machine can verify answers: code that a model wrote needs a sandbox."""
    task = get_task(config.task.name, config.task.options)
    machine = getattr(task, "check_machine", None)
    yield str(machine()) if machine is not None else f"task {task.name}"


# ---- servers --------------------------------------------------------------------------------------------------------------------------------------


def server(config: Config) -> Iterator[Finding]:
    """What a server is started with, and what it is asked for."""
    from sglang_rollout.arguments import check_settings
    from sglang_rollout.shared_gpus import colocation_problems

    settings = config.sglang
    problems: list[LopdError] = [*_server_sizes(config), *_unsupported_sampling(config), *colocation_problems(config, on_gpu=_devices()[1] != CORES)]
    try:
        check_settings(settings, config.sync)
    except LopdError as error:
        problems.append(error)
    yield from problems
    if settings.port is not None and processes.port_taken(settings.port):
        remedy = "leave sglang.port out (a free one is taken) or end what listens there"
        yield ConfigError(f"sglang.port = {settings.port} is taken", where="127.0.0.1", remedy=remedy)
    elif not problems:
        yield f"port {settings.port} is free" if settings.port is not None else "takes a free port"


def _server_sizes(config: Config) -> Iterator[ConfigError]:
    settings = config.sglang
    limit, unit = _devices()
    if settings.tensor * settings.data * settings.replicas > limit:
        several = [name for name in ("tensor", "data", "replicas") if getattr(settings, name) > 1]
        what, remedy = " x ".join(f"sglang.{name} = {getattr(settings, name)}" for name in several), f"set sglang.{several[-1]}={limit} or fewer"
        yield ConfigError(what, where="this machine", limit=f"{limit} {unit}", remedy=remedy)
    if settings.expert > 1 and unit == CORES:
        what = f"sglang.expert = {settings.expert}: SGLang's plain-torch experts are not split"
        yield ConfigError(what, where="this machine", limit="1 without a GPU", remedy="set sglang.expert=1")
    for role in _ROLES:
        architecture = _architecture(config, role)
        if architecture is None:
            continue
        sizes = [(architecture.num_heads, settings.tensor, "number of attention heads", "sglang.tensor")]
        sizes += [(architecture.num_experts, settings.expert, "number of experts", "sglang.expert")] if settings.expert > 1 else []
        for number, divisor, what, key in sizes:
            if number == 0 or number % divisor:
                remedy = f"set {key} to a divisor of {number}" if number else f"set {key} to 1"
                yield ConfigError(f"{what} of the {role} ({number}) does not divide by {key} ({divisor})", where=key, remedy=remedy)
    if settings.max_total_tokens is not None and settings.max_total_tokens < settings.context_length:
        yield ConfigError(
            f"sglang.max_total_tokens = {settings.max_total_tokens}",
            where="sglang",
            limit=f"at least one full sequence: sglang.context_length = {settings.context_length}",
            remedy="raise sglang.max_total_tokens, or leave it out",
        )


def _unsupported_sampling(config: Config) -> Iterator[ConfigError]:
    for name in ("demonstrate", "rollout", "evaluate"):
        min_p = getattr(config, name).min_p
        if min_p > 0 and config.sglang.deterministic:
            what = f"{name}.min_p = {min_p} with sglang.deterministic: SGLang's seeded sampling cannot do it"
            yield ConfigError(what, where="sglang.deterministic", limit="0", remedy=f"set {name}.min_p=0 or sglang.deterministic=false")


# ---- folders and disk -----------------------------------------------------------------------------------------------------------------------------


def folders(config: Config) -> Iterator[Finding]:
    """The run directory and the export folder can be written, and nothing foreign is in them; what is published can be read."""
    yield _attempt(partial(_run_dir, config.run.dir))
    if config.export.dir is not None:
        yield _attempt(partial(_export_dir, config.export.dir))
    if config.run.dir.is_dir():
        for path in sorted(config.run.dir.glob(f"*/{MANIFEST}")):
            yield from (finding for finding in [_attempt(partial(_manifest, path.parent))] if isinstance(finding, LopdError))


def _run_dir(folder: Path) -> str:
    _check_writable(folder, "run.dir")
    if folder.is_dir():
        foreign = sorted(path.name for path in folder.iterdir() if path.name != "lost+found")
        if foreign and not _is_run(folder):
            what = f"run.dir holds files that no run made, first {foreign[0]!r}"
            raise ConfigError(what, where=str(folder), limit="an empty or new folder, or one of a former run", remedy="give another run.dir")
    return f"run.dir {folder}"


def _is_run(folder: Path) -> bool:
    """Whether lopd has worked there: its lock, a stage's manifest, or the keys that it remembers."""
    if (folder / ".lock").exists() or any((folder / stage / MANIFEST).exists() for stage in ALL_STAGES):
        return True
    try:
        return '"run.seed"' in (folder / "config.json").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def _export_dir(folder: Path) -> str:
    _check_writable(folder, "export.dir")
    check_replaceable(folder, EXPORT_MARK)
    return f"export.dir {folder}"


def _manifest(folder: Path) -> str:
    read_manifest(folder)
    return ""


def _check_writable(folder: Path, key: str) -> None:
    try:
        parent = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"{key}: {error.strerror}", where=f"{folder!s:.200}", remedy=f"give another {key}") from None
    if not parent.is_dir():
        raise ConfigError(f"{key}: a file is in the way", where=str(parent), remedy=f"give another {key}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{key} cannot be written", where=str(parent), remedy=f"give another {key}, or permit writing")


def disk(config: Config) -> Iterator[Finding]:
    """Room for the checkpoints to resume from (weights and two Adam moments in float32, each kept one), exports and syncs."""
    weights = sum(path.stat().st_size for path in config.models.student.glob("*.safetensors"))
    kept = config.sft.keep_checkpoints + config.distill.keep_checkpoints + 2  # one more of each while it is written
    needed = weights * (3 * kept + 6)
    try:
        parent = next(folder for folder in (config.run.dir, *config.run.dir.parents) if folder.is_dir())
    except OSError:  # ``folders`` has said so
        return
    free = shutil.disk_usage(parent).free
    if free < needed:
        remedy = "free space or give another run.dir"
        raise ConfigError(f"{free / 2**30:.2f} GiB free", where=str(parent), limit=f"about {needed / 2**30:.2f} GiB", remedy=remedy)
    yield f"{free / 2**30:.1f} GiB free, about {needed / 2**30:.2f} GiB needed"


Check = Callable[[Config], Iterator[Finding]]
CHECKS: dict[str, tuple[Check, tuple[str, ...]]] = {  # name -> function, and the stages to which it matters
    "teacher": (teacher, tuple(stage for stage in ALL_STAGES if stage != "sft")),  # SFT on demonstrations from elsewhere needs none
    "student": (student, ALL_STAGES),
    "teachers": (teachers, ("demonstrate", "rollout", "score", "distill")),
    "context": (context, SERVING),
    "tokenizers": (tokenizers, SERVING),
    "layouts": (layouts, TRAINING),
    "scorer": (scorer, ("score",)),
    "objective": (objective, ("distill",)),
    "megatron": (megatron, TRAINING),
    "prompts": (prompts, ("demonstrate", "rollout", "distill", "evaluate")),
    "verifier": (verifier, ("distill", "evaluate")),
    "demonstrations": (demonstrations, ("sft", "evaluate")),
    "lineage": (lineage, ("score",)),
    "checkpoint": (checkpoint, ("sft", "score", "evaluate")),
    "cache": (cache, ("distill",)),
    "server": (server, SERVING),
    "folders": (folders, ALL_STAGES),
    "disk": (disk, ALL_STAGES),
}
