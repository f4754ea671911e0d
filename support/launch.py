"""Set up a process before a script imports torch."""

import os
import signal


def prepare() -> None:
    """Set this process up. Call it before torch is imported, in a script that is being run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    # OpenMP's threads spin for milliseconds while they wait for work. Where another program wants their
    # cores, that makes both far slower. A thousand rounds cost nothing alone (BENCHMARKS.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
