"""How an update is ended from outside: cancelled, suspended, or out of time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

from lamplighter_agent.errors import UpdateCancelledError, UpdateDeadlineError

_T = TypeVar("_T")
_POLL_S = 0.05

Cause = Literal["cancelled", "suspended", "deadline"]


class Interrupt:
    """Belongs to one request; set from any thread, looked at by everything that the request makes wait."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._cause: Cause | None = None
        self._committed = False
        self._timer: threading.Timer | None = None
        self._late = ""
        self._children: list[Interrupt] = []

    def child(self) -> Interrupt:
        """Return an interrupt that is set with this one, and may be set without it."""
        child = Interrupt()
        with self._lock:
            self._children.append(child)
            child._late = self._late
            if self._cause is not None:
                child._set(self._cause)
        return child

    @property
    def cause(self) -> Cause | None:
        """Why the update must end, or None."""
        return self._cause

    @property
    def is_set(self) -> bool:
        """True if the update must end."""
        return self._event.is_set()

    def cancel(self) -> bool:
        """End the update; False if it can no longer be cancelled."""
        with self._lock:
            return not self._committed and self._set("cancelled")

    def suspend(self) -> None:
        """End the update without a result, since the agent ends; the next start goes on with it."""
        with self._lock:
            self._set("suspended")

    def commit(self) -> None:
        """From now on the update is not cancelled any more.

        Raises:
            UpdateCancelledError: If it has been cancelled or suspended.
            UpdateDeadlineError: If its time is over.
        """
        with self._lock:
            self.check("activating")
            self._committed = True

    def limit(self, seconds: float | None, what: str) -> None:
        """Set the deadline of the state that begins, replacing that of the one before; None: no deadline."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if seconds is not None and not self._event.is_set():
                self._late = f"{what} took longer than {seconds:g} s"
                self._timer = threading.Timer(seconds, self._expire, (self._late,))
                self._timer.daemon = True
                self._timer.start()

    def wait(self, seconds: float) -> bool:
        """Wait, at most until the update must end; return whether it must."""
        return self._event.wait(seconds)

    def check(self, where: str) -> None:
        """Do nothing as long as the update may go on.

        Args:
            where: What is being done, for the message.

        Raises:
            UpdateCancelledError: If it was cancelled or suspended.
            UpdateDeadlineError: If the time of its state is over.
        """
        if self._cause == "deadline":
            raise UpdateDeadlineError(f"{where}: {self._late}", hint="it is tried again later")
        if self._cause is not None:
            raise UpdateCancelledError(f"{where}: {self._cause}")

    def run(self, work: Callable[[], _T], where: str, *, grace_s: float = 0.0) -> _T:
        """Do something that may hang in a thread of its own, and leave that thread behind when the update must end.

        Args:
            work: What to do; it must not change anything once the update must end.
            where: What that is, for the message.
            grace_s: Time for the work to notice the end by itself.

        Raises:
            UpdateCancelledError: If the update was cancelled or suspended meanwhile.
            UpdateDeadlineError: If the time of its state passed meanwhile.
            Exception: Whatever the work raises.
        """
        outcome: list[_T] = []
        failure: list[BaseException] = []
        done = threading.Event()

        def carry_out() -> None:
            try:
                outcome.append(work())
            except BaseException as error:  # raised again in the thread that waits
                failure.append(error)
            finally:
                done.set()

        threading.Thread(target=carry_out, name=f"update: {where}", daemon=True).start()
        while not done.wait(_POLL_S):
            if self.is_set:
                if not done.wait(grace_s):
                    self.check(where)
                break
        if failure:
            raise failure[0]
        return outcome[0]

    def _expire(self, late: str) -> None:
        with self._lock:
            if late == self._late:
                self._set("deadline")

    def _set(self, cause: Cause) -> bool:
        if self._cause is not None:
            return False
        self._cause = cause
        self._event.set()
        for child in self._children:
            child._late = self._late
            child._set(cause)
        return True
