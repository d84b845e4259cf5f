"""A program that hangs in a test is ended with its children, and what it said is told."""

import os
import subprocess
import sys
import time

import pytest
from processes import byte, code_of, ended, forked, scripted

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


SCRIPT = """
import sys, warnings
print(sys.argv[1:], __name__)
warnings.warn("look")
if sys.argv[1] == "hang":
    import subprocess, time
    subprocess.Popen(["sleep", "99"])
    time.sleep(99)
raise KeyError("no") if sys.argv[1] == "raise" else SystemExit("words" if sys.argv[1] == "say" else 4)
"""


def test_a_script_in_a_fork_ends_as_a_program_of_its_own(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    for word in ("exit", "raise", "say"):
        mine = scripted(tmp_path / "script.py", word, cwd=tmp_path)
        own = ended([sys.executable, "script.py", word], cwd=tmp_path)
        assert (mine.returncode, mine.stdout) == (own.returncode, own.stdout), mine.stderr
        last = [said.stderr.splitlines()[-1] for said in (mine, own)]
        assert last[0] == last[1]
        assert all("UserWarning: look" in said.stderr for said in (mine, own))
    with pytest.raises(AssertionError, match=r"took over 1 s\n"):
        scripted(tmp_path / "script.py", "hang", seconds=1)


def test_a_fork_ends_with_what_it_has_started():
    """Also one whose output is waited for, as that of a pipe is until the last that can write to it has ended."""
    reader, writer = os.pipe()

    def act():
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], pass_fds=[writer])
        return 3

    began = time.monotonic()
    assert code_of(forked(act)) == 3
    os.close(writer)
    assert byte(reader) == b""
    assert time.monotonic() - began < 60
    os.close(reader)


def test_a_byte_that_nobody_writes_is_not_waited_for():
    reader, writer = os.pipe()
    assert byte(reader, 0.1) == b""
    os.write(writer, b".")
    assert byte(reader) == b"."
    for end in (reader, writer):
        os.close(end)
