"""Speed on this machine as ratios: the suite, stock Paddle and other programs take turns in processes of their own.

Each round asks every worker once. A ratio is the median of the rounds' ratios; the first round warms up and is not
counted. An arm whose name ends in bf16 computes in bfloat16, all others in float32.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

from analysis.benchmark.opponents import NOT_MEASURED, PRODUCT_SIZE
from analysis.benchmark.process import Arm, WorkerFailed, WorkerProcess, other_arm, own_arm
from errors import UserError

Results = dict[str, Any]
Cell = dict[str, Any]

# In forward passes; a backward pass costs two. In this order: a process that has trained keeps more memory.
WORKS = {"latency": 1, "inference": 1, "training": 3}
NUM_CLASSES = 10
PAUSE = 0.3  # seconds after an answer: OpenMP threads spin on a core for up to 0.2 seconds


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    models: tuple[str, ...] = ("iformer_small", "coatnet_0", "convmixer_256_8", "mobileformer_26m", "dfformer_s18",
                               "cdfformer_s18", "poolformer_s12")
    image_sizes: tuple[int, ...] = (32, 224)
    batch_sizes: tuple[int, ...] = (32, 2)  # one for each image size
    rounds: int = 3
    seconds: float = 0.5  # of a turn
    against: tuple[str, ...] = ()  # commands of other programs
    stock: bool = True

    def batch_size(self, model: str, image_size: int) -> int:
        """Return the batch of a cell: a quarter for ConvMixer-256/8 at 224, whose maps have half the image's side."""
        batch = self.batch_sizes[self.image_sizes.index(image_size)]
        return max(1, batch // 4) if model.startswith("convmixer_256") and image_size >= 224 else batch


def measure(plan: Plan, results: Results, report: Callable[[str], None]) -> None:
    """Measure a plan into ``results``, replacing cells of the same name; ``report`` gets a sentence after every cell.

    Raises UserError for an unknown network, and for a command that cannot be started.
    """
    with WorkerProcess(own_arm("suite")) as worker:
        machine = worker.ask({"work": "describe", "models": plan.models})
    # Others get the suite's threads and allocator too.
    allocator = ("MALLOC_", "GLIBC_TUNABLES")
    settings = dict(setting.split("=", 1) for setting in machine["set_by_the_suite"] if setting.startswith(allocator))
    settings["OMP_NUM_THREADS"] = str(machine["threads"])
    own = ["suite", *["suite bf16"] * bool((machine["kernels"] or {}).get("bfloat16")), *["stock"] * plan.stock]
    arms = [*map(own_arm, own), *(other_arm(command, settings) for command in plan.against)]
    results |= {"plan": asdict(plan), "complete": False,
                "machine": {key: value for key, value in machine.items() if key != "command"}}
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(arm)) for arm in arms]
        cell = compare(workers, {"work": "product"}, 1, plan.rounds, plan.seconds)
    results["ceilings"] = {name: 2 * PRODUCT_SIZE**3 * max(arm["rounds"]) / 1e9  # FLOPs of a matrix product
                           for name, arm in cell["arms"].items() if "error" not in arm}
    report("matrix products, GFLOP/s: " + ", ".join(f"{name} {gflops:.0f}"
                                                    for name, gflops in results["ceilings"].items()))
    name = itemgetter("model", "image_size", "work")
    cells = {name(cell): cell for cell in results.get("speed", [])}
    for size in plan.image_sizes:
        for model in plan.models:
            for cell in _network(plan, arms, model, size, results["ceilings"]):
                cells[name(cell)] = cell
                results["speed"] = list(cells.values())
                report(describe(cell))
    results["complete"] = True


def compare(workers: Sequence[WorkerProcess], question: Cell, images: int, rounds: int, seconds: float) -> Cell:
    """Ask all workers in turn; return the images/s of each. One that fails drops out with an ``error``."""
    rates: dict[str, list[float]] = {worker.arm.name: [] for worker in workers}
    arms: dict[str, Cell] = {}
    for number in range(rounds + 1):
        for worker in workers:
            name = worker.arm.name
            if "error" in arms.get(name, {}):
                continue
            try:
                taken = worker.ask({**question, "seconds": seconds if number else 0})["seconds"]
            except WorkerFailed as failure:
                arms[name] = {"error": str(failure)}
                continue
            if number:
                rates[name].append(images / statistics.median(taken))
                arms[name] = {"images_per_second": statistics.median(rates[name]), "rounds": rates[name],
                              "peak_bytes": worker.peak_bytes()}
            time.sleep(PAUSE)
    arms = {name: arm for name, arm in arms.items() if arm.get("error") != NOT_MEASURED}
    return {"arms": arms, "ratios": ratios(arms)}


def ratios(arms: dict[str, Cell]) -> dict[str, Cell]:
    """Return the ratios of the suite's fastest arm to the fastest opponent: ``best``, and ``float32`` among such arms.

    ``stock`` is the ratio to stock Paddle. Each has ``median``, ``low``, ``high``, and the names of both sides.
    """
    measured = {name: arm for name, arm in arms.items() if "error" not in arm}
    found = {}
    for kind in ("best", "float32", "stock"):
        names = [name for name in measured if not (kind == "float32" and name.endswith("bf16"))]
        ours = [name for name in names if name.startswith("suite")]
        theirs = [name for name in names if name not in ours and (name == "stock") == (kind == "stock")]
        if ours and theirs:
            suite, opponent = (max(side, key=lambda name: measured[name]["images_per_second"])
                               for side in (ours, theirs))
            values = sorted(a / b for a, b in zip(measured[suite]["rounds"], measured[opponent]["rounds"], strict=True))
            found[kind] = {"median": statistics.median(values), "low": values[0], "high": values[-1], "suite": suite,
                           "opponent": opponent}
    return found


def _network(plan: Plan, arms: Sequence[Arm], model: str, size: int, ceilings: dict[str, float]) -> Iterable[Cell]:
    """Yield the cells of one network, measured in new processes, so that peaks of memory are its own."""
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(arm)) for arm in arms]
        for work in WORKS:
            batch = 1 if work == "latency" else plan.batch_size(model, size)
            question = {"model": model, "image_size": size, "batch_size": batch, "num_classes": NUM_CLASSES}
            try:
                macs = workers[0].ask({**question, "work": "describe"})["macs"]
            except WorkerFailed as failure:
                raise UserError(f"{model} at {size}×{size}: {failure}") from None
            asked = {**question, "work": "training" if work == "training" else "inference"}
            cell = compare(workers, asked, batch, plan.rounds, plan.seconds)
            yield {**question, "work": work, "macs": macs, **with_utilisation(cell, macs, work, ceilings)}


def with_utilisation(cell: Cell, macs: int, work: str, ceilings: dict[str, float]) -> Cell:
    """Add to each arm its operations a second over those of the fastest matrix product in its precision."""
    for name, arm in cell["arms"].items():
        best = max((gflops for other, gflops in ceilings.items() if other.endswith("bf16") == name.endswith("bf16")),
                   default=None)
        if best and "error" not in arm:
            arm["utilisation"] = 2 * macs * WORKS[work] * arm["images_per_second"] / (best * 1e9)
    return cell


def describe(cell: Cell) -> str:
    rates = ", ".join(f"{name} {arm['images_per_second']:.4g}" if "error" not in arm else f"{name}: {arm['error']}"
                      for name, arm in cell["arms"].items())
    found = "".join(f"; {kind} {ratio['median']:.2f}× {ratio['opponent']}" for kind, ratio in cell["ratios"].items())
    return (f"{cell['model']} {cell['image_size']}×{cell['image_size']}, batch {cell['batch_size']}, {cell['work']}: "
            f"{rates} images/s{found}")
