"""Speed on this machine as ratios: the suite, stock Paddle and other programs take turns in processes of their own.

Each round asks every worker once, so that a disturbance of the machine affects all. A ratio is the median of the
rounds' ratios; the first round warms up and is not counted. Results are plain data that grow as they are measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from analysis.benchmark.process import Arm, WorkerFailed, WorkerProcess, other_arm, stock_arm, suite_arm
from engine import runtime
from errors import UserError

Results = dict[str, Any]
Cell = dict[str, Any]
Report = Callable[[str], None]

FAMILIES = ("iformer_small", "coatnet_0", "convmixer_256_8", "mobileformer_26m", "dfformer_s18", "cdfformer_s18",
            "poolformer_s12")
WORKS = ("inference", "training")  # in this order: a process that has trained keeps more memory
PASSES = {"inference": 1, "training": 3}  # a backward pass costs two forward passes
BATCH_SIZES = (1, 8, 32, 128)
IMAGE_SIZES = (32, 64, 128, 224)
NUM_CLASSES = 10
PAUSE = 0.3  # seconds after an answer: OpenMP threads spin on a core for up to 0.2 seconds


@dataclass(frozen=True)
class Plan:
    """What is measured. ``batch_sizes`` has one for each image size; ``seconds`` is the length of a turn.

    ``against`` are the commands of other programs, each an opponent beside stock Paddle.
    """

    models: tuple[str, ...] = FAMILIES
    image_sizes: tuple[int, ...] = (32, 224)
    batch_sizes: tuple[int, ...] = (32, 2)
    sections: tuple[str, ...] = ("ceilings", "speed", "pipelines", "sizes")
    rounds: int = 3
    seconds: float = 0.5
    against: tuple[str, ...] = ()

    def batch_size(self, model: str, image_size: int) -> int:
        """Return the batch of a cell: a quarter for ConvMixer-256/8 at 224, whose maps have half the image's side."""
        batch = self.batch_sizes[self.image_sizes.index(image_size)]
        return max(1, batch // 4) if model.startswith("convmixer_256") and image_size >= 224 else batch


def count_cells(plan: Plan) -> int:
    """Return how often ``measure`` calls ``report``."""
    works = len(WORKS)
    each = {"ceilings": 1, "speed": works * len(plan.models) * len(plan.image_sizes), "pipelines": 2,
            "sizes": works * (len(BATCH_SIZES) + len(IMAGE_SIZES))}
    return sum(each[section] for section in plan.sections)


def measure(plan: Plan, results: Results, report: Report) -> None:
    """Measure a plan into ``results``, replacing cells of the same name; ``report`` gets a sentence after every cell.

    Raises UserError for an unknown network, and for a command that cannot be started.
    """
    started = time.perf_counter()
    arms = [suite_arm(), stock_arm(), *map(other_arm, plan.against)]
    with WorkerProcess(arms[0]) as worker:
        try:
            worker.ask({"work": "describe", "models": plan.models})
        except WorkerFailed as failure:
            raise UserError(str(failure)) from None
        machine = worker.ask({"work": "describe"})
    results |= {"plan": asdict(plan), "complete": False,
                "machine": {key: value for key, value in machine.items() if key != "command"}}
    for section in plan.sections:
        SECTIONS[section](plan, arms, results, report)
    results["seconds"] = results.get("seconds", 0.0) + time.perf_counter() - started
    results["complete"] = True


def compare(turns: Sequence[tuple[str, WorkerProcess, Cell]], question: Cell, images: int, rounds: int,
            seconds: float) -> Cell:
    """Ask all workers in turn; return the images/s of each, and the ratios of the first to the others.

    A turn is a name, a worker, and additions to the question. A worker that fails drops out with an ``error``.
    """
    rates: dict[str, list[float]] = {name: [] for name, _, _ in turns}
    arms: dict[str, Cell] = {}
    for number in range(rounds + 1):
        for name, worker, additions in turns:
            if "error" in arms.get(name, {}):
                continue
            try:
                taken = worker.ask({**question, **additions, "seconds": seconds if number else 0})["seconds"]
            except WorkerFailed as failure:
                arms[name] = {"error": str(failure)}
                continue
            if number:
                rates[name].append(images * len(taken) / sum(taken))
                arms[name] = {"images_per_second": statistics.median(rates[name]), "rounds": rates[name],
                              "peak_bytes": worker.peak_bytes()}
            time.sleep(PAUSE)
    first, *others = (name for name, _, _ in turns)
    ratios = {}
    for name in others:
        if "error" not in arms[first] and "error" not in arms[name]:
            values = sorted(a / b for a, b in zip(rates[first], rates[name], strict=True))
            ratios[name] = {"median": statistics.median(values), "low": values[0], "high": values[-1]}
    return {"arms": arms, "ratios": ratios}


def _ceilings(plan: Plan, arms: Sequence[Arm], results: Results, report: Report) -> None:
    """Measure the fastest matrix product of 2048×2048, which utilisation is relative to."""
    with ExitStack() as stack:
        workers = [stack.enter_context(WorkerProcess(arm)) for arm in arms]
        turns = [("kernels", workers[0], {"by": "kernels"}),
                 *((worker.arm.name, worker, {"by": "paddle"}) for worker in workers)]
        cell = compare(turns, {"work": "product"}, 1, plan.rounds, plan.seconds)
    operations = 2 * 2048**3
    products = {name: {"gflops": operations * arm["images_per_second"] / 1e9,
                       "best": operations * max(arm["rounds"]) / 1e9}
                for name, arm in cell["arms"].items() if "error" not in arm}
    results["ceilings"] = {"threads": runtime.available_cores(), "products": products}
    report("matrix product: " + ", ".join(f"{name} {found['gflops']:.0f}" for name, found in products.items())
         + " GFLOP/s")


def _speed(plan: Plan, arms: Sequence[Arm], results: Results, report: Report) -> None:
    for size in plan.image_sizes:
        for model in plan.models:
            for cell in _network(arms, model, size, plan.batch_size(model, size), plan, results):
                _put(results, "speed", cell)
                report(describe(cell))


def _network(arms: Sequence[Arm], model: str, size: int, batch: int, plan: Plan, results: Results) -> Iterable[Cell]:
    """Yield the cells of one network, measured in new processes, so that peaks of memory are its own."""
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


def _sizes(plan: Plan, arms: Sequence[Arm], results: Results, report: Report) -> None:
    """Measure the first network against batch size, at the smallest image, and image size, at the smallest batch."""
    cells = [("batch_sizes", min(plan.image_sizes), size) for size in BATCH_SIZES]
    cells += [("image_sizes", size, min(plan.batch_sizes)) for size in IMAGE_SIZES]
    for section, image_size, batch_size in cells:
        for cell in _network(arms[:1], plan.models[0], image_size, batch_size, plan, results):
            _put(results, section, cell)
            report(describe(cell))


def _pipelines(plan: Plan, arms: Sequence[Arm], results: Results, report: Report) -> None:
    from analysis.benchmark.pipelines import BATCH_SIZE, PIPELINES, RECIPES

    with ExitStack() as stack:
        turns = [(pipeline, stack.enter_context(WorkerProcess(arms[0])), {"pipeline": pipeline})
                 for pipeline in PIPELINES]
        for name, recipe in RECIPES.items():
            question = {"work": "pipeline", "recipe": recipe, "workers": runtime.available_cores()}
            cell = {"recipe": name, **compare(turns, question, BATCH_SIZE, plan.rounds, plan.seconds)}
            _put(results, "pipelines", cell)
            report(describe(cell))


SECTIONS = {"ceilings": _ceilings, "speed": _speed, "pipelines": _pipelines, "sizes": _sizes}


def describe(cell: Cell) -> str:
    """Return a cell in one line."""
    where = cell.get("recipe") or (f"{cell['model']} {cell['image_size']}×{cell['image_size']}, batch "
                                   f"{cell['batch_size']}, {cell['work']}")
    rates = ", ".join(f"{name} {arm['images_per_second']:.4g}" if "error" not in arm else f"{name}: {arm['error']}"
                      for name, arm in cell["arms"].items())
    ratios = "".join(f"; {found['median']:.2f}× {name}" for name, found in cell["ratios"].items())
    return f"{where}: {rates} images/s{ratios}"


def _put(results: Results, section: str, cell: Cell) -> None:
    """Add a cell, replacing an older one of the same name."""
    def key(of: Cell) -> list[Any]:
        return [of.get(name) for name in ("model", "image_size", "batch_size", "work", "recipe")]

    cells = results.setdefault(section, [])
    known = next((index for index, other in enumerate(cells) if key(other) == key(cell)), len(cells))
    cells[known : known + 1] = [cell]
