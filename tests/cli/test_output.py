"""Results alone on stdout."""

from __future__ import annotations

import subprocess
import sys

_NOISY = """
import os, subprocess, sys
from ascend_plugin.cli.output import clean_stdout, write_json
print("before")
with clean_stdout() as stdout:
    print("python")
    os.write(1, b"descriptor\\n")
    subprocess.run([sys.executable, "-c", "print('child')"])
    write_json(stdout, [{"a": 1}], {"b": None})
print("after")
"""


def test_only_the_result_reaches_stdout():
    done = subprocess.run(
        [sys.executable, "-c", _NOISY], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "".join(lines[1:-1]).replace(" ", "") == '{"rows":[{"a":1}],"meta":{"b":null}}'
    assert set(done.stderr.split()) == {"python", "descriptor", "child"}
