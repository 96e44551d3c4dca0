"""Whose fault it is. A broken invariant of ours is an `assert`, never one of these."""

from collections.abc import Iterable

from protocols.vocabulary import Reason, one_line


class CoveyError(Exception):
    """Never raised itself: one of the three below says who must act."""


class LocalError(CoveyError):
    """Our own caller or machine: a wrong call, a full disk, a damaged file."""


class PeerError(CoveyError):
    """A peer sent what it should not have, or broke off. State is as it was before."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
        self.reason = reason
        self.detail = one_line(detail)


class ConfigError(CoveyError):
    """The operator: which field, what was found, what is allowed."""

    def __init__(self, path: str, problem: str, allowed: Iterable[str] = ()) -> None:
        choices = ", ".join(allowed)
        super().__init__(f"{path}: {problem}" + (f" (allowed: {choices})" if choices else ""))
        self.path = path
        self.problem = problem
        self.allowed = choices
