"""The suite, or stock Paddle, as a process that is timed: ``python tools/benchmark.py --worker suite``."""

from __future__ import annotations

import io
import os
from contextlib import nullcontext, redirect_stderr
from typing import Any

from analysis.benchmark.opponents import PRODUCT_SIZE, Question, Step, images_of, serve
from errors import UserError


class Suite:
    """Answers questions as the suite (``suite``, ``suite bf16``), or on Paddle's operators (``stock``)."""

    expected = (UserError, MemoryError)

    def __init__(self, name: str, settings: list[str]) -> None:
        import kernels

        self.name, self.settings = name, settings
        self.precision = "bfloat16" if name.endswith("bf16") else "float32"
        kernels.configure("stock" if name == "stock" else "auto")

    def describe(self, question: Question) -> dict[str, Any]:
        """Return the families of ``models``, the cost of one ``model``, or the environment."""
        if "models" in question:
            from models import model_info

            return {"families": [model_info(name).family for name in question["models"]]}
        if "model" in question:
            from analysis.complexity import count
            from models import create_model

            size = question["image_size"]
            return {"macs": count(create_model(question["model"], question["num_classes"], size), size).macs}
        from engine import runtime

        return runtime.environment("cpu", self.settings)

    def step(self, question: Question) -> Step:
        """Return what is timed."""
        return {"training": self._training, "inference": self._inference, "product": self._product}[question["work"]](
            question)

    def _training(self, question: Question) -> Step:
        import numpy as np

        state = self._state(question)
        state.model.train()
        images, labels = images_of(question), np.arange(question["batch_size"]) % question["num_classes"]
        return lambda: float(state.step(images, labels, 0, 1e-4).loss)

    def _inference(self, question: Question) -> Step:
        import paddle

        from engine import runtime

        model, images = self._state(question).model, images_of(question)
        model.eval()

        def step() -> None:
            with paddle.no_grad(), runtime.autocast(self.precision):
                model(paddle.to_tensor(images)).numpy()

        return step

    def _product(self, question: Question) -> Step:
        import paddle

        import kernels

        a, b = (paddle.randn([PRODUCT_SIZE, PRODUCT_SIZE]) for _ in range(2))

        def step() -> None:
            with paddle.no_grad(), kernels.bfloat16_products() if self.precision == "bfloat16" else nullcontext():
                float(kernels.linear(a, b)[0, 0])

        return step

    def _state(self, question: Question) -> Any:
        from configs.load import load_config
        from engine.state import TrainingState

        return TrainingState(load_config(None, [
            f"MODEL.NAME={question['model']}", f"MODEL.NUM_CLASSES={question['num_classes']}", "TRAIN.ACCUMULATE=1",
            f"DATA.IMAGE_SIZE={question['image_size']}", f"DATA.BATCH_SIZE={question['batch_size']}",
            "OPTIMIZER.NAME=adamw", "OPTIMIZER.WEIGHT_DECAY=0.05", f"TRAIN.PRECISION={self.precision}"]))


def serve_suite(name: str) -> None:
    """Answer questions until the input ends; ``name`` is suite, suite bf16, or stock for Paddle as it starts alone."""
    os.setpgid(0, 0)  # ended together with the processes that it starts
    settings = []
    if name == "stock":
        with redirect_stderr(io.StringIO()):  # Paddle warns of every OMP_NUM_THREADS but 1
            import paddle  # noqa: F401
    else:
        from engine import runtime

        settings = runtime.prepare()
    serve(Suite(name, settings))
