"""How fast models are merged, against the bandwidth of this machine's memory, and what each rule costs.

    python benchmarks/merge.py --json
    python benchmarks/merge.py --rules

8 received models with the tensors of a ResNet-50: 25.6 million float32 parameters in 267 tensors, from 64 entries to
2.4 million. A ratio of 1 is what `torch.add(a, b, out=c)` takes to move as many bytes as the merge has to, measured
in turns with it; medians. Every part runs in a process of its own.

mean_ratio_to_add        `mean`: reads 8 + 1 models, writes 1
corrected_ratio_to_add   `variance.corrected` by itself: the mean, then the 8 models again for their variances, the
                         mean twice for its own and to be stretched, and the result: 21 models
behind_mean_...          `mean` and `variance.corrected` in a list: the same bytes
..._checked_...          through `rules.merge`, which looks for values that are not finite first; the bytes are those
                         of the merge alone
alignment_ms             activation matching of one convnet of 4 million parameters, by where the time goes
peak_extra_models        by how much one merge raises the process's peak memory, in models; the result is 1 of them

--rules times every rule of the registry and writes docs/rules_measured.json. The peaks need Linux.

Beside other programs on the same cores, torch's threads wait for each other longer than they work: then compare with
`--threads 1`, which is also what a node takes unless told otherwise.
"""

import argparse
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
MEASURED = HERE.parent.parent / "docs" / "rules_measured.json"
RECEIVED = 8
MOVED_MODELS = {"mean": 10, "corrected": 21, "behind_mean": 21}
"""How many models' worth of memory each merge reads and writes, see above."""

LISTS = {
    "mean": ["mean"],
    "corrected": ["variance.corrected"],
    "behind_mean": ["mean", "variance.corrected"],
}


def resnet50(seed: int) -> Any:
    """Random parameters and running statistics, by the names that torchvision gives them."""
    import torch

    shapes: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, out_channels: int, in_channels: int, size: int) -> None:
        shapes[f"{conv}.weight"] = (out_channels, in_channels, size, size)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{name}"] = (out_channels,)

    add("conv1", "bn1", 64, 3, 7)
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            add(f"{block}.conv1", f"{block}.bn1", width, channels, 1)
            add(f"{block}.conv2", f"{block}.bn2", width, width, 3)
            add(f"{block}.conv3", f"{block}.bn3", 4 * width, width, 1)
            if index == 0:
                add(f"{block}.downsample.0", f"{block}.downsample.1", 4 * width, channels, 1)
            channels = 4 * width
    shapes |= {"fc.weight": (1000, channels), "fc.bias": (1000,)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.empty(shape).normal_(0, 0.05, generator=generator) for name, shape in shapes.items()}


def size_bytes(params: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in params.values())


def models() -> tuple[Any, list[Any]]:
    """The receiver's own and the received ones."""
    from aggregation.base import Contribution

    received = [Contribution(resnet50(seed), weight=float(seed)) for seed in range(1, RECEIVED + 1)]
    return Contribution(resnet50(0)), received


def merging(name: str, local: Any, received: Sequence[Any], is_checked: bool) -> Callable[[], object]:
    """One merge by the rules of that name in LISTS."""
    from aggregation.base import chain
    from aggregation.rules import RULES, build, merge

    specs = LISTS[name]
    rule = build(specs) if is_checked else chain(*(RULES[spec].factory() for spec in specs))
    state = rule.init(local.params)
    return lambda: merge(rule, received, state, local)


# --- measuring ------------------------------------------------------------------------------------------
def seconds_of(function: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    function()
    return time.perf_counter() - began_at


def in_turns(repeat: int, **functions: Callable[[], object]) -> dict[str, float]:
    """The median of the seconds of each, taken in turns. Each runs once before."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeat + 1):
        for name, function in functions.items():
            seconds = seconds_of(function)
            if number:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def memory_bytes(kind: str) -> int:
    """Of this process as the system counts it: "VmRSS" is in use now, "VmHWM" was at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """By how much the function raises the peak of memory in use. Run it once before: first times load code."""
    import ctypes

    gc.collect()
    # What was freed goes back to the system now, or the function would find its memory there unseen.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
    before = memory_bytes("VmRSS")
    result = function()
    peak = memory_bytes("VmHWM")
    del result
    return peak - before


# --- the parts ------------------------------------------------------------------------------------------
def measure_bandwidth(repeat: int) -> dict[str, Any]:
    import torch

    local, received = models()
    model_bytes = size_bytes(local.params)
    entries = 10 * model_bytes // 4 // 3
    a, b, c = torch.ones(entries), torch.ones(entries), torch.zeros(entries)

    merges = {
        f"{name}{'_checked' if is_checked else ''}": merging(name, local, received, is_checked)
        for name in LISTS
        for is_checked in (False, True)
    }
    medians = in_turns(repeat, add=lambda: torch.add(a, b, out=c), **merges)
    add_s = medians.pop("add")
    ratios = {
        f"{name}_ratio_to_add": round(
            add_s * MOVED_MODELS[name.removesuffix("_checked")] / 10 / medians[name], 3
        )
        for name in merges
    }
    return {
        **ratios,
        "add_gb_per_s": round(10 * model_bytes / add_s / 1e9, 1),
        "merge_ms": {name: round(1e3 * value, 1) for name, value in medians.items()},
    }


def measure_memory() -> dict[str, Any]:
    local, received = models()
    found = {}
    for name in LISTS:
        merge = merging(name, local, received, is_checked=True)
        merge()
        found[name] = round(peak_extra_bytes(merge) / size_bytes(local.params), 2)
    return {
        "peak_extra_models": found["mean"],
        "corrected_peak_extra_models": found["corrected"],
        "behind_mean_peak_extra_models": found["behind_mean"],
    }


def measure_alignment(repeat: int) -> dict[str, Any]:
    """Activation matching of one received convnet of 4 million parameters on 256 images of 32 x 32 pixels."""
    import torch
    from torch import nn

    from aggregation import alignment
    from aggregation.probes import batches
    from aggregation.symmetry import run, symmetry_of

    def convnet(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        widths = [3, 64, 128, 256, 512, 512]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if index in (1, 2, 3) else []
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()

    own, other = ({k: v.detach() for k, v in convnet(seed).state_dict().items()} for seed in (0, 1))
    inputs = torch.rand(256, 3, 32, 32)
    model = convnet(0)
    began_at = time.perf_counter()
    symmetry = symmetry_of(model, inputs)
    trace_s = time.perf_counter() - began_at
    names = [name for name, _ in model.named_parameters()]

    def forward() -> None:
        for params in (own, other):
            for batch in batches(inputs, symmetry.batch_size):
                run(symmetry, params, batch)

    (gains,) = alignment.activation_gains(symmetry, own, [other], inputs)
    medians = in_turns(
        repeat,
        forward=forward,
        gains=lambda: alignment.activation_gains(symmetry, own, [other], inputs),
        assign=lambda: [alignment.assign(symmetry, unit, gains) for unit in alignment.units(symmetry)],
        whole=lambda: alignment.match_activations(symmetry, own, [other], inputs, names),
    )
    ms = {name: round(1e3 * value, 1) for name, value in medians.items()}
    return {
        "alignment_parameters": sum(tensor.numel() for tensor in own.values()),
        "alignment_ms": {
            "trace, once": round(1e3 * trace_s, 1),
            "forward": ms["forward"],
            "correlation": round(ms["gains"] - ms["forward"], 1),
            "assignment": ms["assign"],
            "ties by weight": round(ms["whole"] - ms["gains"] - ms["assign"], 1),
            "whole": ms["whole"],
        },
    }


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "bandwidth": lambda a: measure_bandwidth(a.repeat),
    "memory": lambda a: measure_memory(),
    "alignment": lambda a: measure_alignment(max(1, a.repeat // 3)),
}


# --- every rule -----------------------------------------------------------------------------------------
def small_world() -> tuple[Any, list[Any]]:
    """A receiver with 256 samples of 10 classes, and 4 received MLPs 784-512-512-10; all random."""
    import torch
    from torch import nn
    from torch.nn import functional

    from aggregation.base import Contribution, Local, Receiver

    def mlp(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )

    def samples(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(256, 784, generator=generator), torch.randint(10, (256,), generator=generator)

    def params(seed: int) -> Any:
        return {name: tensor.detach().clone() for name, tensor in mlp(seed).state_dict().items()}

    receiver = Receiver(
        model=mlp(0),
        loss=functional.cross_entropy,
        metrics=lambda outputs, targets: {
            "accuracy": (outputs.argmax(1) == targets).float().mean().item(),
        },
        samples=samples(1),
        validation=samples(2),
        probe=samples(3)[0],
    )
    received = [Contribution(params(seed), weight=256.0, source=f"peer-{seed}") for seed in range(1, 5)]
    return Local(params(0), weight=256.0, source="own", receiver=receiver), received


def specs_of(name: str) -> list[str]:
    """The rule with a mean before it where it takes one model, and after it where it leaves several."""
    from aggregation.rules import RULES

    entry = RULES[name]
    if entry.takes_one:
        return ["mean", name]
    return [name] if entry.reduces else [name, "mean"]


def measure_rule(name: str, repeat: int) -> dict[str, float]:
    """Milliseconds and peak extra memory of one merge, after a first one. On one core."""
    import torch

    from aggregation.rules import build, merge

    torch.set_num_threads(1)
    local, received = small_world()
    rule = build(specs_of(name))
    state = rule.init(local.params)

    def once() -> object:
        nonlocal state
        params, state = merge(rule, received, state, local)
        return params

    seconds = in_turns(min(repeat, 3), merge=once)["merge"]  # some take many seconds
    extra_models = peak_extra_bytes(once) / size_bytes(local.params)
    return {"ms": float(f"{1e3 * seconds:.3g}"), "extra_models": round(extra_models, 1)}


def measure_rules(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    from aggregation.rules import RULES

    return {name: run_part(["--rule", name], arguments) for name in RULES}


# --- all together ---------------------------------------------------------------------------------------
def run_part(chosen: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, so that its peak memory is its own too."""
    command = [sys.executable, str(HERE), *chosen, "--repeat", str(arguments.repeat)]
    if arguments.threads:
        command += ["--threads", str(arguments.threads)]
    print(f"measuring {chosen[-1]}", file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:36} {value}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--repeat", type=int, default=9, help="of which the median is taken")
    parser.add_argument("--threads", type=int, help="of torch, for all sides; left out, its own choice")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rules", action="store_true", help=f"time every rule, and write {MEASURED.name}")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rule", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        print(json.dumps(PARTS[arguments.part](arguments)))
    elif arguments.rule:
        print(json.dumps(measure_rule(arguments.rule, arguments.repeat)))
    elif arguments.rules:
        measured = measure_rules(arguments)
        MEASURED.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
        show(measured, arguments.json)
    else:
        found: dict[str, Any] = {}
        for name in arguments.only.split(","):
            found |= run_part(["--part", name], arguments)
        show(found, arguments.json)


if __name__ == "__main__":
    main()
