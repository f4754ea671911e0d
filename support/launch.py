"""What a script does before its imports."""

import os
import signal


def prepare() -> None:
    """Set this process up; to be called before torch is imported, by a script that is being run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback
    # OpenMP's threads spin while they wait for work. Where another program wants their cores too, that
    # slows both down many times over. Sleeping costs next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
