"""gossipy-dfl on the digits: push gossip to one neighbour a round. Runs in gossipy's environment; see run.py."""

# ruff: noqa: E402  a stand-in has to be there before gossipy is imported

import sys
from importlib.metadata import version
from types import ModuleType

import networkx as nx
import torch
from digits import (
    BATCH_SIZE,
    DEGREE,
    EVALUATED_SHARE,
    LEARNING_RATE,
    arguments,
    draw_samples,
    draw_weights,
    load,
    mlp,
    report,
    run_for,
    timed,
)

# gossipy imports torchvision for two data sets that are not used here.
sys.modules.setdefault("torchvision", ModuleType("torchvision"))

from gossipy import set_seed
from gossipy.core import AntiEntropyProtocol, CreateModelMode, StaticP2PNetwork
from gossipy.data import DataDispatcher
from gossipy.data.handler import ClassificationDataHandler
from gossipy.model import TorchModel
from gossipy.model.handler import TorchModelHandler
from gossipy.node import GossipNode
from gossipy.simul import GossipSimulator, SimulationEventReceiver

TICKS_PER_ROUND = 10
"""gossipy asks every node at every tick whether it is its turn; 100, usual in its examples, is no faster."""


class Mlp(TorchModel):
    """The network as gossipy wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def init_weights(self) -> None:
        draw_weights(self.layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Watch(SimulationEventReceiver):
    """Counts what was sent, and keeps the last evaluation. Cheaper than gossipy's own report, in its favour."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.accuracy = 0.0

    def update_message(self, failed, msg=None) -> None:
        self.num_sent += not failed

    def update_evaluation(self, round, on_user, evaluation) -> None:  # noqa: A002  gossipy's word
        self.accuracy = sum(scores["accuracy"] for scores in evaluation) / len(evaluation)

    def update_timestep(self, t) -> None: ...

    def update_end(self) -> None: ...


def make_simulator(data: str, nodes: int, seed: int) -> GossipSimulator:
    (x, y), (test_x, test_y) = load(data)
    dispatcher = DataDispatcher(
        ClassificationDataHandler(x, y, test_x, test_y), n=nodes, eval_on_user=False, auto_assign=False
    )
    dispatcher.set_assignments(draw_samples(len(y), nodes, seed), None)
    links = nx.to_numpy_array(nx.random_regular_graph(DEGREE, nodes, seed))
    handler = TorchModelHandler(
        net=Mlp(),
        optimizer=torch.optim.SGD,
        optimizer_params={"lr": LEARNING_RATE},
        criterion=torch.nn.CrossEntropyLoss(),
        local_epochs=1,
        batch_size=BATCH_SIZE,
        create_model_mode=CreateModelMode.MERGE_UPDATE,
    )
    simulator = GossipSimulator(
        nodes=GossipNode.generate(
            dispatcher, StaticP2PNetwork(nodes, links), handler, TICKS_PER_ROUND, sync=True
        ),
        data_dispatcher=dispatcher,
        delta=TICKS_PER_ROUND,
        protocol=AntiEntropyProtocol.PUSH,
        sampling_eval=EVALUATED_SHARE,
    )
    simulator.init_nodes()
    return simulator


def main() -> None:
    asked = arguments()
    torch.set_num_threads(
        1
    )  # in its favour: its tensors are too small to share, and waiting threads only spin
    set_seed(asked.seed)
    simulator = make_simulator(asked.data, asked.nodes, asked.seed)
    watch = Watch()
    simulator.add_receiver(watch)

    def run(rounds: int) -> float:
        watch.num_sent = 0
        return timed(lambda: simulator.start(rounds))

    rounds, wall_s = run_for(asked.seconds, run)
    # A node-round is one model sent, merged and trained on; all of them arrive.
    report(
        "gossipy",
        version("gossipy-dfl"),
        nodes=asked.nodes,
        rounds=rounds,
        node_rounds=watch.num_sent,
        wall_s=wall_s,
        score=watch.accuracy,
    )


if __name__ == "__main__":
    main()
