"""The configuration.

``sections.py`` has one field per table of the TOML file and names the files with the knobs.
``loading.py`` reads the TOML file and the overrides.
"""

from lopd.config.base import FilePath, Section
from lopd.config.distill import DistillSection, ObjectiveSection, RefreshSection
from lopd.config.engine import SGLangSection, SyncSection
from lopd.config.inputs import ModelsSection, PromptSet, PromptsSection, RunSection, TaskSection
from lopd.config.loading import (
    InvalidConfig,
    config_from,
    known_keys,
    load_config,
    nearest_key,
    result_keys,
)
from lopd.config.lora import LoraSection
from lopd.config.results import EvaluateSection, ExportSection
from lopd.config.sampling import DemonstrateSection, RolloutSection, Sampling, ScoreSection
from lopd.config.sections import Config
from lopd.config.training import (
    ForwardSection,
    OptimizerSection,
    ParallelSection,
    SftSection,
    TrainSection,
)

__all__ = [
    "Config",
    "DemonstrateSection",
    "DistillSection",
    "EvaluateSection",
    "ExportSection",
    "FilePath",
    "ForwardSection",
    "InvalidConfig",
    "LoraSection",
    "ModelsSection",
    "ObjectiveSection",
    "OptimizerSection",
    "ParallelSection",
    "PromptSet",
    "PromptsSection",
    "RefreshSection",
    "RolloutSection",
    "RunSection",
    "SGLangSection",
    "Sampling",
    "ScoreSection",
    "Section",
    "SftSection",
    "SyncSection",
    "TaskSection",
    "TrainSection",
    "config_from",
    "known_keys",
    "load_config",
    "nearest_key",
    "result_keys",
]
