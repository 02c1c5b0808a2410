"""Knobs of what goes into a run: the folder, the models, the task and the prompts.

Every knob is one block: name, type, default, bounds and a sentence. ``lopd knobs`` prints them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lopd.config.base import SPEED_ONLY, FilePath, Section


class RunSection(Section):
    """The table [run]: where the run is kept, and its seed."""

    # SPEED_ONLY: a run directory may be moved without repeating a stage.
    dir: FilePath = Field(
        description="The run directory. It gets one folder per stage, the metrics and the summary.",
        json_schema_extra=SPEED_ONLY,
    )

    # Off, because a model of 60 GB takes minutes to read. Files that have changed are read anyway.
    rehash: bool = Field(
        default=False,
        description=(
            "Read every file of the models and artifacts again, although its size and times are "
            "those of the file that was read last. Use it if you distrust the disk."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Machines with GPUs are left out by lopd.stages.overlap.overlaps, which says why.
    overlap: bool = Field(
        default=True,
        description=(
            "On a machine without a GPU, keep one server from stage to stage, and let the ranks of "
            "the next training start while a stage works. With GPUs nothing overlaps."
        ),
        json_schema_extra=SPEED_ONLY,
    )

    # Every request and every step derives its own seed from this one.
    seed: int = Field(
        default=17,
        ge=0,
        lt=2**31,
        description="The seed of all random choices: sampling and the order of the training data.",
    )


class ModelsSection(Section):
    """The table [models]: the models of the run. A folder may be a name on the hub (hf://...)."""

    # Both must have the same tokenizer: the teacher scores the student's tokens.
    teacher: FilePath = Field(
        description="The teacher's Hugging Face folder (config.json, safetensors, tokenizer).",
    )

    student: FilePath = Field(
        description="The Hugging Face folder of the base model that becomes the student.",
    )

    # All teachers must have the student's tokenizer, because the student's tokens are scored.
    teachers: dict[str, FilePath] = Field(
        default_factory=dict,
        description=(
            "One teacher per domain of the prompts, as a table { math = FOLDER }. "
            "All other prompts have the teacher of models.teacher."
        ),
    )

    # Its scores cost a second forward pass over the rollouts.
    teacher_base: FilePath | None = Field(
        default=None,
        description=(
            "The model that the teacher was before its last training. Its log-probabilities go "
            'into the cache too, for distill.objective.advantage = "delta". If absent, none.'
        ),
    )

    # The teacher's is the default, because the student learns from the teacher's answers to prompts
    # of that form.
    chat_template: Literal["teacher", "student"] = Field(
        default="teacher",
        description=(
            "The model whose chat template renders the prompts of every stage. "
            "The trained student gets this template."
        ),
    )

    # The key exists to be refused with a reason: recipes of other programs often set it to true.
    trust_remote_code: Literal[False] = Field(
        default=False,
        description="Code that is part of a checkpoint is never run. The only value is false.",
    )


class TaskSection(Section):
    """The table [task]: what is asked, and who judges the answers."""

    name: str = Field(
        description=(
            "The task (lopd/tasks). It makes or reads prompts, and it verifies the answers."
        ),
    )

    # No knobs of their own here: every task has others.
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="The options of the task. The task itself checks names, types and bounds.",
    )


class PromptSet(Section):
    """The tables [prompts.sft], [prompts.opd], [prompts.eval]: prompts, and how they are read."""

    # Where the rows come from, and what their columns mean.

    file: FilePath | None = Field(
        default=None,
        description=(
            "A JSONL or Parquet file with prompts, or a folder of such files. "
            "If absent, the task generates the prompts."
        ),
    )

    # The keys of lopd.tasks.formats.FORMATS. They stand here again, because lopd.config is below
    # lopd.tasks and cannot import it; a test compares the two.
    format: Literal[
        "lopd",
        "fields",
        "openthoughts3",
        "dapo_math_17k",
        "epicoder",
        "gsm8k",
        "math_500",
        "aime_2024",
        "aime_2025",
        "hmmt_2025",
        "livecodebench",
    ] = Field(
        default="lopd",
        description=(
            "The data set whose columns the file has (docs/tasks.md). "
            "lopd means prompt_id, messages, answer; fields means what prompts.*.fields says."
        ),
    )

    # For a data set that is not in the table, or whose columns have changed.
    fields: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "The column of question, messages, answer, prompt_id, domain or hint, as a path "
            "(answer = reward_model.ground_truth). It replaces the format's own column."
        ),
    )

    # Which rows become prompts.

    # Conditions on several columns must all hold.
    where: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Use only rows in which a column has this value, one of a list of values, "
            "or a value inside { min, max }. Both ends are included."
        ),
    )

    # Data sets often repeat a question, for example once per solution.
    duplicates: Literal["keep", "drop"] | None = Field(
        default=None,
        description=(
            "What happens to a question that an earlier row already has: keep or drop. "
            "If absent, it is dropped, except in the format lopd."
        ),
    )

    # The cheap limit: no tokenizer is needed.
    max_prompt_chars: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Leave out prompts with more characters than this. If absent, there is no limit."
        ),
    )

    # It must be smaller than sglang.context_length, or nothing is left for the response.
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Leave out prompts with more tokens than this; the chat template counts. "
            "If absent, there is no limit."
        ),
    )

    # Many files are sorted by source or difficulty, so their first rows are no sample of them.
    shuffle_seed: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Shuffle the file's prompts with this seed, then take the first num_prompts. "
            "If absent, the order of the file stays."
        ),
    )

    num_prompts: int | None = Field(
        default=None,
        ge=1,
        description=(
            "The number of prompts: generated by the task, or the first ones of the file. "
            "If absent, the whole file is used."
        ),
    )

    seed: int = Field(
        default=0,
        ge=0,
        description=(
            "The seed of generated prompts. Sets with different seeds never share a prompt."
        ),
    )

    # What is written around a question.

    # The same question with another instruction is another experiment, so it decides a result.
    instruction: str | None = Field(
        default=None,
        description=(
            "The text around {question}, or one of the names plain and boxed. "
            "If absent, the format's own text is used."
        ),
    )

    thinking: bool = Field(
        default=True,
        description=(
            "Tell the chat template to let the model think (enable_thinking). "
            "A template without this switch ignores it."
        ),
    )


class PromptsSection(Section):
    """The table [prompts]: the three sets that a run needs."""

    sft: PromptSet = Field(description="The prompts that the teacher demonstrates.")
    opd: PromptSet = Field(description="The prompts of the rollouts.")
    # Without a default it could not be left out, and a run without evaluations has none.
    eval: PromptSet = Field(
        default_factory=PromptSet,
        description=(
            "The held-out prompts of the evaluations. It may be left out with "
            "evaluate.enabled = false."
        ),
    )
