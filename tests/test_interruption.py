"""Ctrl-C and SIGTERM end a command wherever they arrive: also in a destructor, where Python loses
the exception of a signal handler, and where the end itself hangs.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

# The signal arrives in a destructor. INSTALL decides what handles it.
_DESTRUCTOR = """
import os, signal, time
from lopd.interruption import Interrupted, Interruption

class Signals:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)

def plain(*_):
    raise Interrupted

interruption = Interruption(20)
{install}
try:
    Signals()
    print("lost", flush=True)
    time.sleep({wait_s})
    print("never interrupted")
except Interrupted:
    print("interrupted")
finally:
    interruption.ends()
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_that_python_loses_is_raised_again(name: str) -> None:
    ended = run(_DESTRUCTOR.format(name=name, install="interruption.install()", wait_s=20))
    assert ended.stdout.split("\n")[:2] == ["lost", "interrupted"]
    # What is raised again is not printed as lost.
    assert ended.stderr == ""
    assert ended.returncode == 0


def test_a_plain_handler_loses_it() -> None:
    """The control: this is what Python does by itself."""
    install = "signal.signal(signal.SIGTERM, plain)"
    ended = run(_DESTRUCTOR.format(name="SIGTERM", install=install, wait_s=1))
    assert ended.stdout.split("\n")[:2] == ["lost", "never interrupted"]


# The signal arrives while the main thread waits for the lock of all imports, in a callback of the
# import system. Afterwards another thread imports a module that nothing has imported before.
_IMPORT_LOCK = """
import _imp, os, signal, threading, time
import importlib._bootstrap as bootstrap
from lopd.interruption import Interrupted, Interruption

def hold():
    _imp.acquire_lock()
    is_held.set()
    # Long enough for the main thread to wait for the lock, also on a busy machine.
    time.sleep(1.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    _imp.release_lock()

def plain(*_):
    raise Interrupted

is_held = threading.Event()
module_lock = bootstrap._get_module_lock("a_module")
interruption = Interruption(20)
{install}
threading.Thread(target=hold).start()
is_held.wait()
try:
    # Its callback takes the lock of all imports.
    del module_lock
    time.sleep({wait_s})
    print("never interrupted")
except Interrupted:
    print("interrupted")
finally:
    interruption.ends()
other = threading.Thread(target=lambda: __import__("colorsys"), daemon=True)
other.start()
other.join({join_s})
print("hangs" if other.is_alive() else "imports", flush=True)
os._exit(0)
"""


def test_an_interruption_leaves_no_lock_of_the_import_system_taken() -> None:
    ended = run(_IMPORT_LOCK.format(install="interruption.install()", wait_s=20, join_s=30))
    assert ended.stdout == "interrupted\nimports\n"
    assert ended.stderr == ""


def test_a_plain_handler_leaves_it_taken() -> None:
    """The control: this is what Python does by itself."""
    install = "signal.signal(signal.SIGTERM, plain)"
    ended = run(_IMPORT_LOCK.format(install=install, wait_s=1, join_s=3))
    assert ended.stdout == "never interrupted\nhangs\n"
    assert "Interrupted" in ended.stderr


def test_an_end_that_hangs_is_cut_short() -> None:
    ended = run(
        """
        import os, signal, time
        from lopd.interruption import Interruption

        interruption = Interruption(1)
        interruption.install()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            time.sleep(50)
        """
    )
    assert ended.returncode == 130
    assert ended.stderr == (
        "lopd: interrupted; ended at once, because the orderly end took longer than 1 s\n"
    )


def test_an_interruption_on_its_way_is_not_raised_twice() -> None:
    """The orderly end of servers takes seconds, and a second exception would break it off."""
    ended = run(
        """
        import os, signal, time
        from lopd.interruption import Interrupted, Interruption

        interruption = Interruption(20)
        interruption.install()
        try:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                time.sleep(1)
                print("cleaned up")
        except Interrupted:
            print("interrupted")
        finally:
            interruption.ends()
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        print("ends in order")
        """
    )
    assert ended.stdout == "cleaned up\ninterrupted\nends in order\n"
    assert ended.returncode == 0
