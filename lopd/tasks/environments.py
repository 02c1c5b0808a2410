"""Environments: a Python function that replies to what a model has written.

``rollout.environment`` names it as ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``. It gets the
messages so far, the last of which is the model's, and returns the next message, or None where the
response is over. It is the user's own code and runs in this process. Code that a model wrote is
not: such a function gives it to lopd.tasks.sandbox.run, which has limits of its own.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from lopd.artifacts import sha256_file
from lopd.errors import ConfigError, DataError

Messages: TypeAlias = list[dict[str, Any]]
Environment: TypeAlias = Callable[[Messages], Mapping[str, Any] | None]
_KEY = "rollout.environment"
_FORM = 'write "tools.py:calculator", or "package.module:calculator"'


def load_environment(name: Path) -> Environment:
    """Return the function that rollout.environment names.

    Args:
        name: The value of the knob. The configuration has made it a path; of a module, the last
            part counts.

    Raises:
        ConfigError: There is no such file, module or function, or the code cannot be imported.
    """
    source, function = _parts(name)
    try:
        module = _module_of(name, source)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {source}", where=_KEY, remedy=_FORM) from None
    except Exception as error:
        # Every class is caught: the file is the user's own, and may raise anything.
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{source} cannot be imported ({reason:.200})", where=_KEY, remedy="correct this code"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{source} has no function {function!r}", where=_KEY, remedy=_FORM)
    environment: Environment = found
    return environment


def environment_identity(name: Path) -> list[str]:
    """Return what an environment is known by: the function, and the hash of the file it is in.

    Raises:
        ConfigError: There is no such file or module.
    """
    source, function = _parts(name)
    file = name.parent / source
    if not source.endswith(".py"):
        try:
            found = importlib.util.find_spec(source)
        except (ImportError, ValueError):
            found = None
        if found is None or found.origin is None:
            raise ConfigError(f"no such module: {source}", where=_KEY, remedy=_FORM)
        file = Path(found.origin)
    if not file.is_file():
        raise ConfigError(f"no such file: {file}", where=_KEY, remedy=_FORM)
    return [f"{Path(source).name}:{function}", sha256_file(file)]


def ask(
    environment: Environment, messages: Messages, *, limit_s: float, where: str
) -> dict[str, Any] | None:
    """Return the reply of an environment, or None where the response is over.

    Args:
        environment: The function.
        messages: The conversation. The function gets a copy.
        limit_s: How many seconds it may take.
        where: The response, for errors.

    Raises:
        DataError: It fails, takes longer, or returns no message.
    """
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def call() -> None:
        try:
            answers.put(environment([dict(message) for message in messages]))
        except Exception as error:
            # Whatever it is, it belongs to the response whose turn this is.
            answers.put(error)

    # A daemon of its own: a function that never returns must not keep the command from ending.
    threading.Thread(target=call, name="environment", daemon=True).start()
    try:
        reply = answers.get(timeout=limit_s)
    except queue.Empty:
        raise DataError(
            f"the environment did not reply within {limit_s:g} s",
            where=where,
            limit="rollout.environment_timeout_s",
            remedy="correct the function, or raise rollout.environment_timeout_s",
        ) from None
    if isinstance(reply, Exception):
        raise DataError(
            f"the environment failed ({type(reply).__name__}: {reply})",
            where=where,
            remedy="correct the function; it replies to anything that a model may write",
        ) from reply
    if reply is None:
        return None
    is_message = isinstance(reply, Mapping) and isinstance(reply.get("role"), str)
    if not is_message or not isinstance(reply.get("content"), str) or reply["role"] == "assistant":
        raise DataError(
            f"the environment returned {reply!r:.80}, which is no message",
            where=where,
            limit="a message of another role than assistant, or None",
            remedy='return {"role": "user", "content": "..."}, or a role that the chat template '
            "has for tools",
        )
    return dict(reply)


def _parts(name: Path) -> tuple[str, str]:
    """Return the file or the module, and the function."""
    source, colon, function = name.name.rpartition(":")
    if not colon or not source or not function.isidentifier():
        raise ConfigError(f"{name.name!r} names no function", where=_KEY, remedy=_FORM)
    return source, function


def _module_of(name: Path, source: str) -> ModuleType:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    file = name.parent / source
    if not file.is_file():
        raise FileNotFoundError(file)
    # A name of its own: two files may have the same one.
    own = f"lopd_environment_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(own, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
