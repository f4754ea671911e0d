"""Signals that stop a run: it finishes the step, or interrupts its evaluation, and saves."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

AGENT_INTERVAL = 1.0  # seconds between looks at whether torchrun is still there


class Stopped(Exception):
    """A signal has interrupted work that a resumed run will do again."""


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can stop after the current step or during its evaluation.

    Until `listen` is called, signals end the process at once, as usual.

    The death of torchrun counts as SIGTERM, because processes without it would train on unnoticed, and block
    those that the next torchrun starts. So does Ctrl-Break on Windows, which has no SIGTERM, and SIGHUP,
    which a closing terminal sends, unless it is ignored, as under nohup.

    torchrun passes on a signal that the terminal has already sent, so a second one means the same; the third
    ends the process at once. Python runs signal handlers between bytecodes, which a backward pass can delay
    by seconds. So a thread that the interpreter wakes from within the signal answers immediately.
    """

    def __init__(self) -> None:
        self.number = 0  # of the first signal
        self.times = 0
        self.wants_checkpoint = False  # set before a step that all processes should save after

    def interrupting(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the same items. Raises Stopped between two of them once a signal has come."""
        for item in items:
            self.check()
            yield item

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.number:
            raise Stopped

    def listen(self, announce: bool, agent: int) -> None:
        """Remember signals from now on.

        announce: print on stderr what the signal does; one process of a run is enough.
        agent: the process id of torchrun, whose death to notice; 0: none.
        """
        self.agent = agent
        self.announce = announce
        self.wake_up, waker = socket.socketpair()
        waker.setblocking(False)
        self.waker = waker  # stays open as long as signals may come
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        hang_up = getattr(signal, "SIGHUP", None)
        if hang_up and signal.getsignal(hang_up) == signal.SIG_IGN:
            hang_up = None
        self.as_sigterm = {getattr(signal, "SIGBREAK", None), hang_up} - {None}
        for number in {signal.SIGTERM, signal.SIGINT} | self.as_sigterm:
            signal.signal(number, lambda number, frame: None)  # the thread does the work
        threading.Thread(target=self._listen, name="stop signal", daemon=True).start()

    def _listen(self) -> None:
        while True:
            self.wake_up.settimeout(AGENT_INTERVAL if self.agent else None)
            try:
                received = self.wake_up.recv(1)[0]
            except TimeoutError:
                self._look_for_agent()
                continue
            number = signal.SIGTERM if received in self.as_sigterm else received
            self.number = self.number or number
            self.times += 1
            if self.times > 2:
                os._exit(128 + number)
            if self.announce:
                name = signal.Signals(received).name
                left = "once" if self.times == 2 else "twice"
                text = f"\n{name}: stopping after this step; {left} more to quit now"
                print(text, file=sys.stderr, flush=True)

    def _look_for_agent(self) -> None:
        """Stop if torchrun is gone: then another process is this one's parent."""
        if os.getppid() == self.agent:
            return
        self.agent = 0
        self.number = self.number or signal.SIGTERM
        if self.announce:
            print("\ntorchrun is gone: stopping after this step", file=sys.stderr, flush=True)
