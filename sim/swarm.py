"""Many adverse runs, one seed each: what the core promises must hold in all of them.

Belongs here: running seeds with all checkers on, in this process or in several, and telling of a failure so that it
can be had again. What is drawn is said in `faults.py`, what is checked in `checkers.py`.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice
from math import inf
from multiprocessing import get_context

from msgspec import Struct

from node.core import NodeCore
from sim.checkers import Checkers, Violation
from sim.faults import describe, draw_faults, limits_of, liveness_of
from sim.scalar_checkers import apart
from sim.world import World

STEPS_BETWEEN_LOOKS = 256
"""At whether all logs agree."""
MakeCore = Callable[..., NodeCore]


class SwarmOutcome(Struct, frozen=True):
    """How one seed went."""

    seed: int
    ok: bool
    violation: str
    """What was broken, how to have it again, and what was drawn; empty where all held."""
    rule: str
    """The broken rule's name, or the exception's; empty where all held."""
    events: int
    virtual_s: float
    wall_s: float
    trace_hash: str
    """Empty where the run broke off."""
    faults: tuple[str, ...]


def run_seed(seed: int, core: MakeCore = NodeCore) -> SwarmOutcome:
    """One adverse run from first to last, with every rule checked after every event.

    core: makes the nodes' cores; another one than the real to see that a fault is found.
    """
    adversity = draw_faults(seed)
    checkers = Checkers(limits_of(adversity), encode=True)
    began_at = time.perf_counter()
    rule = violation = trace_hash = ""
    world = None
    try:
        world = World(adversity.scenario, checkers=checkers, core=core)
        trace_hash = world.run().trace_hash
        liveness = liveness_of(adversity)
        _go_on(world, liveness.stops_at_s + liveness.links_s)
        _settle(world, liveness.stops_at_s + liveness.settled_s)
        checkers.finish(world.clock.now())
        liveness.check(world, checkers)
    except Violation as error:
        rule, violation = error.rule, str(error)
    except Exception as error:  # whatever breaks, the seed must be told
        rule, violation = type(error).__name__, _told(error)
    if violation:
        violation = f"{violation}\nagain: {command_of(seed)}\n{describe(adversity)}"
    return SwarmOutcome(
        seed=seed,
        ok=not violation,
        violation=violation,
        rule=rule,
        events=checkers.num_events,
        virtual_s=world.clock.now() if world is not None else 0.0,
        wall_s=time.perf_counter() - began_at,
        trace_hash=trace_hash,
        faults=adversity.kinds,
    )


def _go_on(world: World, until_s: float) -> None:
    """A run may end with the last round, before all links have come back: nodes that are done go on serving."""
    if until_s == inf or not world.scenario.dry_run:
        return
    while (due_s := world.clock.due_at()) is not None and due_s <= until_s:
        world.clock.step()


def _settle(world: World, until_s: float) -> None:
    """Nodes that have parted go on finding each other after their last round: until they have, or had the time for it."""
    if until_s == inf:
        return
    steps = 0
    while (due_s := world.clock.due_at()) is not None and due_s <= until_s:
        cores = {node.peer: node.core for node in world.nodes if node.online and node.core is not None}
        if steps % STEPS_BETWEEN_LOOKS == 0 and not apart(cores):
            return
        world.clock.step()
        steps += 1


def command_of(seed: int) -> str:
    """What an operator types to run this seed again."""
    return f"covey sim swarm --seed {seed} --verbose"


def run_many(
    seeds: Iterable[int],
    jobs: int = 1,
    on_outcome: Callable[[SwarmOutcome], None] = lambda outcome: None,
) -> list[SwarmOutcome]:
    """Every seed, in `jobs` processes at once; the outcomes in the order of the seeds.

    on_outcome: told of each as it comes, in whatever order. Ctrl-C ends it as usual; runs under way are given up.
    """
    order = list(seeds)
    outcomes = _in_turn(order, on_outcome) if jobs <= 1 else _at_once(order, jobs, on_outcome)
    return [outcomes[seed] for seed in order]


def _in_turn(seeds: list[int], on_outcome: Callable[[SwarmOutcome], None]) -> dict[int, SwarmOutcome]:
    outcomes = {}
    for seed in seeds:
        outcomes[seed] = run_seed(seed)
        on_outcome(outcomes[seed])
    return outcomes


def _at_once(
    seeds: list[int], jobs: int, on_outcome: Callable[[SwarmOutcome], None]
) -> dict[int, SwarmOutcome]:
    """A few seeds ahead of the processes, so that an interrupted swarm ends soon."""
    outcomes: dict[int, SwarmOutcome] = {}
    left = iter(seeds)
    # A fork would copy torch's threads half-way.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        under_way: set[Future[SwarmOutcome]] = {
            pool.submit(run_seed, seed) for seed in islice(left, 2 * jobs)
        }
        try:
            while under_way:
                ended, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ended:
                    outcome = outcomes[future.result().seed] = future.result()
                    on_outcome(outcome)
                    under_way |= {pool.submit(run_seed, seed) for seed in islice(left, 1)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _told(error: Exception) -> str:
    """An exception and where it was raised."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        where = f"{trace.tb_frame.f_code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{type(error).__name__} at {where}: {error}"
