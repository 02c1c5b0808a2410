"""The whole configuration: one field per table of the TOML file.

The knobs stand in the files of their subjects: inputs.py, sampling.py, training.py, lora.py,
distill.py, results.py, engine.py (SGLang and weight sync), report.py and launch.py.

A knob that is marked ``SPEED_ONLY`` changes how fast or where a stage runs, but not its result. A
change of such a knob repeats no stage.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from lopd.config.base import Contradiction, Section
from lopd.config.distill import DistillSection
from lopd.config.engine import SGLangSection, SyncSection
from lopd.config.inputs import ModelsSection, PromptsSection, RunSection, TaskSection
from lopd.config.launch import LaunchSection
from lopd.config.report import ReportSection
from lopd.config.results import EvaluateSection, ExportSection
from lopd.config.sampling import DemonstrateSection, RolloutSection, ScoreSection
from lopd.config.training import SftSection


class Config(Section):
    """All tables, in the order of the pipeline. Four of them have keys that must be given."""

    # What goes in. These have no defaults: every run has its own.
    run: RunSection
    models: ModelsSection
    task: TaskSection
    prompts: PromptsSection

    # The stages, and the servers that several of them use.
    sglang: SGLangSection = Field(default_factory=SGLangSection)
    demonstrate: DemonstrateSection = Field(default_factory=DemonstrateSection)
    sft: SftSection = Field(default_factory=SftSection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    sync: SyncSection = Field(default_factory=SyncSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection = Field(default_factory=ExportSection)

    # Which trackers get the figures.
    report: ReportSection = Field(default_factory=ReportSection)

    # Where and how the stages run as jobs (`lopd launch`).
    launch: LaunchSection = Field(default_factory=LaunchSection)

    @property
    def evaluates_at_syncs(self) -> bool:
        """Whether distill sends weights to servers that then answer held-out prompts."""
        # Without an evaluation nobody would read the answers, so no weights are sent.
        return self.evaluate.enabled and self.distill.sync_every > 0

    @property
    def aligns_tokenizers(self) -> bool:
        """Whether the teacher has a tokenizer of its own, and scores are brought over."""
        return self.score.tokenizer == "aligned"

    @property
    def student_token_models(self) -> tuple[Path, ...]:
        """The folders of the models whose token ids are those of the student."""
        models = self.models
        if self.aligns_tokenizers:
            return (models.student,)
        # All of them read the ids that the student samples.
        return models.teacher, *models.teachers.values(), models.student

    @model_validator(mode="after")
    def _has_held_out_prompts(self) -> Config:
        # An evaluation that finds no prompts would end a run that has already trained.
        if self.evaluate.enabled and "eval" not in self.prompts.model_fields_set:
            raise Contradiction(
                "prompts.eval is missing",
                limit="the held-out prompts of the evaluations",
                remedy="add [prompts.eval], or set evaluate.enabled = false",
            )
        return self
