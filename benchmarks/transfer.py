"""What the network costs: fetch speed against a bare libp2p stream, CPU of a message, loop lateness, idle CPU.

Everything runs between real daemon processes on loopback, and what is compared runs in the same call.

    python benchmarks/transfer.py [--json] [--repeats N]

fetch_ratio_to_bare_stream  throughput of fetching a 39 MB model (decision to fetch until held and checked)
                            over that of a bare py-libp2p stream between two processes; median of the pairs
three_sources_speedup       how much faster a model of that size comes from three peers, whose uplinks are limited to
                            8 MB/s each, than from one of them
control_message_cpu_ms      CPU of both ends together for one small message on a standing link, at 250 a second
                            each way; `control_message_sparse_cpu_ms` is the same at 50, where each one finds
                            both processes asleep and the caches cold
loop_lateness_ms_max        worst lateness of a daemon's asyncio loop while it trains without a pause
idle_cpu_percent            of one core, of a linked daemon that is done learning
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.custom_types import TProtocol
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

from node.cluster import Cluster, LocalNode, local_settings
from node.libp2p_network import Libp2pNetwork, _make_host
from node.ports import NetworkEvent
from node.store import BlobStore
from protocols.events import Fetched, LinkUp
from protocols.vocabulary import ModelRef, PeerId

HIDDEN = [3100, 3100]
"""The digits MLP with 9.8 million parameters."""
MODEL_BYTES = 4 * (64 * 3100 + 3100 + 3100 * 3100 + 3100 + 3100 * 10 + 10)
"""39.4 MB of float32."""
BARE = TProtocol("/bare/1")
WRITE_BYTES = 1024 * 1024
UP_BYTES_PER_S = 8_000_000
LISTEN = ["/ip4/127.0.0.1/tcp/0"]
BEATS = 'covey_messages_total{direction="out",kind="beat"}'


# --- a bare stream: no covey, no checks, no disk ----------------------------------------------------------
def serve_bare(size: int, pipe: Connection) -> None:
    """Send `size` bytes on every stream that is opened."""

    async def main() -> None:
        listen = [Multiaddr(address) for address in LISTEN]
        host = _make_host(Ed25519PrivateKey.generate(), listen, lambda detail: None)
        block = bytes(WRITE_BYTES)

        async def send(stream: Any) -> None:
            await stream.read(1)
            for start in range(0, size, WRITE_BYTES):
                await stream.write(block[: min(WRITE_BYTES, size - start)])
            await stream.close()

        async with host.run(listen_addrs=listen):
            host.set_stream_handler(BARE, send)
            pipe.send(str(host.get_addrs()[0]))
            await trio.sleep_forever()

    trio.run(main)


def read_bare(address: str, size: int) -> float:
    """Seconds to read everything from one fresh stream on a standing connection."""

    async def main() -> float:
        host = _make_host(Ed25519PrivateKey.generate(), [], lambda detail: None)
        info = info_from_p2p_addr(Multiaddr(address))
        async with host.run(listen_addrs=[]):
            await host.get_network().dial_addr(info.addrs[0], info.peer_id)  # type: ignore[attr-defined]
            began = time.perf_counter()
            stream = await host.new_stream(info.peer_id, [BARE])
            await stream.write(b"x")
            received = 0
            while received < size:
                try:
                    received += len(await stream.read(WRITE_BYTES))
                except StreamEOF:
                    break
            assert received == size, f"{received} of {size} bytes"
            return time.perf_counter() - began

    return trio.run(main)


# --- several sources ----------------------------------------------------------------------------------------
def serve_model(folder: Path, pipe: Connection) -> None:
    """One node with a limited uplink that holds the model, until the other end of the pipe says something."""

    async def main() -> None:
        store = BlobStore(folder, lambda path: None)
        ref = store.save(random.Random(1).randbytes(MODEL_BYTES), 1, 1)
        key = Ed25519PrivateKey.generate()
        network = Libp2pNetwork(key, LISTEN, store, lambda event: None, up_bytes_per_s=UP_BYTES_PER_S)
        (address, *_) = await network.start()
        pipe.send((address, network.me, ref))
        await asyncio.to_thread(pipe.recv)
        await network.stop()

    asyncio.run(main())


async def fetch_from_some(folder: Path, sources: list[tuple[str, PeerId, ModelRef]]) -> list[float]:
    """Seconds of a fetch from the first source, and of one from all."""
    heard: asyncio.Queue[NetworkEvent] = asyncio.Queue()
    store = BlobStore(folder, lambda path: None)
    network = Libp2pNetwork(Ed25519PrivateKey.generate(), LISTEN, store, heard.put_nowait)
    await network.start()
    for address, _, _ in sources:
        network.dial(address)
    for _ in sources:
        assert isinstance(await heard.get(), LinkUp)
    peers, ref, times = [peer for _, peer, _ in sources], sources[0][2], []
    for token, others in enumerate(([], peers[1:])):
        began = time.perf_counter()
        network.fetch(token, peers[0], ref, others)
        event = await heard.get()
        assert isinstance(event, Fetched), event
        times.append(time.perf_counter() - began)
        store.forget(ref.digest)
    await network.stop()
    return times


def measure_parallel(folder: Path, say: Callable[[str], None]) -> dict[str, float]:
    """The same model from one of three peers and from all of them."""
    context = multiprocessing.get_context("spawn")
    pipes, servers = [], []
    for number in range(3):
        home = folder / str(number)
        home.mkdir(parents=True)
        ours, theirs = context.Pipe()
        servers.append(context.Process(target=serve_model, args=(home, theirs), daemon=True))
        servers[-1].start()
        pipes.append(ours)
    home = folder / "client"
    home.mkdir()
    one_s, three_s = asyncio.run(fetch_from_some(home, [pipe.recv() for pipe in pipes]))
    for pipe, server in zip(pipes, servers, strict=True):
        pipe.send("stop")
        server.join()
    say(f"from one peer of 8 MB/s {one_s:.2f} s, from three {three_s:.2f} s")
    return {"three_sources_speedup": one_s / three_s}


# --- daemons ----------------------------------------------------------------------------------------------
def cpu_seconds(node: LocalNode) -> float:
    times = psutil.Process(node.pid).cpu_times()
    return float(times.user + times.system)


def settings(index: int, bootstrap: list[str], **tables: Any) -> dict[str, Any]:
    network = {"bootstrap": bootstrap, **tables.pop("network", {})}
    return local_settings(network=network, **{"task": {"shard": {"index": index, "count": 2}}, **tables})


def wait_for_rest(node: LocalNode, round_: int) -> None:
    """Until the node rests after its round. Asked seldom: questions cost CPU, which is what is measured."""
    for _ in range(200):
        time.sleep(0.5)
        status = node.status()
        if status and status["phase"] == "pausing" and status["round"] >= round_:
            return
    raise AssertionError(f"no rest after round {round_}: {node.log()[-1000:]}")


def measure_fetch(folder: Path, repeats: int, say: Callable[[str], None]) -> dict[str, float]:
    """A makes a model every few seconds; B, which waits for company and does nothing else, fetches each.

    While B fetches, A waits for an answer that does not come; while A rests, the bare stream has its turn.
    """
    with Cluster() as cluster:
        big = {"options": {"hidden": HIDDEN}}
        rhythm = {"rounds": repeats + 1, "deadline_s": 2.0, "pause_s": 6.0, "wait_for_peers": 1}
        a = cluster.add(
            folder / "a", settings(0, [], learning=rhythm, task={**big, "shard": {"index": 0, "count": 2}})
        )
        a.start()
        a.wait_until_up()
        waiting = {"wait_for_peers": 64, "wait_at_most_s": 3600.0}
        b = cluster.add(
            folder / "b",
            settings(1, [a.address()], learning=waiting, task={**big, "shard": {"index": 1, "count": 2}}),
        )
        b.start()
        b.wait_until_up()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        size = MODEL_BYTES
        server = context.Process(target=serve_bare, args=(size, theirs), daemon=True)
        server.start()
        address = ours.recv()
        bare, fetched, before = [], [], 0.0
        try:
            for number in range(repeats):
                wait_for_rest(a, number + 1)
                total = b.metric("covey_fetch_seconds_sum")
                assert b.metric("covey_fetch_seconds_count") == number + 1, (
                    "B missed a model, or A was too quick"
                )
                fetched.append(total - before)
                before = total
                bare.append(read_bare(address, size))
                say(f"fetch {number + 1}/{repeats}: {fetched[-1]:.2f} s, bare stream {bare[-1]:.2f} s")
        finally:
            server.terminate()
            server.join()
    fetch_s, bare_s = statistics.median(fetched), statistics.median(bare)
    return {
        # Pair by pair: a machine's speed drifts, and neighbours in time drift together.
        "fetch_ratio_to_bare_stream": statistics.median(b / f for b, f in zip(bare, fetched, strict=True)),
        "fetch_mb_per_s": size / 1e6 / fetch_s,
        "bare_mb_per_s": size / 1e6 / bare_s,
    }


def measure_messages_and_idle(folder: Path, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """Two linked daemons, done learning: with their usual heartbeats, then with many more."""
    results = {}
    for name, heartbeat_s in (("idle", 5.0), ("sparse", 0.02), ("busy", 0.004)):
        with Cluster() as cluster:
            network = {"heartbeat_s": heartbeat_s, "dead_after_s": 30.0}
            done = {"rounds": 1, "pause_s": 0.0}
            a = cluster.add(folder / f"{name}-a", settings(0, [], network=network, learning=done))
            a.start()
            a.wait_for(lambda s: s["phase"] == "done", "the round", 60)
            b = cluster.add(folder / f"{name}-b", settings(1, [a.address()], network=network, learning=done))
            b.start()
            b.wait_for(lambda s: s["phase"] == "done" and s["live_peers"] == 1, "the link", 60)
            time.sleep(3.0)  # what start-up left over
            sent = [node.metric(BEATS) for node in (a, b)]
            cpu, began = [cpu_seconds(node) for node in (a, b)], time.perf_counter()
            time.sleep(seconds)
            took = time.perf_counter() - began
            used = [
                after - before for after, before in zip([cpu_seconds(a), cpu_seconds(b)], cpu, strict=True)
            ]
            now = [node.metric(BEATS) for node in (a, b)]
            results[name] = (sum(used) / took, (sum(now) - sum(sent)) / took)
            say(f"{name}: {results[name][1]:.1f} messages/s, {results[name][0] / 2:.2%} of a core each")
    idle_cpu, idle_rate = results["idle"]

    def cost_ms(name: str) -> float:
        cpu, rate = results[name]
        return 1e3 * (cpu - idle_cpu) / (rate - idle_rate)

    return {
        "control_message_cpu_ms": cost_ms("busy"),
        "control_message_sparse_cpu_ms": cost_ms("sparse"),
        "idle_cpu_percent": 100 * idle_cpu / 2,
    }


def measure_lateness(folder: Path, seconds: float, say: Callable[[str], None]) -> dict[str, float]:
    """A pair that trains, exchanges and merges without a pause: small steps first, then large tensors."""
    worst = {}
    for name, hidden in (("small", [64]), ("large", [1000, 1000])):
        with Cluster() as cluster:
            learning = {"pause_s": 0.0, "deadline_s": 1.0}
            options = {"options": {"hidden": hidden}}
            a = cluster.add(
                folder / f"{name}-a",
                settings(0, [], learning=learning, task={**options, "shard": {"index": 0, "count": 2}}),
            )
            a.start()
            a.wait_until_up()
            b = cluster.add(
                folder / f"{name}-b",
                settings(
                    1, [a.address()], learning=learning, task={**options, "shard": {"index": 1, "count": 2}}
                ),
            )
            b.start()
            b.wait_for(lambda s: s["merged"] == 1, "a merge", 60)
            time.sleep(seconds)
            statuses = [node.status() for node in (a, b)]
            worst[name] = max(status["loop_lateness_ms_max"] for status in statuses if status)
            rounds = min(status["round"] for status in statuses if status)
            say(f"training {name}: {rounds} rounds, loop at worst {worst[name]:.1f} ms late")
    return {"loop_lateness_ms_max": max(worst.values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repeats", type=int, default=7, help="fetches to take the median of")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of each timed stretch")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="covey-bench-") as name:
        folder = Path(name)
        result = {
            **measure_fetch(folder / "fetch", arguments.repeats, say),
            **measure_parallel(folder / "parallel", say),
            **measure_messages_and_idle(folder / "messages", arguments.seconds, say),
            **measure_lateness(folder / "lateness", arguments.seconds, say),
        }
    if arguments.json:
        print(json.dumps(result))
        return
    targets = {
        "fetch_ratio_to_bare_stream": ">= 0.8",
        "three_sources_speedup": "> 2",
        "control_message_cpu_ms": "< 1.5",
        "loop_lateness_ms_max": "< 50",
        "idle_cpu_percent": "< 2",
    }
    for key, value in result.items():
        print(f"{key:28} {value:8.3f}   {targets.get(key, '')}")


if __name__ == "__main__":
    main()
