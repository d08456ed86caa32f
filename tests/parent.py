"""Forks ranks for :mod:`tests.real_ranks` from a process that has imported all they need.

It reads a line of JSON, a list of ranks, from its standard input, and writes one when all of them have ended.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback

from tests.waits import kept_codes, unwaited

IMPORTED = ("tests.rank_worker", "tests.outputs_worker", "tests.sharded_worker", "spcompile.passes.recognize")


def fork(rank: dict[str, str], environment: dict[str, str]) -> int:
    """The process of a rank, which runs ``python -m rank['worker'] rank['case']`` and writes to a file.

    Nothing may run on threads here: a fork has none of them.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment | {"RANK": rank["rank"], "LOCAL_RANK": rank["rank"]})
        output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(output, standard)
        sys.argv = [rank["worker"], rank["case"]]
        with kept_codes() as codes:
            runpy.run_module(rank["worker"], run_name="__main__")
        print("UNWAITED " + json.dumps([line for x in codes for line in unwaited(x)]))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Whatever happens, a child does not go on as its parent does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        pids = [fork(rank, asked["environment"]) for rank in asked["ranks"]]
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
