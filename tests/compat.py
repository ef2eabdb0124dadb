"""Run the suite's main jobs on several versions of Paddle: make compat, or python tests/compat.py 3.0.0

Each version gets an environment in output/compat/, made with the Python that runs this file; a second call uses it
again. Prints a table of what works, and keeps the output of each command in output/compat/<version>/.
"""

import json
import os
import platform
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "output" / "compat"
VERSIONS = ("2.6.2", "3.0.0", "3.2.2", "3.3.1")
# Paddle 2.6 is built for NumPy 1, and OpenCV 5 for NumPy 2.
PINS = {"2.6.2": {"numpy": "1.26.4", "opencv-python-headless": "4.11.0.86"}}
NOTEBOOK = ("nbclient", "ipykernel")
FIXTURES = ("iformer_small_32", "dfformer_s18_32", "coatnet_0_simple_32", "convmixer_256_8", "poolformer_s12_32",
            "mobileformer_26m_32", "mobileformer_26m_pvit_64")
CHECKPOINT = "iformer_cifar"


class Failed(Exception):
    """What did not work, in a few words."""


class Environment:
    """The environment of one version of Paddle, and the suite's commands in it."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.folder = FOLDER / f"paddle-{version}-python-{platform.python_version()}"
        self.out = self.folder / "out"

    def install(self) -> None:
        """Create the environment where it is missing or was not finished."""
        mark = self.folder / ".installed"
        if mark.exists():
            return
        venv.create(self.folder, with_pip=True, clear=True)
        self.out.mkdir()
        own = {"paddlepaddle": self.version, **PINS.get(self.version, {})}
        pins = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "constraints.txt"))
        for name, number in own.items():
            pins = re.sub(rf"(?m)^{name}==.*", f"{name}=={number}", pins)
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(line for line in pins.splitlines() if line[:1].isalnum()), encoding="utf-8")
        names = [line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()
                 if line[:1].isalnum()]
        self.run("install", "-m", "pip", "install", "-q", "-c", str(constraints), *names, *NOTEBOOK)
        mark.touch()

    def run(self, title: str, *arguments: str) -> str:
        """Run Python; return its output, which `<title>.log` keeps. Raises Failed for an exit code other than 0."""
        command = [str(self.folder / "bin" / "python"), *arguments]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        (self.out / f"{title}.log").write_text(done.stdout, encoding="utf-8")
        if done.returncode:
            raise Failed(f"exit code {done.returncode}: {(done.stdout.splitlines() or [''])[-1][:300]}")
        return done.stdout

    def train(self, name: str, *arguments: str) -> Path:
        """Train the quick start as run ``name``; return its folder."""
        self.run(name, "tools/train.py", "-c", "configs/quickstart.yaml", "-o", f"OUTPUT={self.out}", "-o",
                 f"NAME={name}", *arguments)
        return self.out / name

    def quick_start(self) -> str:
        run = self.train("quickstart", "--overwrite")
        top1 = json.loads((run / "results.json").read_text())["selected"]["test"]["top1"]
        compiled = json.loads((run / "environment.json").read_text())["kernels_in_use"]
        if top1 < 0.9:
            raise Failed(f"top-1 {top1:.2%}")
        return f"{top1:.2%}{'' if compiled else ', stock operators'}"

    def evaluation(self) -> str:
        root = os.environ.get("CIFAR10_ROOT")
        result = self.out / "evaluation.json"
        self.run("evaluation", "tools/eval.py", "-w", CHECKPOINT, "-o", "DATA.MAX_IMAGES=1000", "--json", str(result),
                 *(["-o", f"DATA.ROOT={root}"] if root else []))
        return f"{json.loads(result.read_text())['top1']:.2%}"

    def parity(self) -> str:
        return self.run("parity", "tools/parity.py", *FIXTURES).splitlines()[-1].partition(",")[0]

    def resume(self) -> str:
        """Compare a run of 30 steps with one that is stopped in its first epoch and resumed, byte by byte."""
        whole = self.train("whole", "--overwrite", "-o", "TRAIN.MAX_STEPS=30")
        self.train("resumed", "--overwrite", "-o", "TRAIN.MAX_STEPS=11")
        resumed = self.train("resumed", "--resume", "-o", "TRAIN.MAX_STEPS=30")
        for name in ("final_model.pdparams", "steps.csv", "history.csv"):
            if (whole / name).read_bytes() != (resumed / name).read_bytes():
                raise Failed(f"{name} differs")
        return "bit-identical"

    def summary(self) -> str:
        return re.search(r"[\d.]+G", self.run("summary", "tools/summary.py", "iformer_small"))[0]

    def export(self) -> str:
        lines = self.run("export", "tools/export.py", "-w", str(self.out / "quickstart"), str(self.out / "exported"),
                         "--overwrite").splitlines()
        return next(line.split(" to ")[1].split()[0] for line in lines if line.startswith("Paddle inference gives"))

    def notebook(self) -> str:
        self.run("notebook", "-c", "from nbclient.cli import main; main()", "notebooks/quickstart.ipynb")
        return "yes"


CHECKS: dict[str, Callable[[Environment], str]] = {
    "quick start: test top-1": Environment.quick_start,
    f"{CHECKPOINT}: top-1 of 1,000 test images": Environment.evaluation,
    "parity, a network of each paper": Environment.parity,
    "resumed run": Environment.resume,
    "summary: MACs of iFormer-S": Environment.summary,
    "export: deviation of the logits, in standard deviations": Environment.export,
    "notebook quickstart.ipynb": Environment.notebook,
}


def check(version: str) -> Iterator[str]:
    """Yield the result of each check on a version, printing it."""
    environment = Environment(version)
    environment.install()
    for title, function in CHECKS.items():
        try:
            result = function(environment)
        except Failed as error:
            result = f"no: {error}"
        print(f"Paddle {version}: {title}: {result}", flush=True)
        yield result


def main() -> int:
    """Print a Markdown table; return 1 if something does not work."""
    versions = sys.argv[1:] or VERSIONS
    columns = [list(check(version)) for version in versions]
    print(f"\n| Python {platform.python_version()}, Paddle | {' | '.join(versions)} |")
    print(f"| :--- |{' ---: |' * len(versions)}")
    for title, *cells in zip(CHECKS, *columns, strict=True):
        print(f"| {title} | {' | '.join(cells)} |")
    return any(cell.startswith("no: ") for column in columns for cell in column)


if __name__ == "__main__":
    sys.exit(main())
