"""One seed, one whole adverse configuration: what befalls a swarm of nodes, and when it stops.

Belongs here: which faults there are, how often and how hard each is drawn, and how long a node may then take. Every
fault ends by a drawn moment, so that a run can be judged by what comes after it. How a fault acts is said where it
acts, in `links.py`, `churn.py`, `timeline.py` and `world.py`.
"""

import random
from collections.abc import Callable
from math import exp, inf
from typing import Any

import msgspec
from msgspec import Struct

from protocols.final_merge import num_stages
from protocols.gossip import GossipSettings
from protocols.sampling import SampledSettings
from protocols.scalar_terms import ScalarSettings
from protocols.scalars import GRACE, MAX_SETTLING, PATIENCE
from sim.checkers import Limits, Liveness
from sim.scenarios import Scenario

Tables = dict[str, Any]
"""A scenario in the making, as the tables of its TOML."""


class Adversity(Struct, frozen=True):
    """A scenario and what is known of its faults."""

    scenario: Scenario
    stops_at_s: float
    """Virtual time from which on there is no fault any more, but for messages that come double or late."""
    kinds: tuple[str, ...]
    """The faults that were drawn, by their names in `FAULTS`."""


# --- the faults: each writes its own fields -------------------------------------------------------------
def _loss(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["links"]["loss"] = _share(rng, 0.3)
    tables["timeline"].append(f"at {stops_at_s} s: loss 0 %")


def _duplication(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["links"]["duplication"] = _share(rng, 0.3)


def _reordering(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["links"] |= {"reordering": _share(rng, 0.3), "reorder_s": rng.choice([0.05, 0.5, 5.0])}


def _corruption(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["links"]["corruption"] = _share(rng, 0.2)


def _latency(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["links"] |= {
        "latency": rng.choice(["constant", "lognormal"]),
        "latency_s": rng.choice([0.0, 0.1, 0.3]),
        "sigma": rng.choice([0.3, 1.0]),
        "jitter_s": rng.choice([0.0, 0.05, 0.5]),
    }


def _narrow_lines(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    """A model takes about as long as a round, or several."""
    model_bytes = tables["data"]["model_bytes"]
    tables["links"] |= {
        "up_bytes_per_s": model_bytes / rng.uniform(0.2, 5.0),
        "down_bytes_per_s": model_bytes / rng.uniform(0.05, 2.0),
    }


def _impatience(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["links"] |= {
        "dial_timeout_s": rng.choice([1.0, 3.0]),
        "fetch_timeout_s": rng.choice([0.3, 2.0]),
    }


def _nat(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    public = rng.choice([0.3, 0.5, 0.8])
    reachable = [("public", "public"), ("home", "public")]
    if rng.random() < 0.3:
        reachable.append(("public", "home"))
    tables["nat"] = {
        "classes": [{"name": "public", "share": public}, {"name": "home", "share": 1 - public}],
        "reachable": reachable,
    }


def _slow_devices(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    slow = rng.choice([0.2, 0.5])
    tables["devices"] |= {
        "classes": [
            {"name": "fast", "share": 1 - slow},
            {"name": "slow", "share": slow, "slowdown": rng.choice([3.0, 10.0])},
        ],
        "spread": rng.choice([0.0, 0.5]),
    }


def _clocks(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["devices"] |= {
        "clock_offset_s": rng.choice([0.0, 10.0, 1e6]),
        "clock_drift": rng.choice([1e-4, 0.01, 0.2]),
    }


def _crashes(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    for _ in range(rng.randint(1, 3)):
        _befall(rng, tables, stops_at_s, f"crash {rng.choice([10, 30, 80])} %")
    _come_back(rng, tables, stops_at_s)


def _wipes(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    _befall(rng, tables, stops_at_s, f"wipe {rng.choice([10, 50])} %")
    _come_back(rng, tables, stops_at_s)


def _leaving(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    _befall(rng, tables, stops_at_s, f"leave {rng.choice([10, 50])} %")
    _come_back(rng, tables, stops_at_s)


def _silence(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    """Some wake, some are switched off and on, some stay as they are."""
    began_at_s = rng.randint(2, stops_at_s - 10)
    tables["timeline"].append(f"at {began_at_s} s: silence {rng.choice([10, 40, 80])} %")
    if rng.random() < 0.5:
        tables["timeline"].append(f"at {rng.randint(began_at_s + 1, stops_at_s - 4)} s: wake 50 %")
    if rng.random() < 0.8:
        tables["timeline"].append(f"at {stops_at_s} s: wake all")


def _partition(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    _befall(rng, tables, stops_at_s, f"partition {rng.choice(['a|b', 'a|b|c'])}")
    tables["timeline"].append(f"at {stops_at_s} s: heal")


def _churn(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["churn"] |= {
        "model": rng.choice(["exponential", "weibull", "lognormal"]),
        "mean_online_s": rng.choice([3.0, 10.0, 30.0]),
        "mean_offline_s": rng.choice([0.5, 3.0, 10.0]),
        "shape": rng.choice([0.4, 1.0]),
        "wipe_share": rng.choice([0.0, 0.5]),
        "leave_share": rng.choice([0.0, 0.5]),
        "until_s": float(stops_at_s),
    }
    tables["timeline"].append(f"at {stops_at_s} s: restart all")


def _small_buffers(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    tables["exchange"] = {
        "max_parallel_fetches": rng.choice([1, 2]),
        "max_waiting": rng.choice([1, 3]),
        "max_attempts": rng.choice([1, 2]),
        "retry_s": rng.choice([0.05, 2.0]),
        "num_generations": 1,
    }
    tables["view"] |= {"max_known": 8}


FAULTS: dict[str, tuple[float, Callable[[random.Random, Tables, int], None]]] = {
    "loss": (0.3, _loss),
    "duplication": (0.25, _duplication),
    "reordering": (0.25, _reordering),
    "corruption": (0.25, _corruption),
    "latency": (0.4, _latency),
    "narrow lines": (0.3, _narrow_lines),
    "impatience": (0.25, _impatience),
    "nat": (0.2, _nat),
    "slow devices": (0.3, _slow_devices),
    "clocks": (0.3, _clocks),
    "crashes": (0.35, _crashes),
    "wipes": (0.25, _wipes),
    "leaving": (0.25, _leaving),
    "silence": (0.3, _silence),
    "partition": (0.3, _partition),
    "churn": (0.3, _churn),
    "small buffers": (0.3, _small_buffers),
}
"""Each fault's share of the seeds, and how it is drawn. Drawn in this order: append, or old seeds change."""


def draw_faults(seed: int) -> Adversity:
    """A swarm and what befalls it: 3 to 24 nodes of any topology, and any combination of faults.

    Nearly all are dry runs; one in thirty learns a small task.
    """
    rng = random.Random(seed)
    stops_at_s = rng.randint(20, 60)
    tables = _healthy(rng, seed)
    tables["gossip"] |= _schedule(random.Random(f"{seed} schedule"), tables["gossip"]["rounds"])
    _choose_learning(random.Random(f"{seed} learning"), tables)
    kinds = [name for name, (share, _) in FAULTS.items() if rng.random() < share]
    for name in kinds:
        FAULTS[name][1](rng, tables, stops_at_s)
    tables["timeline"] = sorted(dict.fromkeys(tables["timeline"]), key=_moment)
    if rng.random() < 1 / 30:
        _learn(tables)
    scenario = msgspec.convert(tables, Scenario)
    return Adversity(_with_end(scenario, stops_at_s), float(stops_at_s), tuple(kinds))


def _healthy(rng: random.Random, seed: int) -> Tables:
    """A network as it might be, before anything befalls it."""
    nodes = rng.randint(3, 24)
    heartbeat_s = rng.choice([0.5, 2.0, 5.0])
    return {
        "name": f"swarm {seed}",
        "seed": seed,
        "nodes": nodes,
        "dry_run": True,
        "timeline": [],
        "data": {"model_bytes": rng.choice([1_000, 100_000, 5_000_000])},
        "topology": {
            "kind": rng.choice(["regular", "ring", "full", "discover", "discover"]),
            "degree": rng.choice([2, 2, 3 if nodes > 3 and nodes % 2 == 0 else 2, 4 if nodes > 4 else 2]),
        },
        "gossip": {
            # One network in seven has no last round and goes on until the time is up.
            "rounds": rng.choice([0, *[rng.randint(5, 30)] * 6]),
            "quorum": rng.choice([0.0, 0.5, 1.0]),
            "fanout": rng.choice([0, 0, 1, 2]),
            "deadline_s": rng.choice([0.5, 2.0, 5.0]),
            "pause_s": rng.choice([0.0, 1.0]),
            "keep_every": rng.choice([1, 3]),
            "wait_for_peers": rng.choice([0, 0, 1, 2]),
            "wait_at_most_s": rng.choice([2.0, 10.0]),
        },
        "view": {
            "heartbeat_s": heartbeat_s,
            "dead_after_s": heartbeat_s * rng.choice([2.5, 4.0]),
            "greeting_s": rng.choice([2.0, 10.0]),
            "redial_base_s": rng.choice([0.2, 1.0]),
            "redial_max_s": rng.choice([5.0, 20.0]),
        },
        "links": {"encode": rng.random() < 0.2},
        "devices": {"train_s": rng.choice([0.1, 0.5, 2.0])},
        "churn": {"join_within_s": rng.choice([0.0, 1.0, 8.0])},
        "evaluation": {"share": rng.choice([0.2, 1.0]), "every": rng.choice([1, 3])},
    }


def _schedule(rng: random.Random, rounds: int) -> Tables:
    """When there are exchanges, and what comes after the last. By a generator of its own: old seeds draw all else as ever."""
    tables: Tables = {}
    if rng.random() < 0.3:
        tables["exchange_every"] = rng.choice([2, 3, 7])
    if rng.random() < 0.2:
        tables["window_s"] = rng.choice([0.3, 1.0, 5.0])
    if rng.random() < 0.2:
        tables["fanout"] = rng.choice([0.2, 1.5])
    if rounds and rng.random() < 0.3:
        dense_from = rng.choice([0.0, 0.3, 0.5, 0.9])
        tables["dense_from"] = dense_from
        tables["dense_until"] = rng.choice([1.0, round(dense_from + 0.05, 2)])
        tables["sparse_fanout"] = rng.choice([0, 0.2, 1, 1.5])
    if rounds and rng.random() < 0.5:
        tables["final_merge"] = rng.choice(["butterfly", "aggregator"])
        tables["final_deadline_s"] = rng.choice([0.5, 2.0, 5.0])
        tables["final_keep"] = rng.choice(["merged", "better"])
    return tables


def _choose_learning(rng: random.Random, tables: Tables) -> None:
    """A third of the networks learn by scalars, and a third by sampling. By a generator of its own, as above."""
    drawn = rng.random()
    if drawn >= 1 / 3:
        if drawn >= 2 / 3:
            _sample(rng, tables)
        return
    tables["learning"] = "scalars"
    tables["scalars"] = {
        "rounds": tables["gossip"]["rounds"],
        "samples": rng.choice([1, 4]),
        "schedule": "constant",
        "weight_decay": rng.choice([0.0, 0.1]),
        "quorum": rng.choice([0.0, 0.5, 0.8, 1.0]),
        "deadline_s": rng.choice([0.5, 2.0, 5.0]),
        "pause_s": rng.choice([0.0, 0.0, 1.0]),
        "checkpoint_every": rng.choice([2, 5, 10]),
        "late_rounds": rng.choice([0, 2, 5]),
        # One in four has to leave authors out.
        "max_authors": rng.choice([1024, 1024, 1024, max(1, tables["nodes"] // 2)]),
        "wait_for_peers": tables["gossip"]["wait_for_peers"],
        "wait_at_most_s": tables["gossip"]["wait_at_most_s"],
        "sync_s": rng.choice([0.0, 0.5, 2.0]),
        "batch_s": rng.choice([0.0, 0.05, 0.3]),
        "repair_s": rng.choice([0.5, 2.0, 5.0]),
    }
    tables["devices"]["estimate_s"] = rng.choice([0.01, 0.1, 0.5])
    if not tables["scalars"]["rounds"]:  # as many as the time has room for, which should not be thousands
        tables["scalars"]["pause_s"] = 1.0


def _sample(rng: random.Random, tables: Tables) -> None:
    """There is always a last round: without one the quickest networks would go through thousands."""
    nodes: int = tables["nodes"]
    # Samples are drawn from everybody, so everybody must be able to hear of everybody.
    tables["topology"]["kind"] = rng.choice(["discover", "discover", "full"])
    tables["learning"] = "sampled"
    tables["sampled"] = {
        "rounds": tables["gossip"]["rounds"] or 20,
        "sample_size": rng.randint(1, min(nodes, 8)),
        "aggregators": rng.choice([1, 1, 1, 2, 3]),
        "success_fraction": rng.choice([0.5, 0.8, 1.0]),
        "deadline_s": rng.choice([2.0, 5.0, 10.0]),
        "at_least": rng.choice([1, 3]),
        "ping_s": rng.choice([1.0, 3.0]),
        "window": rng.choice([4, 20, 100]),
        "order": rng.choice(["beacon", "md5"]),
        "pause_s": rng.choice([0.0, 0.0, 1.0]),
        "keep_every": tables["gossip"]["keep_every"],
        "follow_every": rng.choice([0, 0, 3]),
        "wait_at_most_s": tables["gossip"]["wait_at_most_s"],
        "fanout": rng.choice([1, 3]),
    }


def _learn(tables: Tables) -> None:
    tables["dry_run"] = False
    tables["nodes"] = min(tables["nodes"], 8)
    tables["data"] = {"task": "digits", "options": {"hidden": [4]}, "samples_per_node": 16}
    tables["training"] = {"local_steps": 1, "batch_size": 4}
    for learning in ("gossip", "sampled", "scalars"):
        if learning in tables:
            tables[learning]["rounds"] = min(tables[learning]["rounds"] or 10, 10)
    tables["topology"]["degree"] = 2


def _share(rng: random.Random, most: float) -> float:
    return round(rng.uniform(0.01, most), 3)


def _befall(rng: random.Random, tables: Tables, stops_at_s: int, what: str) -> None:
    tables["timeline"].append(f"at {rng.randint(2, stops_at_s - 4)} s: {what}")


def _come_back(rng: random.Random, tables: Tables, stops_at_s: int) -> None:
    """Before all is over, at the end, or never."""
    if rng.random() < 0.5:
        _befall(rng, tables, stops_at_s, f"restart {rng.choice([50, 100])} %")
    if rng.random() < 0.7:
        tables["timeline"].append(f"at {stops_at_s} s: restart all")


def _moment(line: str) -> int:
    return int(line.split()[1])


# --- how long a node may take ---------------------------------------------------------------------------
SLACK_S = 5.0


def limits_of(adversity: Adversity) -> Limits:
    """When an answer is overdue in this scenario."""
    scenario, links = adversity.scenario, adversity.scenario.links
    return Limits(
        work_s=_slowest(scenario) * max(_durations(scenario)) + SLACK_S,
        fetch_s=_fetch_s(scenario),
        dial_s=links.dial_timeout_s + 8 * _one_way(scenario) + SLACK_S,
        since_s=adversity.stops_at_s,
    )


def _fetch_s(scenario: Scenario) -> float:
    links = scenario.links
    # A line is shared by all whom it may serve at once.
    rate = min(
        links.up_bytes_per_s / max(1, scenario.nodes - 1),
        links.down_bytes_per_s / scenario.exchange.max_parallel_fetches,
    )
    return 2 * _model_bytes(scenario) / rate + 2 * links.fetch_timeout_s + 4 * _one_way(scenario) + SLACK_S


def liveness_of(adversity: Adversity) -> Liveness:
    """What must have come true by the end of this scenario.

    Links are only looked at where nothing keeps two nodes apart for good, or again and again.
    """
    scenario, way_s = adversity.scenario, _one_way(adversity.scenario)
    steady = (
        not set(adversity.kinds) & {"nat", "corruption", "reordering"}
        and 8 * way_s < scenario.links.dial_timeout_s
        and 2 * way_s < scenario.view.greeting_s
    )
    return Liveness(
        stops_at_s=adversity.stops_at_s,
        round_s=_round_s(scenario),
        links_s=_links_s(scenario) if steady else inf,
        settled_s=_settled_s(scenario) if _can_agree(adversity) else inf,
        one_end=_ends_alike(adversity),
    )


def _can_agree(adversity: Adversity) -> bool:
    """Where nodes that have parted find one log again. Not on sparse graphs: a node takes over another state only where
    two of its neighbours stand on it, and at a border between two parts of a ring nobody has two on the other side."""
    scenario = adversity.scenario
    steady = not set(adversity.kinds) & {"nat", "corruption"}
    patient = scenario.scalars.late_rounds >= 2 and scenario.scalars.quorum >= 0.5
    return scenario.learning == "scalars" and scenario.topology.kind == "full" and steady and patient


def _ends_alike(adversity: Adversity) -> bool:
    """Where nobody who is waited for is ever cut off: a part of a network that hears nothing of the rest goes on by itself.
    The simulator names what several aggregators make of the same models by its maker, so there is one."""
    scenario = adversity.scenario
    whole = set(adversity.kinds) <= {"duplication", "latency", "clocks", "small buffers"}
    return scenario.learning == "sampled" and scenario.sampled.aggregators == 1 and whole


def _with_end(scenario: Scenario, stops_at_s: float) -> Scenario:
    """Time enough for all rounds after the faults, or, without a last round, for a few, and for all links."""
    if scenario.learning == "scalars":
        after_s = max(_settled_s(scenario), _links_s(scenario))
        return msgspec.structs.replace(scenario, at_most_s=stops_at_s + after_s + SLACK_S)
    if scenario.learning == "sampled":
        sampled: SampledSettings = scenario.sampled
        # Few rounds go wrong as badly as one can.
        work_s = _slowest(scenario) * sum(_durations(scenario)) + 2 * _fetch_s(scenario)
        usual_s = work_s + (sampled.deadline_s + sampled.pause_s) * _DRIFT
        rounds_s = sampled.rounds * usual_s + 3 * _round_s(scenario) + sampled.wait_at_most_s * _DRIFT
        return msgspec.structs.replace(
            scenario, at_most_s=stops_at_s + rounds_s + 2 * _links_s(scenario) + SLACK_S
        )
    gossip: GossipSettings = scenario.gossip
    rounds_s = (gossip.rounds or 3) * _round_s(scenario) + gossip.wait_at_most_s * _DRIFT + _final_s(scenario)
    return msgspec.structs.replace(
        scenario, at_most_s=stops_at_s + max(rounds_s, _links_s(scenario)) + SLACK_S
    )


_DRIFT = 1.3
"""Virtual seconds that one second of the slowest clock lasts, at most."""
_REST_S = 5.0
"""Of a node whose training failed."""


def _round_s(scenario: Scenario) -> float:
    if scenario.learning == "scalars":
        scalars: ScalarSettings = scenario.scalars
        waits_s = (1 + GRACE) * scalars.deadline_s + max(scalars.pause_s, _REST_S)
        return _slowest(scenario) * sum(_durations(scenario)) + waits_s * _DRIFT + SLACK_S
    if scenario.learning == "sampled":
        return _sampled_round_s(scenario)
    gossip = scenario.gossip
    waits_s = (gossip.window_s or gossip.deadline_s) + max(gossip.pause_s, _REST_S)
    return _slowest(scenario) * sum(_durations(scenario)) + waits_s * _DRIFT + SLACK_S


def _sampled_round_s(scenario: Scenario) -> float:
    """A sample that is looked for until nobody answers, models that come late or not at all, and a round begun anew."""
    sampled = scenario.sampled
    drawing_s = sampled.ping_s * (2 + scenario.nodes / 4)
    waits_s = (
        3 * sampled.deadline_s
        + (sampled.stall_s or sampled.deadline_s)
        + 2 * drawing_s
        + max(sampled.pause_s, _REST_S)
    )
    return (
        _slowest(scenario) * sum(_durations(scenario)) + waits_s * _DRIFT + 2 * _fetch_s(scenario) + SLACK_S
    )


def _settled_s(scenario: Scenario) -> float:
    """All rounds, the wait for the others at the end, and time for those who parted to find one log again: links first,
    then a state's way from neighbour to neighbour."""
    scalars: ScalarSettings = scenario.scalars
    rounds_s = (scalars.rounds or 3) * _round_s(scenario) + scalars.wait_at_most_s * _DRIFT
    settling_s = (MAX_SETTLING + 2) * scalars.deadline_s * _DRIFT
    step_s = (PATIENCE + 8) * scalars.repair_s * _DRIFT + _fetch_s(scenario)
    if not scalars.rounds:
        return _links_s(scenario) + rounds_s
    return _links_s(scenario) + rounds_s + settling_s + (2 + scenario.nodes // 2) * step_s


def _final_s(scenario: Scenario) -> float:
    """The others are awaited, then every stage, or the result of a session that began before."""
    gossip = scenario.gossip
    if gossip.final_merge == "none":
        return 0.0
    stages = num_stages(gossip.final_merge, scenario.nodes)
    work_s = _slowest(scenario) * sum(_durations(scenario)) * (stages + 3)
    return (2 * stages + 3) * gossip.final_deadline_s * _DRIFT + work_s + SLACK_S


def _links_s(scenario: Scenario) -> float:
    """A dead link is found, and a dial or two to everybody whom a node may try in vain has failed."""
    view, dial_s = scenario.view, scenario.links.dial_timeout_s + 8 * _one_way(scenario)
    found_s = view.dead_after_s + 2 * view.heartbeat_s + view.greeting_s
    return (found_s + 4 * (view.redial_max_s + dial_s)) * _DRIFT + SLACK_S


def _slowest(scenario: Scenario) -> float:
    devices = scenario.devices
    return max([1.0, *(item.slowdown for item in devices.classes)]) * (1 + devices.spread)


def _durations(scenario: Scenario) -> tuple[float, float, float]:
    """Of the pieces of work that a round may have."""
    devices, scalars = scenario.devices, scenario.scalars
    if scenario.learning == "scalars":
        # All that was ever said, from the base.
        most = (scalars.rounds or 1000) * scenario.nodes * scalars.samples
        return devices.estimate_s * scalars.samples, devices.replay_s * most, devices.evaluate_s
    return devices.train_s, devices.aggregate_s, devices.evaluate_s


def _one_way(scenario: Scenario) -> float:
    """About the longest; four standard deviations of a lognormal."""
    links = scenario.links
    spread = exp(4 * links.sigma) if links.latency == "lognormal" else 1.0
    return links.latency_s * spread + links.jitter_s


def _model_bytes(scenario: Scenario) -> int:
    return scenario.data.model_bytes


# --- for the reader -------------------------------------------------------------------------------------
def describe(adversity: Adversity) -> str:
    """The configuration in lines: what differs from the defaults, one field a line, as `--set` takes it."""
    kinds = ", ".join(adversity.kinds) or "none"
    plain = msgspec.to_builtins(msgspec.convert({}, Scenario))
    drawn = msgspec.to_builtins(adversity.scenario)
    return "\n".join(
        [f"faults: {kinds}; they stop at {adversity.stops_at_s:g} s", *_differences("", plain, drawn)]
    )


def _differences(path: str, plain: dict[str, Any], drawn: dict[str, Any]) -> list[str]:
    lines = []
    for name, value in drawn.items():
        if isinstance(value, dict) and isinstance(plain.get(name), dict) and plain[name]:
            lines += _differences(f"{path}{name}.", plain[name], value)
        elif value != plain.get(name):
            lines.append(f"  {path}{name} = {msgspec.json.encode(value).decode()}")
    return lines
