"""Time PyTorch, ONNX Runtime or OpenVINO beside the suite: a worker for ``tools/benchmark.py --against``.

It needs numpy and the named program, and nothing of the suite, and runs in an environment of its own:

    python -m pip install torch timm onnxruntime openvino
    python opponents.py pytorch --references DIR [--bfloat16] [--compile] [--only training]
    python opponents.py onnxruntime --exported DIR
    python opponents.py openvino --exported DIR [--bfloat16]

DIR of ``--references`` holds clones of the papers' repositories under their own names: iFormer, MobileFormer,
dfformer, poolformer, convmixer (CoAtNet is timm's). DIR of ``--exported`` is what ``tools/benchmark.py --export DIR``
has written.

docs/PERFORMANCE.md describes the settings and the protocol.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Question = dict[str, Any]
Step = Callable[[], object]
PRODUCT_SIZE = 2048
NOT_MEASURED = "not measured"  # the answer to a question that is none for this program
# The clone and module of each network, and what builds it from the module, the number of classes and the image size.
REFERENCES: dict[str, tuple[str, str, Callable[[Any, int, int], Any]]] = {
    "iformer_small": ("iFormer", "models.inception_transformer", lambda it, classes, size: it.InceptionTransformer(
        depths=[3, 3, 9, 3], embed_dims=[96, 192, 320, 384], num_heads=[3, 6, 10, 12],
        attention_heads=[1] * 3 + [3] * 3 + [7] * 4 + [9] * 5 + [11] * 3, use_layer_scale=True, img_size=size,
        layer_scale_init_value=1e-6, num_classes=classes)),
    "mobileformer_26m": ("MobileFormer", "mobile_former", lambda it, classes, size: it.mobile_former_26m(
        num_classes=classes, img_size=size)),
    "dfformer_s18": ("dfformer", "models.dfformer", lambda it, *given: _dfformer(it, it.DynamicFilter, *given)),
    "cdfformer_s18": ("dfformer", "models.dfformer", lambda it, *given: _dfformer(
        it, [it.SepConv] * 2 + [it.DynamicFilter] * 2, *given)),
    "poolformer_s12": ("poolformer", "models.poolformer", lambda it, classes, _: it.poolformer_s12(
        num_classes=classes)),
    "convmixer_256_8": ("convmixer", "convmixer", lambda it, classes, _: it.ConvMixer(
        256, 8, kernel_size=5, patch_size=2, n_classes=classes)),
}


def _dfformer(module: Any, mixers: Any, classes: int, size: int) -> Any:
    return module.MetaFormer(depths=[3, 3, 9, 3], dims=[64, 128, 320, 512], token_mixers=mixers, head_fn=module.MlpHead,
                             input_size=(3, size, size), num_classes=classes)


class Opponent:
    """A program that is timed; its methods return one step of a question's work."""

    expected = (Exception,)  # whatever a program raises leaves its cell empty

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))

    def describe(self, question: Question) -> dict[str, str]:
        return {"name": self.name + " bf16" * self.arguments.bfloat16}

    def step(self, question: Question) -> Step:
        """Return what is timed; raises LookupError for work that this program does not do."""
        work = question["work"]
        if self.arguments.only not in ("", work) or not hasattr(self, work):
            raise LookupError(NOT_MEASURED)
        return getattr(self, work)(question)

    def exported(self, question: Question) -> Path:
        return self.arguments.exported / f"{question['model']}_{question['image_size']}" / "inference.onnx"


class Pytorch(Opponent):
    name = "PyTorch"

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        super().__init__(arguments)
        self.torch = torch
        torch.set_num_threads(self.threads)
        if arguments.compile:
            self.name = "PyTorch compile"
            import torch._inductor.config

            torch._inductor.config.freezing = True  # folds weights into constants, in inference only

    def product(self, question: Question) -> Step:
        dtype = self.torch.bfloat16 if self.arguments.bfloat16 else self.torch.float32
        a, b = self.torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE).to(dtype)
        return lambda: float((a @ b)[0, 0])

    def training(self, question: Question) -> Step:
        torch, network, images = self.torch, *self._network(question)
        network.train()
        labels = torch.arange(len(images)) % question["num_classes"]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        run = self._compiled(network)

        def step() -> None:
            with self._autocast():
                loss = torch.nn.functional.cross_entropy(run(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            float(loss)

        return step

    def inference(self, question: Question) -> Step:
        torch, network, images = self.torch, *self._network(question)
        network.eval()
        run = self._compiled(network)

        def step() -> None:
            with torch.no_grad(), self._autocast():
                run(images).float().numpy()

        if not self.arguments.bfloat16:
            return step
        whole, halves = copy.deepcopy(network).bfloat16(), images.bfloat16()
        cast = self._compiled(whole)

        def cast_step() -> None:
            with torch.no_grad():
                cast(halves).float().numpy()

        return fastest(step, cast_step)

    def _compiled(self, network: Any) -> Any:
        return self.torch.compile(network, dynamic=False) if self.arguments.compile else network

    def _autocast(self) -> Any:
        return self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.arguments.bfloat16)

    def _network(self, question: Question) -> tuple[Any, Any]:
        """Return a network and images, channels last."""
        if self.arguments.compile:
            self.torch.compiler.reset()  # other shapes would be a reason to compile for all shapes
        network, images = self._reference(question), self.torch.from_numpy(images_of(question))
        for layer in network.modules():
            if isinstance(layer, self.torch.nn.Conv2d):  # not DFFormer's filters, whose last axis is a complex number
                layer.to(memory_format=self.torch.channels_last)
        return network, images.to(memory_format=self.torch.channels_last)

    def _reference(self, question: Question) -> Any:
        import timm.layers.helpers
        import timm.models

        model, classes, size = question["model"], question["num_classes"], question["image_size"]
        if model == "coatnet_0":
            return timm.create_model("coatnet_0_224", num_classes=classes, img_size=size)
        if model not in REFERENCES:
            raise LookupError(f"no reference for {model}")
        clone, module, build = REFERENCES[model]
        # The clones expect timm as it was, or lie in its folder of models.
        sys.modules["timm.models.layers.helpers"] = timm.layers.helpers
        package = sys.modules[clone] = types.ModuleType(clone)
        package.__path__ = [str(self.arguments.references / clone), *timm.models.__path__]
        for name in ("features", "hub", "layers"):
            sys.modules[f"{clone}.{name}"] = OldTimm(name)
        return build(importlib.import_module(f"{clone}.{module}"), classes, size)


class OldTimm(types.ModuleType):
    """A module of timm as it was: today's layers, and None for what is only imported."""

    def __getattr__(self, name: str) -> Any:
        import timm.layers

        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(timm.layers, name, None)


class OnnxRuntime(Opponent):
    name = "ONNX Runtime"

    def inference(self, question: Question) -> Step:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = onnxruntime.InferenceSession(self.exported(question), options, providers=["CPUExecutionProvider"])
        images, name = images_of(question), session.get_inputs()[0].name
        return lambda: session.run(None, {name: images})


class OpenVino(Opponent):
    name = "OpenVINO"

    def inference(self, question: Question) -> Step:
        import openvino

        images, core = images_of(question), openvino.Core()

        def compiled(part: np.ndarray, hint: str) -> Any:
            network = core.read_model(self.exported(question))
            network.reshape(list(part.shape))
            return core.compile_model(network, "CPU", {
                "PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": self.threads,
                "INFERENCE_PRECISION_HINT": "bf16" if self.arguments.bfloat16 else "f32"})

        whole = compiled(images, "LATENCY")
        if len(images) % self.threads or len(images) == 1:
            return lambda: whole(images)
        parts = np.split(images, self.threads)
        side_by_side = compiled(parts[0], "THROUGHPUT")
        requests = [side_by_side.create_infer_request() for _ in parts]

        def run_parts() -> None:
            for request, part in zip(requests, parts, strict=True):
                request.start_async(part)
            for request in requests:
                request.wait()

        return fastest(lambda: whole(images), run_parts)


def images_of(question: Question) -> np.ndarray:
    shape = question["batch_size"], 3, question["image_size"], question["image_size"]
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def fastest(*steps: Step) -> Step:
    """Return the step that takes the least time, after a warm-up; one that fails is left out."""
    taken = {}
    for step in steps:
        try:
            step()
            taken[step] = min(timed(step, 0.2))
        except RuntimeError as error:
            print(error, file=sys.stderr)
    return min(taken, key=taken.get)


def timed(step: Step, seconds: float) -> list[float]:
    """Return the seconds of each step, of as many as fill ``seconds``, and of one at least."""
    taken: list[float] = []
    while not taken or sum(taken) < seconds:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return taken


def serve(program: Any) -> None:
    """Answer a question a line until the input ends or an error is not one of the program's ``expected``."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries is no answer
    asked, step = None, None  # kept: the next question usually is the same
    for line in sys.stdin:
        question = json.loads(line)
        seconds = question.pop("seconds", 0)
        try:
            if question["work"] == "describe":
                answer = program.describe(question)
            else:
                if question != asked:
                    step = None  # frees the memory of the one before
                    asked, step = question, program.step(question)
                answer = {"seconds": timed(step, seconds)}
        except program.expected as error:
            print(error, file=sys.stderr)
            answer = {"error": str(error).strip().partition("\n")[0][:200] or type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    programs = {"pytorch": Pytorch, "onnxruntime": OnnxRuntime, "openvino": OpenVino}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=programs)
    parser.add_argument("--bfloat16", action="store_true", help="not for onnxruntime")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--only", metavar="WORK", default="", help="training or inference, not both")
    parser.add_argument("--references", type=Path, default=".", help="PyTorch: the folder of clones")
    parser.add_argument("--exported", type=Path, default=".", help="the others: the folder of ONNX programs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    serve(programs[arguments.program](arguments))


if __name__ == "__main__":
    main()
