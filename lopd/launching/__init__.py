"""The pipeline as jobs of one experiment.

plan.py says what to start. nemo.py starts it with nemo-run, in an environment of its own. bridge.py
hands the plan over and brings the result back. place.py tells a job which part of a stage is its
own.
"""

from lopd.launching.bridge import launch
from lopd.launching.plan import TARGETS, Job, LaunchPlan, Target, make_plan

__all__ = ["TARGETS", "Job", "LaunchPlan", "Target", "launch", "make_plan"]
