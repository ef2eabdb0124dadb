"""The suite, or stock Paddle, as a process that is timed: ``python tools/benchmark.py --worker suite``.

The command has loaded Paddle before, as each of the two starts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

import kernels
from analysis.benchmark.opponents import PRODUCT_SIZE, Question, Step, images_of
from analysis.complexity import count
from configs.load import load_config
from engine import runtime
from engine.state import TrainingState
from errors import UserError
from models import create_model, model_info


class Suite:
    """Answers questions as the suite (``suite``, ``suite bf16``), or on Paddle's operators (``stock``)."""

    expected = (UserError, MemoryError)

    def __init__(self, name: str, settings: list[str]) -> None:
        self.name, self.settings = name, settings
        self.precision = "bfloat16" if name.endswith("bf16") else "float32"
        kernels.configure("stock" if name == "stock" else "auto")

    def describe(self, question: Question) -> dict[str, Any]:
        """Return the cost of one ``model``, or the environment; UserError for an unknown name in ``models``."""
        if "model" in question:
            size = question["image_size"]
            return {"macs": count(create_model(question["model"], question["num_classes"], size), size).macs}
        for name in question.get("models", ()):
            model_info(name)
        return runtime.environment("cpu", self.settings)

    def step(self, question: Question) -> Step:
        return {"training": self._training, "inference": self._inference, "product": self._product}[question["work"]](
            question)

    def _training(self, question: Question) -> Step:
        state = self._state(question)
        state.model.train()
        images, labels = images_of(question), np.arange(question["batch_size"]) % question["num_classes"]
        return lambda: float(state.step(images, labels, 0, 1e-4).loss)

    def _inference(self, question: Question) -> Step:
        model, images = self._state(question).model, images_of(question)
        model.eval()

        def step() -> None:
            with paddle.no_grad(), runtime.autocast(self.precision):
                model(paddle.to_tensor(images)).numpy()

        return step

    def _product(self, question: Question) -> Step:
        a, b = (paddle.randn([PRODUCT_SIZE, PRODUCT_SIZE]) for _ in range(2))

        def step() -> None:
            with paddle.no_grad(), runtime.autocast(self.precision):
                float(kernels.linear(a, b)[0, 0])

        return step

    def _state(self, question: Question) -> TrainingState:
        return TrainingState(load_config(None, [
            f"MODEL.NAME={question['model']}", f"MODEL.NUM_CLASSES={question['num_classes']}", "TRAIN.ACCUMULATE=1",
            f"DATA.IMAGE_SIZE={question['image_size']}", f"DATA.BATCH_SIZE={question['batch_size']}",
            "OPTIMIZER.NAME=adamw", "OPTIMIZER.WEIGHT_DECAY=0.05", f"TRAIN.PRECISION={self.precision}"]))
