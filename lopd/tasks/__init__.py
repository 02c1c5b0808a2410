"""Prompts and verifiers by domain, and the one place where the chat template is applied."""

from lopd.tasks.interface import Task, TaskOptions, Verifier, get_task

__all__ = ["Task", "TaskOptions", "Verifier", "get_task"]
