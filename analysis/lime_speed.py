"""LIME's samples per second: the suite's against InterpretDL's own loop, in one run, processes in turn.

    python -m analysis.lime_speed -w output/iformer_s_cifar10_32

Three ways, each in processes of their own, since threads and math libraries are chosen when Paddle loads:

- ``notebook``: InterpretDL as a notebook calls it (batches of 100, Paddle's own operators, Paddle's own choice of
  threads), with what it needs to run at all (the former Ridge, the device);
- ``environment``: the same with the suite's threads and math library settings;
- ``suite``: ``explain_lime``.

All get the same image, superpixels and random numbers; the largest difference between their weights is told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from configs.load import load_config

WAYS = ("notebook", "environment", "suite")
NOTEBOOK_BATCH = 100
SET_BY_THE_SUITE = ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def measure(way: str, config_path: str, weights: str, overrides: list[str], index: int, samples: int) -> None:
    """Time one way in this process and print a line of JSON: seconds, and the weights of the predicted class."""
    config = load_config(Path(config_path), [*overrides, *(["RUNTIME.KERNELS=stock"] if way != "suite" else [])])
    from engine import runtime

    if way != "notebook":
        runtime.prepare(config.RUNTIME.THREADS)
    from analysis.explain.interpretdl import FromImageNet, lime_interpreter
    from analysis.explain.lime import explain_lime, superpixels
    from analysis.explain.subject import Subject
    from datasets import build_dataset
    from engine.model import load_model

    runtime.start(config)
    subject = Subject(config, load_model(config, weights)[0])
    image = subject.prepare(build_dataset(config.DATA, "test").images[index])
    segments = superpixels(image)
    predicted = int(subject.probabilities_of(image).argmax())
    network = FromImageNet(subject.model, tuple(config.AUGMENT.MEAN), tuple(config.AUGMENT.STD))

    def explain(count: int) -> np.ndarray:
        if way == "suite":
            return explain_lime(subject, image, num_samples=count, segments=segments).arrays["weights"][0]
        interpreter = lime_interpreter(network, segments, None, seed=0)
        found = interpreter.interpret(image, interpret_class=predicted, num_samples=count, batch_size=NOTEBOOK_BATCH,
                                      visual=False)[predicted]
        return np.array([weight for _, weight in sorted(found)])

    explain(NOTEBOOK_BATCH)
    started = time.perf_counter()
    weights_found = explain(samples)
    print(json.dumps({"seconds": time.perf_counter() - started, "weights": weights_found.tolist()}))


def main(arguments: argparse.Namespace) -> None:
    """Run the ways in turn and print samples per second, their ratios and the difference of their weights."""
    config = arguments.config or str(Path(arguments.weights) / "config.yaml")
    rates, found = {way: [] for way in WAYS}, {}
    for number in range(arguments.rounds):
        for way in WAYS:
            environment = {key: value for key, value in os.environ.items() if key not in SET_BY_THE_SUITE}
            command = [sys.executable, "-m", "analysis.lime_speed", "--way", way, "-c", config, "-w", arguments.weights,
                       "--index", str(arguments.index), "--samples", str(arguments.samples)]
            command += [word for pair in arguments.override for word in ("-o", pair)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            result = json.loads(run.stdout.splitlines()[-1])
            rates[way].append(arguments.samples / result["seconds"])
            found[way] = np.array(result["weights"])
            print(f"round {number + 1}, {way}: {rates[way][-1]:.1f} samples/s", flush=True)
    medians = {way: float(np.median(values)) for way, values in rates.items()}
    for way, rate in medians.items():
        difference = np.abs(found[way] - found["suite"]).max() / np.abs(found["suite"]).max()
        print(f"{way:<12} {rate:8.1f} samples/s; the suite is {medians['suite'] / rate:.2f} times as fast; its weights "
              f"differ by {difference:.1e} of the largest")


def parser() -> argparse.ArgumentParser:
    """Return the arguments of this command."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("-c", "--config")
    result.add_argument("-w", "--weights", required=True)
    result.add_argument("-o", "--override", action="append", default=[])
    result.add_argument("--index", type=int, default=1)
    result.add_argument("--samples", type=int, default=1000)
    result.add_argument("--rounds", type=int, default=3)
    result.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return result


if __name__ == "__main__":
    given = parser().parse_args()
    if given.way:
        measure(given.way, given.config, given.weights, given.override, given.index, given.samples)
    else:
        main(given)
