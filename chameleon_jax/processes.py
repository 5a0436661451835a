"""One program as several processes, on one machine or many: how they meet, and how they end.

    def work():                 # in a child process
        connect(meeting)        # before JAX finds its devices
        ...

    supervise(work, "...")      # in its parent: waits, and says how the child ended

JAX watches over its processes: when one dies, its coordination service tells the others, and JAX
ends each of them on the spot, in the middle of a collective if need be, by `abort` and with a page
of C++. Nothing in the same process can say anything after that. So each process has a parent that
does nothing but wait: it says in one line what happened, and gives an exit code that tells a lost
neighbour from a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from chameleon_jax.errors import UserError, one_line

LOST = 75  # exit code: another process of the run was lost; the same command resumes (EX_TEMPFAIL)
HEARTBEAT = 40  # seconds without a sign of life after which JAX takes a process for lost
VERDICT = HEARTBEAT + 15  # seconds after which JAX would have said that a process is lost
CONNECT = 300  # seconds in which all processes must have started
TOGETHER = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes: all end at the same step
PASSED_ON = (signal.SIGTERM, signal.SIGINT)
_GOODBYE = b"."  # what a child says when it ends by its own will


class ProcessError(UserError):
    """The processes of a run cannot find each other. The message is one line."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the processes of a run meet; None: found out from Slurm, Open MPI, GKE or a TPU pod.

    Attributes:
      coordinator: HOST:PORT of process 0; the port must be free there.
      processes: how many there are.
      process_id: number of this one, from 0.

    Raises:
      ProcessError: only some of them are given, or they cannot be.
    """

    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        given = (self.coordinator, self.processes, self.process_id)
        names = ("--coordinator HOST:PORT", "--processes N", "--process_id I")
        if given.count(None) not in (0, len(given)):
            missing = [name for name, value in zip(names, given, strict=True) if value is None]
            raise ProcessError(f"{', '.join(missing)} is missing; give all of {', '.join(names)}")
        if self.coordinator is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ProcessError(f"--coordinator is {self.coordinator!r}; expected HOST:PORT")
        if not 0 <= self.process_id < self.processes:
            raise ProcessError(
                f"--process_id is {self.process_id} of {self.processes} --processes; expected 0 to"
                f" {self.processes - 1}"
            )

    def __str__(self) -> str:
        if self.coordinator is None:
            return "the other processes of the cluster"
        return f"all {self.processes} processes at {self.coordinator}"


def connect(meeting: Meeting, *, timeout: int = CONNECT) -> None:
    """Wait for all processes of the run. Must come before anything that uses a device.

    Args:
      meeting: where.
      timeout: seconds; when they are over, JAX ends this process.

    Raises:
      ProcessError: there is no cluster here; or it cannot be joined.
    """
    import jax

    try:
        jax.distributed.initialize(
            meeting.coordinator,
            meeting.processes,
            meeting.process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        if meeting.coordinator is not None:
            raise ProcessError(f"cannot join {meeting}: {one_line(error)}") from None
        raise ProcessError(
            f"--distributed: no cluster is found here ({one_line(error)}); on one machine leave it"
            " out; under Slurm, Open MPI, GKE and on TPU pods start the same command on every host;"
            " elsewhere give --coordinator HOST:PORT --processes N --process_id I"
        ) from None


def supervise(work: Callable[[], int], waiting_for: str) -> int:
    """Do some work in a child process, and say how it ended. The work may use JAX, nothing before.

    Signals that ask to end are passed on. If this process is killed, the child is, too.

    Args:
      work: gives the exit code, or raises SystemExit with it. Of `TOGETHER` all processes must
        end with the same one. Any other exception ends the child with its traceback and code 1,
        unless it comes from the loss of another process.
      waiting_for: what the work first waits for, for a message.

    Returns:
      The exit code of the child, or `LOST`.
    """
    if not hasattr(os, "fork"):  # Windows: JAX's own message has to do
        return work()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # No signal may come between the fork and the handler that passes it on.
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.fork()
    if not child:
        os.close(reader)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        _be_child(work, writer)
    os.close(writer)
    with _passed_on(child):
        status = _wait(child)
    said = b""
    os.set_blocking(reader, False)  # what the child has left behind may hold the other end
    with contextlib.suppress(BlockingIOError):
        said = os.read(reader, 1)
    os.close(reader)
    return _verdict(os.waitstatus_to_exitcode(status), said == _GOODBYE, waiting_for)


def _be_child(work: Callable[[], int], writer: int) -> None:
    _die_with_parent()
    code = 1
    try:
        code = _exit_code(work)
        if code in TOGETHER:
            _leave_together()
    except BaseException as error:
        if _is_connected():
            _await_verdict(error)
        traceback.print_exc()
    # Not through the usual exit, which would wait minutes for processes that wait for this one.
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os.write(writer, _GOODBYE)
    os._exit(code)


def _await_verdict(error: BaseException) -> None:
    """Wait until JAX would have found out that another process is lost, and ended this one.

    Most errors that are nobody's fault here come from a collective in which another one is missing.
    """
    what = f"{_who()}{type(error).__name__}: {one_line(error)[:300]}"
    print(
        f"{what} (is another process lost? waiting {VERDICT} s for the answer)",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(VERDICT)


def _exit_code(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Errors for the user say which process they come from."""
    try:
        yield
    except UserError as error:
        raise ProcessError(f"{_who()}{error}") from None


def _verdict(code: int, by_its_own_will: bool, waiting_for: str) -> int:
    """The exit code of the run, after saying what the child could not say."""
    if by_its_own_will or code not in (1, -signal.SIGABRT):
        if code < 0:
            _say(
                f"this process was killed ({signal.Signals(-code).name}), by the system for lack of"
                " memory or by whoever manages the machine; the same command on all hosts resumes"
                " the run"
            )
        return code if code >= 0 else 128 - code
    _say(
        f"another process of this run was lost, or did not come ({waiting_for}); JAX's own text is"
        " above, and the last lines of the other one say why. The same command on all hosts resumes"
        " the run from its newest checkpoint"
    )
    return LOST


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _wait(child: int) -> int:
    while True:
        with contextlib.suppress(InterruptedError):
            return os.waitpid(child, 0)[1]


@contextlib.contextmanager
def _passed_on(child: int) -> Iterator[None]:
    """SIGTERM goes on to the child; Ctrl-C reaches it by itself, as one of the terminal's group."""

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    former = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; elsewhere there is no such thing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _is_connected() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave_together() -> None:
    """Wait for the other processes, which need the first one to the end."""
    if _is_connected():
        import jax

        jax.distributed.shutdown()


def _who() -> str:
    if not _is_connected():
        return ""
    import jax

    return f"process {jax.process_index()} of {jax.process_count()}: "
