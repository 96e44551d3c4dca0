"""covey's simulator on the digits: push gossip to one neighbour a round. Runs in covey's environment; see run.py."""

from importlib.metadata import version

from digits import (
    BATCH_SIZE,
    DEGREE,
    EVALUATED_SHARE,
    HIDDEN,
    LEARNING_RATE,
    SAMPLES_PER_NODE,
    STEPS_PER_ROUND,
    arguments,
    report,
    run_for,
    timed,
)

from node.settings import TrainingSettings
from protocols.gossip import GossipSettings
from sim.other_process import compute_beside
from sim.results import Result
from sim.scenarios import DataSettings, EvaluationSettings, Scenario, TopologySettings
from sim.world import World


def make_scenario(nodes: int, rounds: int, seed: int) -> Scenario:
    """`mean`, because that is how the others merge."""
    return Scenario(
        nodes=nodes,
        seed=seed,
        rule="mean",
        data=DataSettings(samples_per_node=SAMPLES_PER_NODE, options={"hidden": [HIDDEN]}, start="common"),
        topology=TopologySettings(kind="regular", degree=DEGREE),
        training=TrainingSettings(
            local_steps=STEPS_PER_ROUND, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE
        ),
        gossip=GossipSettings(rounds=rounds, quorum=0.0, fanout=1, pause_s=0.0),
        evaluation=EvaluationSettings(share=EVALUATED_SHARE),
    )


def main() -> None:
    asked = arguments()
    results: list[Result] = []

    def run(rounds: int) -> float:
        world = World(make_scenario(asked.nodes, rounds, asked.seed), make_computer=compute_beside)
        try:
            return timed(lambda: results.append(world.run()))
        finally:
            world.plan.close()

    rounds, wall_s = run_for(asked.seconds, run)
    result = results[-1]
    report(
        "covey",
        version("covey"),
        nodes=asked.nodes,
        rounds=rounds,
        node_rounds=result.node_rounds,
        wall_s=wall_s,
        score=result.accuracy_mean,
        trace_hash=result.trace_hash,
    )


if __name__ == "__main__":
    main()
