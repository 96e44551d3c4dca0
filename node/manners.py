"""How a node behaves on the device that it shares: when it may work, how much, and how many bytes it may move.

Belongs here: the settings, the pure decisions on what is known of the machine, and the thin readers of both machine
and month. Who holds the work back is the driver. `docs/manners.md` says what other nodes notice of it.
"""

import math
import os
import random
import re
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, time
from typing import Annotated, Protocol

import msgspec
import psutil
from msgspec import Meta, Struct

from node.ports import Clock
from node.rate_limit import MIN_BYTES_PER_S

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
CONTROL_SHARE = 0.05
"""Of the bytes of a month, what is left for messages, which go on when the models stop, and for what TCP adds uncounted."""
WRITE_EVERY_S = 30.0
"""A crash loses the bytes of so many seconds from the month's count, and of one look more."""
WRITE_SHARE = 0.01
"""Of the bytes of a month, what is counted at most before it is written all the same: many crashes cost little."""
LEAST_INTERVAL_S = 1.0
"""CPU times are counted in steps of a hundredth of a second; over less than this their differences are noise."""


class DeviceSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What the device grants. The defaults limit nothing. `training.threads` limits the CPU threads."""

    nice: Annotated[int, Meta(ge=0, le=19)] = 0
    """How far the node steps back behind other programs for the CPU: 10 is polite, 19 takes only what nobody wants."""
    hours: str = ""
    """When the node may work, in local time: "22:00-07:00" is from ten at night until seven. Empty: always."""
    on_ac_power: bool = False
    """Work only while the device is plugged in. One without a battery always is."""
    others_busy_at_most: Annotated[float, Meta(ge=0, le=100)] = 100.0
    """Work only while other programs use at most so many percent of all CPU cores together. For "only when idle", 20 suits
    desktops; their own background load may need more."""
    free_memory_bytes: Annotated[int, Meta(ge=0)] = 0
    """Work only while so much memory is available to programs. Choose what other programs need at once; what the node
    itself holds is not counted as available."""
    look_every_s: Annotated[float, Meta(ge=1, le=3600)] = 5.0
    """Seconds between two looks at all of the above, and the time over which the use of the CPU is measured."""

    upload_bytes_per_s: Annotated[int, Meta(ge=0)] = 0
    """The node sends models no faster than this, all neighbours together; 0 is no limit. A model takes its size over this
    for each of them: others should have a `learning.deadline_s` above the sum. Messages are small and not held up."""
    download_bytes_per_s: Annotated[int, Meta(ge=0)] = 0
    """The same for models that it receives."""
    month_bytes: Annotated[int, Meta(ge=0)] = 0
    """Bytes sent and received in a calendar month, together; 0 is no limit. Once too few are left for another round, the
    node learns no further until the first of the next month. It stays linked, which took 150 to 490 MB a
    month with four links: below 10 GB choose a longer `network.heartbeat_s`."""

    train_every: Annotated[int, Meta(ge=1, le=1000)] = 1
    """The node takes part in every so-manieth round, by the time that its own last round took."""
    skip: Annotated[float, Meta(ge=0, le=0.99)] = 0.0
    """Probability to sit out each round, on top of `train_every`. Networks in which nodes sit out should have
    `weight.participation` before the mean in `learning.rule`, on all nodes."""
    steps_at_most: Annotated[int, Meta(ge=0)] = 0
    """Local steps in a round, below `training.local_steps`; 0 is no limit. The node's models then count for more, by the
    steps left out, so that its data have the same say."""
    train_at_most_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """Seconds of training in a round; 0 is no limit. At least one step is made. As with `steps_at_most`, those made say
    how much the model counts."""

    def __post_init__(self) -> None:
        """Raises ValueError for hours that are no time of the day or none at all, and for rates at which peers give up."""
        if self.hours:
            begin, end = parse_hours(self.hours)
            if begin == end:
                raise ValueError(
                    f"hours '{self.hours}' begin when they end; leave hours empty to work always"
                )
        for name in ("upload_bytes_per_s", "download_bytes_per_s"):
            if 0 < (rate := getattr(self, name)) < MIN_BYTES_PER_S:
                raise ValueError(
                    f"{name} {rate} is below {MIN_BYTES_PER_S}, where peers give up; 0 is no limit"
                )


class Conditions(Struct, frozen=True):
    """What is known of the machine and the month at one moment. The defaults hold nobody back.

    at: local time of day. others_busy_percent: of all cores together, without this process. month_bytes: sent and received
    since the first. round_bytes: what the last round moved. sits_out: whether a round is being sat out.
    """

    at: time = time(0, 0)
    on_ac_power: bool = True
    others_busy_percent: float = 0.0
    free_memory_bytes: int = 2**62
    month_bytes: int = 0
    round_bytes: int = 0
    sits_out: bool = False


# --- decisions ------------------------------------------------------------------------------------------
def may_work(settings: DeviceSettings, conditions: Conditions) -> str | None:
    """Why no round of learning may begin now; None where one may.

    The text follows from the settings alone, so that it changes only where the reason does.
    """
    if settings.hours and not is_within(settings.hours, conditions.at):
        return f"outside of {settings.hours}"
    if settings.on_ac_power and not conditions.on_ac_power:
        return "on battery power"
    if conditions.others_busy_percent > settings.others_busy_at_most:
        return f"other programs use more than {settings.others_busy_at_most:g} % of the CPU"
    if conditions.free_memory_bytes < settings.free_memory_bytes:
        return f"less than {settings.free_memory_bytes} bytes of memory are free"
    if not may_move(settings, conditions.month_bytes, conditions.round_bytes):
        return f"the {settings.month_bytes} bytes of this month are spent"
    if conditions.sits_out:
        return "sits a round out"
    return None


def may_move(settings: DeviceSettings, month_bytes: int, more_bytes: int) -> bool:
    """Whether so many more bytes of models fit into a month in which `month_bytes` were moved."""
    if not settings.month_bytes:
        return True
    return month_bytes + more_bytes < settings.month_bytes * (1 - CONTROL_SHARE)


def parse_hours(text: str) -> tuple[time, time]:
    """Begin and end of "22:00-07:00".

    Raises ValueError for anything else.
    """
    found = _HOURS.fullmatch(text)
    if found is None:
        raise ValueError(f"hours '{text}' are not written as 22:00-07:00")
    begin_hour, begin_minute, end_hour, end_minute = map(int, found.groups())
    return time(begin_hour, begin_minute), time(end_hour, end_minute)


def is_within(hours: str, at: time) -> bool:
    """Whether a time of day lies in the hours; the end is not in them.

    >>> is_within("22:00-07:00", time(6, 59)), is_within("22:00-07:00", time(7, 0))
    (True, False)
    """
    begin, end = parse_hours(hours)
    return begin <= at < end if begin < end else at >= begin or at < end


def rounds_to_sit_out(settings: DeviceSettings, draw: float) -> int:
    """How many rounds pass before the node takes part in one.

    draw: uniform in (0, 1].
    """
    skipped = int(math.log(draw) / math.log(settings.skip)) if settings.skip else 0
    return settings.train_every - 1 + skipped


# --- what is so now -------------------------------------------------------------------------------------
class Manners:
    """What holds this node back: looked up by the driver, decided by the functions above.

    read: the machine now; what is known of the month and the rounds is added here.
    month_bytes: sent and received since the first, up to this moment.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        clock: Clock,
        read: Callable[[], Conditions] = Conditions,
        month_bytes: Callable[[], int] = lambda: 0,
        rng: random.Random | None = None,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._read = read
        self._month_bytes = month_bytes
        self._rng = rng or random.Random(0)
        self._began_at: float | None = None
        self._bytes_at_begin = 0
        self._round_bytes = 0
        self._sits_out_until = -math.inf
        self.waiting: str | None = None
        """Why no round may begin, as of the last look. Training that is under way ends at its next step."""

    def look(self) -> str | None:
        """Read the conditions, and decide."""
        sits_out = self._clock.now() < self._sits_out_until
        conditions = msgspec.structs.replace(
            self._read(),
            month_bytes=self._month_bytes(),
            round_bytes=self._round_bytes,
            sits_out=sits_out,
        )
        self.waiting = may_work(self.settings, conditions)
        return self.waiting

    def next_look_s(self) -> float:
        """Seconds until the next look is due."""
        left = self._sits_out_until - self._clock.now()
        return min(left, self.settings.look_every_s) if left > 0 else self.settings.look_every_s

    def round_due(self) -> None:
        """The node wants to begin a round: now is the time to draw whether it sits some out."""
        if self._began_at is None:
            return
        now = self._clock.now()
        self._round_bytes = max(0, self._month_bytes() - self._bytes_at_begin)
        num_rounds = rounds_to_sit_out(self.settings, 1 - self._rng.random())
        self._sits_out_until = now + num_rounds * (now - self._began_at)

    def round_begins(self) -> None:
        """A round that was due begins."""
        self._began_at, self._bytes_at_begin = self._clock.now(), self._month_bytes()

    def may_move(self, size_bytes: int) -> bool:
        """Whether a model of this size may be sent or fetched."""
        return may_move(self.settings, self._month_bytes(), size_bytes)

    def pace(self) -> Callable[[int], bool]:
        """Training begins: whether to take another step after so many. Both are called from the thread that trains."""
        settings, began_at = self.settings, self._clock.now()

        def goes_on(num_steps: int) -> bool:
            return (
                self.waiting is None
                and not 0 < settings.steps_at_most <= num_steps
                and not 0 < settings.train_at_most_s <= self._clock.now() - began_at
            )

        return goes_on


# --- the machine ----------------------------------------------------------------------------------------
class Machine:
    """Reads the conditions of this machine.

    wall_clock: Unix seconds.
    """

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._process = psutil.Process()
        self._cpu = self._cpu_seconds()
        # Nothing is known yet: who wants an idle machine waits for the first measurement.
        self._others_busy_percent = 100.0

    def read(self) -> Conditions:
        """Now."""
        return Conditions(
            at=self._local().time(),
            on_ac_power=is_on_ac_power(),
            others_busy_percent=self._measured(),
            free_memory_bytes=psutil.virtual_memory().available,
        )

    def month(self) -> str:
        """The calendar month where the machine is, such as "2026-11"."""
        return self._local().strftime("%Y-%m")

    def _local(self) -> datetime:
        return datetime.fromtimestamp(self._wall_clock(), UTC).astimezone()

    def _cpu_seconds(self) -> tuple[float, float, float]:
        """Of all cores since they started, of all that were busy, of this process."""
        times = psutil.cpu_times()._asdict()
        # Linux counts a guest's time in `user` too.
        total = sum(times.values()) - times.get("guest", 0.0) - times.get("guest_nice", 0.0)
        own = self._process.cpu_times()
        return total, total - times["idle"] - times.get("iowait", 0.0), own.user + own.system

    def _measured(self) -> float:
        """The use of the CPU since the last measurement, or that one where it was a moment ago."""
        before, now = self._cpu, self._cpu_seconds()
        total, busy, own = (after - since for after, since in zip(now, before, strict=True))
        if total >= LEAST_INTERVAL_S * (psutil.cpu_count() or 1):
            self._cpu = now
            self._others_busy_percent = min(max(100 * (busy - own) / total, 0.0), 100.0)
        return self._others_busy_percent


def is_on_ac_power() -> bool:
    """Whether the device is plugged in. A machine without a battery, or that cannot tell, counts as plugged in."""
    try:
        battery = psutil.sensors_battery()
    except (
        AttributeError,
        NotImplementedError,
        OSError,
    ):  # some systems lack the call, others the files behind it
        return True
    return battery is None or battery.power_plugged is not False


def lower_priority(nice: int, warn: Callable[[str], None]) -> None:
    """Step back behind other programs by so many levels.

    On Linux a level belongs to a thread and to those it starts: call this before there are others.
    """
    if not nice:
        return
    try:
        os.nice(nice)
    except OSError as error:
        warn(f"device.nice = {nice} cannot be had ({error}); the node goes on at the priority it has")


# --- the month ------------------------------------------------------------------------------------------
class TrafficLog(Protocol):
    """Where the bytes of each month are kept."""

    def add_traffic(self, month: str, num_bytes: int) -> None: ...

    def traffic(self, month: str) -> int: ...


class Meter:
    """Counts the bytes of the calendar month, and has them survive a crash.

    moved: bytes since the process began, sent and received together. month: as `Machine.month`. limit_bytes: that the
    month is held to; 0 is none.
    """

    def __init__(
        self,
        log: TrafficLog,
        moved: Callable[[], int],
        month: Callable[[], str],
        clock: Clock,
        warn: Callable[[str], None],
        limit_bytes: int = 0,
    ) -> None:
        self._log = log
        self._most_pending = limit_bytes * WRITE_SHARE if limit_bytes else math.inf
        self._moved = moved
        self._read_month = month
        self._clock = clock
        self._warn = warn
        self._month = month()
        self._kept = log.traffic(self._month)
        self._pending = 0
        self._seen = 0
        self._written_at = clock.now()

    def month_bytes(self) -> int:
        """Bytes since the first of the month, those before this process among them."""
        moved, month = self._moved(), self._read_month()
        self._pending += moved - self._seen
        self._seen = moved
        if month != self._month:
            self.write()
            self._month, self._kept, self._pending = month, 0, 0
        elif self._pending >= self._most_pending or self._clock.now() - self._written_at >= WRITE_EVERY_S:
            self.write()
        return self._kept + self._pending

    def peek(self) -> int:
        """The same from any thread: nothing is written, and no month begins."""
        return self._kept + self._pending + self._moved() - self._seen

    def close(self) -> None:
        """Keep what was counted up to now."""
        self.month_bytes()
        self.write()

    def write(self) -> None:
        """Keep what was counted so far. A disk that refuses is warned of, and tried again later."""
        self._written_at = self._clock.now()
        try:
            self._log.add_traffic(self._month, self._pending)
        except sqlite3.Error as error:
            self._warn(f"the bytes of this month are not written: {error}")
        else:
            self._kept, self._pending = self._kept + self._pending, 0


def device_manners(
    settings: DeviceSettings,
    log: TrafficLog,
    moved: Callable[[], int],
    clock: Clock,
    wall_clock: Callable[[], float],
    warn: Callable[[str], None],
) -> tuple[Manners, Meter]:
    """The manners of a node on this machine, and the meter to be written at its end. The arguments are theirs."""
    machine = Machine(wall_clock)
    meter = Meter(log, moved, machine.month, clock, warn, settings.month_bytes)
    rng = random.Random(os.urandom(16))
    return Manners(settings, clock, machine.read, meter.month_bytes, rng), meter
