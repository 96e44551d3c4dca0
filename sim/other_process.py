"""Computing in a process of its own: what is learned is computed beside the events, and not by turns with them.

Belongs here: both ends of two pipes. A frame is its length in four bytes and MessagePack; first comes the scenario, then
programs, and each is answered. The child reads the task and deals its data itself, so that no tensor ever travels.
"""

import contextlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import msgspec
from msgspec import Struct

from protocols.errors import ConfigError, LocalError
from sim.learning import Facts, make_engine
from sim.orders import Answers, Computer, Program, run_program
from sim.scenario_files import convert
from sim.scenarios import Scenario

_LENGTH = struct.Struct("<I")
END_S = 10.0
"""For the child to end by itself once a pipe is closed."""


class Setup(Struct, frozen=True, tag=True):
    """The first frame to the child."""

    scenario: dict[str, Any]
    base: str


class Describe(Struct, frozen=True, tag=True):
    """Asks for `Engine.describe`."""


class Work(Struct, frozen=True, tag=True):
    """Asks for a program's answers."""

    program: Program


class Ready(Struct, frozen=True, tag=True):
    """Answers `Setup`."""

    facts: Facts


class Done(Struct, frozen=True, tag=True):
    """Answers `Work`."""

    answers: Answers


class Described(Struct, frozen=True, tag=True):
    """Answers `Describe`."""

    engine: dict[str, Any]


class Refused(Struct, frozen=True, tag=True):
    """Answers `Setup`: the operator's mistake, as a ConfigError has it."""

    path: str
    problem: str
    allowed: str


class Broken(Struct, frozen=True, tag=True):
    """Answers anything: an exception, which ends the child."""

    detail: str


_Question = Setup | Describe | Work
_Answer = Ready | Done | Described | Refused | Broken


def compute_beside(scenario: Scenario, base: Path) -> tuple[Computer, Facts]:
    """A `MakeComputer`: in another process on this machine."""
    computer = OtherProcess()
    try:
        computer.ask(Setup(msgspec.to_builtins(scenario), str(base.resolve())))
        answer = computer.take()
    except BaseException:
        computer.close()
        raise
    assert isinstance(answer, Ready)
    return computer, answer.facts


class OtherProcess:
    """A `Computer` in a child process, which ends with this one whatever happens to it."""

    def __init__(self) -> None:
        # -P, or a folder `sim` where the command is given would be taken for this package.
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "sim.other_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._to_child: IO[bytes] = self._child.stdin
        self._from_child: IO[bytes] = self._child.stdout
        self._decoder: msgspec.msgpack.Decoder[_Answer] = msgspec.msgpack.Decoder(_Answer)
        self._asked = False

    def ask(self, question: _Question) -> None:
        """Send one question; at most one may be unanswered."""
        self._asked = True
        try:
            _write(self._to_child, question)
        except OSError as error:
            raise self._lost() from error

    def take(self) -> _Answer:
        """Wait for the answer.

        Raises ConfigError and LocalError as the child did.
        """
        frame = _read(self._from_child)
        if frame is None:
            raise self._lost()
        self._asked = False
        answer = self._decoder.decode(frame)
        if isinstance(answer, Refused):
            raise ConfigError(answer.path, answer.problem, [answer.allowed] if answer.allowed else ())
        if isinstance(answer, Broken):
            raise LocalError(f"the computing process failed: {answer.detail}")
        return answer

    def submit(self, program: Program) -> None:
        self.ask(Work(program))

    def answers(self) -> Answers:
        answer = self.take()
        assert isinstance(answer, Done)
        return answer.answers

    def describe(self) -> dict[str, object]:
        self.ask(Describe())
        answer = self.take()
        assert isinstance(answer, Described)
        return answer.engine

    def close(self) -> None:
        if self._asked:  # what it is at is for nobody any more, and may take long
            self._child.kill()
        for pipe in (self._to_child, self._from_child):
            with contextlib.suppress(OSError):  # it is gone, with a frame half-way
                pipe.close()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _lost(self) -> LocalError:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe may be gone a moment before itself
            self._child.wait(END_S)
        code = self._child.returncode
        how = "closed its pipe" if code is None else f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was ended by signal {-code}"
        return LocalError(
            f"the computing process {how}; if the memory ran out, take fewer nodes or a smaller compute.max_pending"
        )


def _write(pipe: IO[bytes], message: Struct) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(data)))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """One frame; None at the end."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    data = pipe.read(_LENGTH.unpack(head)[0])
    return data if len(data) == _LENGTH.unpack(head)[0] else None


# --- the child ------------------------------------------------------------------------------------------
def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer questions until the pipe ends."""
    decoder = msgspec.msgpack.Decoder(_Question)
    engine = None
    while (frame := _read(source)) is not None:
        question = decoder.decode(frame)
        answer: _Answer
        try:
            if isinstance(question, Setup):
                engine, facts = make_engine(convert(question.scenario), Path(question.base))
                answer = Ready(facts)
            elif isinstance(question, Describe):
                assert engine is not None
                answer = Described(engine.describe())
            else:
                assert engine is not None
                answer = Done(run_program(engine, question.program))
        except ConfigError as error:
            answer = Refused(error.path, error.problem, error.allowed)
        except Exception as error:  # the other process has to know why
            _write(sink, Broken(f"{type(error).__name__}: {error}"))
            raise
        _write(sink, answer)


def main() -> None:
    """What a task prints must not come between the frames. Ctrl-C and SIGTERM, which often go to both processes, are
    the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin.buffer, sink)
    except BrokenPipeError:  # the parent is gone, and nobody reads what is left in the buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fileno())


if __name__ == "__main__":
    main()
