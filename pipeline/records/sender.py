"""A thread that sends what others put down, so that none of them ever waits for a server."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

_RETRY_SECONDS = 60.0  # between tries to reach a server that did not answer: each costs seconds
_FORK_SECONDS = 60.0  # that a fork waits for what is being sent


class Sender:
    """Calls `send` in its thread, once for however many calls of `put_down`, and again a minute after one that failed.

    `send` returns whether all went, and raises nothing. It is never called twice at once. A fork waits for it: a child
    that is forked within an import, or a look-up of a name, would keep its locks for ever.
    """

    retry_seconds = _RETRY_SECONDS

    def __init__(self, send: Callable[[], bool]) -> None:
        self._send = send
        self._turn = threading.Condition()
        self._put_down = self._closing = self._tried = False
        self._asked = self._served = 0  # calls of `flush`, and those that a try has followed
        self._sending = threading.Lock()
        self._forking = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin; a second call does nothing."""
        if self._thread.ident is None:
            os.register_at_fork(before=self._before_fork, after_in_parent=self._after_fork)
            self._thread.start()

    def put_down(self) -> None:
        """There is something to send, once it has begun."""
        with self._turn:
            self._put_down = True
            self._turn.notify_all()

    def wait_for_first(self, seconds: float | None = None) -> bool:
        """Until the first try is over, well or not, or for so long; whether it is."""
        self.start()
        with self._turn:
            return self._turn.wait_for(lambda: self._tried or not self._thread.is_alive(), seconds)

    def flush(self) -> None:
        """Wait for a try that begins after this call, also where the last one has just failed."""
        self.start()
        with self._turn:
            self._asked += 1
            asked = self._asked
            self._turn.notify_all()
            self._turn.wait_for(lambda: self._served >= asked or not self._thread.is_alive())

    def close(self) -> None:
        """One more try, and the end of the thread. Whoever calls `send` afterwards is alone."""
        self.start()
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._turn:
                self._put_down, asked, closing = False, self._asked, self._closing
            with self._sending:
                sent = self._send()
            with self._turn:
                self._served, self._tried = asked, True
                self._turn.notify_all()
                if closing:
                    return
                wanted = lambda sent=sent, asked=asked: (  # noqa: E731
                    self._closing or self._asked > asked or (sent and self._put_down)
                )
                self._turn.wait_for(wanted, None if sent else self.retry_seconds)

    def _before_fork(self) -> None:
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._forking = self._sending.acquire(timeout=_FORK_SECONDS)

    def _after_fork(self) -> None:
        if self._forking:
            self._forking = False
            self._sending.release()
