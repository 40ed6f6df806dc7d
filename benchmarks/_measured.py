"""Run a command and write how long it took and how much memory it held: python _measured.py RESULT COMMAND ...

A process of its own that imports next to nothing: the peak of a started process counts what its starter held.
"""

import json
import os
import sys
import time
from pathlib import Path


def main() -> None:
    started = time.perf_counter()
    _, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:]), 0)
    seconds = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    result = {"seconds": seconds, "gib": usage.ru_maxrss * unit / 2**30, "status": os.waitstatus_to_exitcode(status)}
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
