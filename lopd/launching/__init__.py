"""The pipeline as jobs of one experiment: what to start (plan.py), with what (nemo-run, in an
environment of its own: nemo.py), by whom (bridge.py).
"""

from lopd.launching.bridge import launch
from lopd.launching.plan import TARGETS, Job, LaunchPlan, Target, make_plan

__all__ = ["TARGETS", "Job", "LaunchPlan", "Target", "launch", "make_plan"]
