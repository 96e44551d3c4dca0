"""How fast parameters are moved along directions made from seeds, against directions that torch makes.

    python benchmarks/spsa.py --json

134.5 million float32 parameters in the tensors of a small language model; --layers makes it smaller. The sides of a
ratio are measured in turns on the same threads; medians. Every part runs in a process of its own.

speedup_over_randn_add     `torch.randn` of each tensor and `add_` of it (so MeZO moves), over one direction applied
ratio_to_plain_add         one direction applied, over `add_` of one that lies ready in memory as float32
seeds64_one_pass_speedup   64 directions in 64 passes, over the same in one
peak_extra_fraction        by how much applying 64 directions raises the process's peak memory, as the system counts
                           it, in models
shift_ms, unshift_ms       a shift by 2**-10 of weights with a standard deviation of 0.02, and its way back
lost_fraction              the share of values that rounding alone would not have brought back
lost_models                what remembering them takes, in models
bfloat16_...               the same for bfloat16

The peak needs Linux. Beside other programs on the same cores compare with `--threads 1`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge import in_turns, peak_extra_bytes, show, size_bytes

HERE = Path(__file__).resolve()
VOCABULARY, WIDTH, FEED_FORWARD, KEYS_WIDTH, LAYERS = 49152, 576, 1536, 192, 30
SEEDS = 64
STEP = 2.0**-10


def model(layers: int, dtype: Any = None) -> Any:
    """Random weights under the names and shapes of SmolLM-135M, whose output layer is its embedding."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (VOCABULARY, WIDTH), "norm.weight": (WIDTH,)}
    for index in range(layers):
        layer = f"layers.{index}"
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (KEYS_WIDTH, WIDTH) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, FEED_FORWARD)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.empty(shape).normal_(0, 0.02, generator=generator).to(dtype or torch.float32)
        for name, shape in shapes.items()
    }


def steps(count: int) -> Any:
    """As many directions in one step; the coefficients are so small that the weights stay what they are."""
    import numpy as np

    from aggregation.perturbation import Step

    return [Step(tuple(range(1, count + 1)), np.full(count, 1e-9, np.float32))]


def measure_applying(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from aggregation.perturbation import apply_steps

    params = model(arguments.layers)
    ready = model(arguments.layers)
    one = steps(1)

    def randn_add() -> None:
        for tensor in params.values():
            tensor.add_(torch.randn(tensor.shape), alpha=1e-9)

    def plain_add() -> None:
        for name, tensor in params.items():
            tensor.add_(ready[name], alpha=1e-9)

    def many_passes() -> None:
        for _ in range(SEEDS):
            apply_steps(params, one)

    many = steps(SEEDS)
    fast = in_turns(arguments.repeat, add=plain_add, one=lambda: apply_steps(params, one))
    slow = in_turns(
        max(1, arguments.repeat // 3),
        randn=randn_add,
        passes=many_passes,
        one_pass=lambda: apply_steps(params, many),
    )
    return {
        "parameters": sum(tensor.numel() for tensor in params.values()),
        "threads": torch.get_num_threads(),
        "speedup_over_randn_add": round(slow["randn"] / fast["one"], 1),
        "ratio_to_plain_add": round(fast["one"] / fast["add"], 2),
        "seeds64_one_pass_speedup": round(slow["passes"] / slow["one_pass"], 1),
        "plain_add_ms": round(1e3 * fast["add"], 1),
        "one_seed_ms": round(1e3 * fast["one"], 1),
        "seeds64_one_pass_ms": round(1e3 * slow["one_pass"], 1),
        "randn_add_ms": round(1e3 * slow["randn"], 1),
    }


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    from aggregation.perturbation import apply_steps

    params = model(arguments.layers)
    apply_steps(params, steps(1))
    extra = peak_extra_bytes(lambda: apply_steps(params, steps(SEEDS)))
    return {"peak_extra_fraction": round(extra / size_bytes(params), 4)}


def measure_shifts(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from aggregation.perturbation import shift, unshift

    found = {}
    for prefix, dtype in (("", torch.float32), ("bfloat16_", torch.bfloat16)):
        params = model(arguments.layers, dtype)
        lost = [shift(params, 1, STEP)]
        unshift(params, 1, STEP, lost[0])
        seconds = in_turns(
            arguments.repeat,
            shift=lambda params=params, lost=lost: lost.append(shift(params, 1, STEP)),
            unshift=lambda params=params, lost=lost: unshift(params, 1, STEP, lost.pop()),
        )
        entries = sum(tensor.numel() for tensor in params.values())
        found |= {
            f"{prefix}shift_ms": round(1e3 * seconds["shift"], 1),
            f"{prefix}unshift_ms": round(1e3 * seconds["unshift"], 1),
            f"{prefix}lost_fraction": round(lost[0].num_entries / entries, 4),
            f"{prefix}lost_models": round(lost[0].size_bytes / size_bytes(params), 4),
        }
    return found


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "applying": measure_applying,
    "memory": measure_memory,
    "shifts": measure_shifts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--repeat", type=int, default=9, help="of which the median is taken")
    parser.add_argument("--threads", type=int, help="for all sides; left out, torch's own choice")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help="of the model, 3.5 million parameters each"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    found: dict[str, Any] = {}
    for part in PARTS:
        print(f"measuring {part}", file=sys.stderr)
        command = [sys.executable, str(HERE), *sys.argv[1:], "--part", part]
        found |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    show(found, arguments.json)


if __name__ == "__main__":
    main()
