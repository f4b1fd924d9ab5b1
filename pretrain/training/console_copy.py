"""Started next to rank 0: copies what its libraries print to the console and to its log file.

`python console_copy.py OUTPUT ERRORS FILE`: descriptors of two pipes and of the log file. It ends with the last process that can write to the
pipes, so it also copies what a library prints when it aborts the rank. A target that takes nothing, such as a full disk or a closed
terminal, is ignored. Standard library only: it starts at once and takes little memory.
"""

import contextlib
import os
import select
import signal
import sys


def main() -> None:
    """Copy until both pipes are closed."""
    output, errors, file = map(int, sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # those are for the rank, and this ends with it
    consoles = {output: 1, errors: 2}
    while consoles:
        for source in select.select(list(consoles), [], [])[0]:
            text = os.read(source, 1 << 16)
            for target in (consoles[source], file):
                _write(target, text)
            if not text:
                del consoles[source]


def _write(target: int, text: bytes) -> None:
    with contextlib.suppress(OSError):
        while text:
            text = text[os.write(target, text) :]


if __name__ == "__main__":
    main()
