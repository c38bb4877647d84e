"""Functions in processes of their own, which may be killed."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback


def run_in_child(function, kill_after: float | None = None) -> int:
    """Runs a function in a child process, killed by SIGKILL after so many seconds; returns the exit status."""
    child = os.fork()
    if child == 0:
        try:
            if kill_after is not None:
                threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def run_script(script: str, folder, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs the text of a script in a process of its own, in a folder."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
