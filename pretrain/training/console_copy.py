"""A process next to rank 0 that copies the output of the rank's libraries to the console and to the rank's log file.

`python console_copy.py OUTPUT ERRORS FILE` takes the descriptors of two pipes and of the log file. The process ends
when no other process can write to the pipes any more, so it also copies the last output of a library that aborts the
rank. A target that cannot be written, such as a full disk or a closed terminal, is ignored. The process uses the
standard library only, so it starts quickly and needs little memory.
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
        signal.signal(number, signal.SIG_IGN)  # the rank handles these signals, and this process ends after it
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
