"""Runs `llava-family demo` as a user does, in a process of its own, until Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llava_family


# As the installed command does, but surely of the package that is tested
COMMAND = [sys.executable, "-c", "from llava_family.cli import main; main()"]
SOURCE = Path(llava_family.__file__).parents[1]


@contextmanager
def running_demo(arguments: Sequence[str], timeout: float = 60) -> Iterator[str]:
    """The address of a page that answers; behind the block Ctrl-C must end the command, with exit code 0.

    Args:
        arguments (`Sequence[str]`): Of the command, from `"demo"` on; a port that is not given is a free one.
        timeout (`float`, *optional*, defaults to 60): Seconds until it must answer.
    """
    port = [] if "--port" in arguments else ["--port", "0"]
    path = os.pathsep.join([str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*COMMAND, *arguments, *port],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    try:
        address, output = _read_address(process)
        _wait_for_page(address, timeout)
        yield address
        process.send_signal(signal.SIGINT)
        output += process.communicate(timeout=30)[0]
        assert process.returncode == 0, output
        assert "Traceback" not in output, output
    finally:
        process.kill()
        process.communicate()


def _read_address(process: subprocess.Popen) -> tuple[str, str]:
    output = ""
    for line in process.stdout:
        output += line
        if match := re.search(r"http://\S+", line):
            return match[0], output
    raise AssertionError(f"The demo ended before it told its address:\n{output}")


def _wait_for_page(address: str, timeout: float) -> None:
    start = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.status == 200
                return
        except OSError:
            if time.monotonic() - start > timeout:
                raise
            time.sleep(0.1)


def check_demo(arguments: Sequence[str]) -> None:
    """That the command's page answers, and that Ctrl-C ends it."""
    with running_demo(arguments):
        pass
