"""What a run will need before anything starts: parameters, memory, disk, operations, hours.

docs/plan.md has the assumptions and their sources.
"""

from lopd.planning.assumptions import Assumptions
from lopd.planning.hardware import Node, node_of
from lopd.planning.plan import Plan, make_plan

__all__ = ["Assumptions", "Node", "Plan", "make_plan", "node_of"]
