"""The command `zipr1`, also as `python -m zipr1` and `torchrun -m zipr1`."""

from __future__ import annotations

import signal
import sys


def program() -> None:
    """`zipr1.cli.program`. Ctrl-C while it is imported still is one line too."""
    try:
        from zipr1.cli import program

        program()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
        if "--json" in sys.argv:
            print('{"error": "interrupted", "exit_code": 130}', flush=True)
        print("error: interrupted; nothing was done", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    program()
