"""A program that hangs in a test is ended with its children, and what it said is told."""

import sys
import time

import pytest
from processes import ended

HANGS = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)
print("parent", flush=True)
time.sleep(99)
"""


def test_a_program_and_its_children_end_at_the_limit():
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"took over 3 s\nparent"):
        ended([sys.executable, "-c", HANGS], 3)
    assert time.monotonic() - began < 60
    assert ended([sys.executable, "-c", "print(5); raise SystemExit(4)"]).returncode == 4
