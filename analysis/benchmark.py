"""Speed on this machine as ratios: the suite, stock Paddle, and another program take turns in processes of their own.

Each round asks every worker once, so that what disturbs the machine disturbs all; a ratio is the median of the
rounds' ratios. The first round warms up and is not counted. Results are plain data that grow as they are measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis.benchmark_process import Arm, WorkerFailed, WorkerProcess, other_arm, stock_arm, suite_arm
from engine import runtime
from errors import UserError

Results = dict[str, Any]
Cell = dict[str, Any]
Tell = Callable[[str], None]

FAMILIES = ("iformer_small", "coatnet_0", "convmixer_256_8", "mobileformer_26m", "dfformer_s18", "cdfformer_s18",
            "poolformer_s12")
SECTIONS = ("ceilings", "speed", "pipelines", "sizes")
WORKS = ("inference", "training")  # in this order: a process that has trained keeps more memory
PASSES = {"inference": 1, "training": 3}  # a backward pass costs two forward passes
BATCH_SIZES = (1, 8, 32, 128)
IMAGE_SIZES = (32, 64, 128, 224)
REFERENCE_PIXELS = 224 * 224
NUM_CLASSES = 10
PAUSE = 0.3  # seconds after an answer: threads of OpenMP wait for work up to 0.2 seconds on a core


@dataclass(frozen=True)
class Plan:
    """What is measured. ``batch_sizes`` holds one for each image size; ``seconds`` is the length of a turn."""

    models: tuple[str, ...] = FAMILIES
    image_sizes: tuple[int, ...] = (32, 224)
    batch_sizes: tuple[int, ...] = (32, 2)
    sections: tuple[str, ...] = SECTIONS
    rounds: int = 3
    seconds: float = 0.5
    against: str = ""

    def batch_size(self, model: str, image_size: int) -> int:
        """Return the batch of a cell: ConvMixer-256/8, with maps of half the image's side, takes a quarter at 224."""
        batch = self.batch_sizes[self.image_sizes.index(image_size)]
        heavy = model.startswith("convmixer_256") and image_size ** 2 >= REFERENCE_PIXELS
        return max(1, batch // 4) if heavy else batch

    def arms(self) -> list[Arm]:
        """Return who takes turns."""
        return [suite_arm(), stock_arm(), *([other_arm(self.against)] if self.against else [])]


def count_cells(plan: Plan) -> int:
    """Return how many times ``measure`` tells of a cell that is done."""
    from analysis.pipelines import RECIPES

    works = len(WORKS)
    each = {"ceilings": 2, "speed": works * len(plan.models) * len(plan.image_sizes), "pipelines": len(RECIPES),
            "sizes": works * (len(BATCH_SIZES) + len(IMAGE_SIZES))}
    return sum(each[section] for section in plan.sections)


def measure(plan: Plan, results: Results, tell: Tell) -> None:
    """Measure what ``plan`` names into ``results``, replacing what stands there of the same kind.

    ``tell`` is called with a sentence after every cell. Raises UserError for an unknown network, and for a command
    that is none.
    """
    sections = {"ceilings": _ceilings, "speed": _speed, "pipelines": _pipelines, "sizes": _sizes}
    started = time.perf_counter()
    for arm in plan.arms()[2:]:  # a command that is none is refused before anything is measured
        results["against"] = _name(arm)
    with WorkerProcess(suite_arm()) as worker:
        try:
            worker.ask({"work": "describe", "models": plan.models})
        except WorkerFailed as failure:
            raise UserError(str(failure)) from None
        results["plan"], results["complete"] = asdict(plan), False
        results["machine"] = {key: value for key, value in worker.ask({"work": "describe"}).items()
                              if key != "command"}
    for section in plan.sections:
        sections[section](plan, results, tell)
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - started
    results["complete"] = True


def compare(turns: Sequence[tuple[str, WorkerProcess, Cell]], question: Cell, images: int, rounds: int,
            seconds: float) -> Cell:
    """Ask everybody in turn; returns the images a second of each, and the ratios of the first to the others.

    A turn is a name, a worker, and what the question to it has besides. Who fails drops out with an ``error``.
    """
    rates: dict[str, list[float]] = {name: [] for name, _, _ in turns}
    arms: dict[str, Cell] = {}
    for number in range(rounds + 1):
        for name, worker, besides in turns:
            if "error" in arms.get(name, {}):
                continue
            try:
                taken = worker.ask({**question, **besides, "seconds": seconds if number else 0})["seconds"]
            except WorkerFailed as failure:
                arms[name] = {"error": str(failure)}
                continue
            if number:
                rates[name].append(images * len(taken) / sum(taken))
                arms[name] = {"images_per_second": statistics.median(rates[name]), "rounds": rates[name],
                              "peak_bytes": worker.peak_bytes()}
            time.sleep(PAUSE)
    return {"arms": arms, "ratios": _ratios(rates, turns[0][0], arms)}


def _ratios(rates: dict[str, list[float]], first: str, arms: dict[str, Cell]) -> dict[str, Cell]:
    whole = [name for name in rates if "error" not in arms[name]]
    if first not in whole:
        return {}
    shares = {name: sorted(a / b for a, b in zip(rates[first], rates[name], strict=True))
              for name in whole if name != first}
    return {name: {"median": statistics.median(values), "low": values[0], "high": values[-1]}
            for name, values in shares.items()}


def _name(arm: Arm) -> str:
    """Return what another program calls itself, its file's name where it does not answer that."""
    with WorkerProcess(arm) as worker:
        try:
            return str(worker.ask({"work": "describe", "seconds": 0})["name"])[:40]
        except (WorkerFailed, KeyError):
            return Path(arm.command[-1]).name[:40]


def _ceilings(plan: Plan, results: Results, tell: Tell) -> None:
    from analysis.ceilings import bandwidth

    memory = bandwidth(runtime.available_cores())
    tell(f"memory: copy {memory['copy']:.1f} GB/s, triad {memory['triad']:.1f} GB/s")
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(arm)) for arm in plan.arms()]
        turns = [("kernels", workers[0], {"by": "kernels"}), ("suite", workers[0], {"by": "paddle"}),
                 *((worker.arm.name, worker, {"by": "paddle"}) for worker in workers[1:])]
        cell = compare(turns, {"work": "product"}, 1, plan.rounds, plan.seconds)
    operations = 2 * 2048**3
    products = {name: {"gflops": operations * arm["images_per_second"] / 1e9,
                       "best": operations * max(arm["rounds"]) / 1e9}
                for name, arm in cell["arms"].items() if "error" not in arm}
    results["ceilings"] = {"threads": runtime.available_cores(), "bandwidth": memory, "products": products}
    tell("matrix product: " + ", ".join(f"{name} {found['gflops']:.0f}" for name, found in products.items())
         + " GFLOP/s")


def _speed(plan: Plan, results: Results, tell: Tell) -> None:
    for size in plan.image_sizes:
        for model in plan.models:
            for cell in _network(plan.arms(), model, size, plan.batch_size(model, size), plan, results):
                _put(results, "speed", cell)
                tell(describe(cell))


def _network(arms: Sequence[Arm], model: str, size: int, batch: int, plan: Plan, results: Results) -> Iterable[Cell]:
    """Yield the cells of one network: fresh processes, so that peaks of memory are its own."""
    question = {"model": model, "image_size": size, "batch_size": batch, "num_classes": NUM_CLASSES}
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(arm)) for arm in arms]
        try:
            macs = workers[0].ask({**question, "work": "describe"})["macs"]
        except WorkerFailed as failure:
            raise UserError(f"{model} at {size}×{size}: {failure}") from None
        for work in WORKS:
            turns = [(worker.arm.name, worker, {}) for worker in workers]
            cell = compare(turns, {**question, "work": work}, batch, plan.rounds, plan.seconds)
            yield {**question, "work": work, "macs": macs, **with_utilisation(cell, macs, work, results)}


def with_utilisation(cell: Cell, macs: int, work: str, results: Results) -> Cell:
    """Add to each arm its operations a second over those of the fastest matrix product measured."""
    products = results.get("ceilings", {}).get("products", {})
    best = max((product["best"] for product in products.values()), default=None)
    for arm in cell["arms"].values():
        if best and "error" not in arm:
            arm["utilisation"] = 2 * macs * PASSES[work] * arm["images_per_second"] / (best * 1e9)
    return cell


def _sizes(plan: Plan, results: Results, tell: Tell) -> None:
    """Cost of the first network against batch size, at the smallest image, and image size, at a small batch."""
    model, smallest = plan.models[0], min(plan.image_sizes)
    batch = min(plan.batch_sizes)
    cells = [("batch_sizes", smallest, size) for size in BATCH_SIZES]
    cells += [("image_sizes", size, batch) for size in IMAGE_SIZES]
    for section, image_size, batch_size in cells:
        for cell in _network([suite_arm()], model, image_size, batch_size, plan, results):
            _put(results, section, cell)
            tell(describe(cell))


def _pipelines(plan: Plan, results: Results, tell: Tell) -> None:
    from analysis.pipelines import BATCH_SIZE, PIPELINES, RECIPES

    with ExitStack() as stack:
        turns = [(pipeline, stack.enter_context(WorkerProcess(suite_arm())), {"pipeline": pipeline})
                 for pipeline in PIPELINES]
        for name, recipe in RECIPES.items():
            question = {"work": "pipeline", "recipe": recipe, "workers": runtime.available_cores()}
            cell = compare(turns, question, BATCH_SIZE, plan.rounds, plan.seconds)
            _put(results, "pipelines", {"recipe": name, **cell})
            tell(f"{name}: " + ", ".join(f"{key} {arm['images_per_second']:.0f}" for key, arm in cell["arms"].items()
                                         if "error" not in arm) + " images/s")


def describe(cell: Cell) -> str:
    """Return a cell in one line."""
    where = f"{cell['model']} {cell['image_size']}×{cell['image_size']}, batch {cell['batch_size']}, {cell['work']}"
    rates = ", ".join(f"{name} {arm['images_per_second']:.4g}" if "error" not in arm else f"{name}: {arm['error']}"
                      for name, arm in cell["arms"].items())
    ratios = "".join(f"; {found['median']:.2f}× {name}" for name, found in cell["ratios"].items())
    return f"{where}: {rates} images/s{ratios}"


def _put(results: Results, section: str, cell: Cell) -> None:
    """Add a cell, in the place of an older one of the same name."""
    def key(of: Cell) -> tuple[Any, ...]:
        return tuple(of.get(name) for name in ("model", "image_size", "batch_size", "work", "recipe"))

    cells = results.setdefault(section, [])
    for place, other in enumerate(cells):
        if key(other) == key(cell):
            cells[place] = cell
            return
    cells.append(cell)
