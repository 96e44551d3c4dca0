"""The nodes' shared models: each once in memory, for as long as any node holds it."""

import pytest
import torch

from protocols.errors import LocalError
from protocols.vocabulary import Digest, ModelRef
from sim.compute import NodeModels, SharedModels

ONE, TWO = Digest(b"1" * 32), Digest(b"2" * 32)
PARAMS = {"weight": torch.zeros(2)}


def test_a_model_stays_until_its_last_holder_drops_it() -> None:
    shared = SharedModels()
    shared.add(ONE, PARAMS)
    shared.add(ONE, PARAMS)
    shared.add(TWO, PARAMS)
    assert len(shared) == 2
    shared.drop(ONE)
    assert shared.get(ONE) is PARAMS
    shared.drop(ONE)
    with pytest.raises(LocalError, match="is not held"):
        shared.get(ONE)
    assert len(shared) == 1


def test_a_node_saves_into_what_it_serves_and_shares_the_memory() -> None:
    shared = SharedModels()
    held: dict[Digest, object] = {}
    models = NodeModels(shared, held, node=3, size_bytes=500)
    ref = models.save(PARAMS, 4, 20)
    assert (ref.size_bytes, ref.round, ref.num_samples) == (500, 4, 20)
    assert list(held) == [ref.digest]
    assert models.load(ref) is PARAMS
    assert NodeModels(shared, {}, node=4, size_bytes=500).load(ref) is PARAMS


def test_a_digest_names_who_made_the_model_and_when_not_its_bytes() -> None:
    def digests(node: int) -> list[bytes]:
        models = NodeModels(SharedModels(), {}, node, size_bytes=1)
        return [models.save({"weight": torch.rand(2)}, 0, 1).digest for _ in range(3)]

    assert digests(1) == digests(1)
    assert len({*digests(1), *digests(2)}) == 6


def test_a_model_nobody_holds_is_an_error_of_ours() -> None:
    with pytest.raises(LocalError, match="is not held"):
        NodeModels(SharedModels(), {}, 1, 1).load(ModelRef(ONE, 1, 0, 1))
