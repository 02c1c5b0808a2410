"""Prompts and verifiers by domain, and the one place where the chat template is applied."""

from lopd.tasks.interface import Task, TaskOptions, get_task

__all__ = ["Task", "TaskOptions", "get_task"]
