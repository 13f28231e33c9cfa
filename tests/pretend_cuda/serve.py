"""Runs scripts one after the other in this process, so that torch is imported once.

Reads a command line a line, as a JSON array; answers each with one line, a JSON object.
"""

from __future__ import annotations

import io
import json
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

import torch


def call(argv: list[str]) -> dict[str, object]:
    """Status, output and messages of one script, and what it did on the device."""
    out, messages, before = io.StringIO(), io.StringIO(), torch.cuda.pretend.counts()
    status, sys.argv = 0, argv
    with redirect_stdout(out), redirect_stderr(messages):
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            status = 1
            traceback.print_exc()
    counts = {name: count - before[name] for name, count in torch.cuda.pretend.counts().items()}
    return {"status": status, "stdout": out.getvalue(), "stderr": messages.getvalue(), **counts}


def main() -> None:
    """Serve until the input ends."""
    answers = sys.stdout
    for line in sys.stdin:
        print(json.dumps(call(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
