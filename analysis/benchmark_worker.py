"""The process that is timed: ``python tools/benchmark.py --worker suite`` (or ``stock``).

It reads one question a line from its standard input and answers each with one line (JSON both ways), so that it
waits without work while another process is timed. docs/PERFORMANCE.md describes the protocol, which any program may
follow (``tools/benchmark.py --against``).
"""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from typing import Any

import numpy as np

from errors import UserError

Question = dict[str, Any]
PRODUCT_SIZE = 2048


class Worker:
    """Answers questions; keeps the network of the last one."""

    def __init__(self, mode: str, settings: list[str]) -> None:
        import kernels

        self.mode, self.settings = mode, settings
        kernels.configure("auto" if mode == "suite" else "stock")
        self._built: tuple[Any, ...] | None = None

    def answer(self, question: Question) -> dict[str, Any]:
        """Return ``{"seconds": [...]}``, the time of each step, or what else the question asks for."""
        if question["work"] == "describe":
            return self._describe(question)
        if question["work"] == "pipeline":
            from analysis.pipelines import batches

            return {"seconds": _timed_batches(batches(question), question["seconds"])}
        steps = {"training": self._training, "inference": self._inference, "product": self._product}
        return {"seconds": _timed(steps[question["work"]](question), question["seconds"])}

    def _describe(self, question: Question) -> dict[str, Any]:
        """Return what the named networks are, what one costs, or where all this runs."""
        if "models" in question:
            from models import model_info

            return {"families": [model_info(name).family for name in question["models"]]}
        if "model" in question:
            from analysis.complexity import count
            from models import create_model

            size = question["image_size"]
            cost = count(create_model(question["model"], question["num_classes"], size), size)
            return {"macs": cost.macs, "parameters": cost.parameters}
        from engine import runtime

        return runtime.environment("cpu", self.settings)

    def _training(self, question: Question) -> Callable[[], None]:
        state, images, labels = self._build(question)
        state.model.train()

        def step() -> None:
            float(state.step(images, labels, 0, 1e-4).loss)

        return step

    def _inference(self, question: Question) -> Callable[[], None]:
        import paddle

        state, images, _ = self._build(question)
        state.model.eval()

        def step() -> None:
            with paddle.no_grad():
                state.model(paddle.to_tensor(images)).numpy()

        return step

    def _product(self, question: Question) -> Callable[[], None]:
        import paddle

        import kernels

        matrices = [paddle.randn([PRODUCT_SIZE, PRODUCT_SIZE]) for _ in range(2)]
        multiply = kernels.linear if self.mode == "suite" and question["by"] == "kernels" else paddle.matmul

        def step() -> None:
            with paddle.no_grad():
                float(multiply(*matrices)[0, 0])

        return step

    def _build(self, question: Question) -> tuple[Any, np.ndarray, np.ndarray]:
        key = tuple(question[name] for name in ("model", "image_size", "batch_size", "num_classes"))
        if not self._built or self._built[0] != key:
            from configs.load import load_config
            from engine.state import TrainingState

            self._built = None
            name, size, batch, classes = key
            config = load_config(None, [f"MODEL.NAME={name}", f"MODEL.NUM_CLASSES={classes}", "TRAIN.ACCUMULATE=1",
                                        f"DATA.IMAGE_SIZE={size}", f"DATA.BATCH_SIZE={batch}", "OPTIMIZER.NAME=adamw",
                                        "OPTIMIZER.WEIGHT_DECAY=0.05"])
            images = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
            self._built = key, TrainingState(config), images, np.arange(batch) % classes
        return self._built[1:]


def _timed(step: Callable[[], Any], seconds: float) -> list[float]:
    """Return the seconds of each step, of as many as fill ``seconds``, and of one at least."""
    taken: list[float] = []
    while not taken or sum(taken) < seconds:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return taken


def _timed_batches(prepared: Iterator[Any], seconds: float) -> list[float]:
    """Time batches of an endless pipeline, after those that it has prepared ahead."""
    try:
        for _ in range(8):
            next(prepared)
        return _timed(functools.partial(next, prepared), seconds)
    finally:
        prepared.close()


def serve(mode: str) -> None:
    """Answer questions until the input ends; ``mode`` is suite, or stock for Paddle as it starts by itself."""
    os.setpgid(0, 0)  # with the processes of a DataLoader, to be ended together
    settings = []
    if mode == "suite":
        from engine import runtime

        settings = runtime.prepare()
    else:
        with redirect_stderr(io.StringIO()):  # Paddle warns of every OMP_NUM_THREADS but 1
            import paddle  # noqa: F401
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    worker = Worker(mode, settings)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except (UserError, MemoryError) as error:
            answer = {"error": str(error) or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)

