"""What all tests share: Paddle with its threads set, the real CIFAR-10, two runs and a released checkpoint."""

import os
import signal
import sys
from pathlib import Path

import pytest

from engine import runtime

runtime.prepare()
# A shell's background jobs and nohup ignore these; the processes that tests interrupt would inherit it.
for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(signum) == signal.SIG_IGN:
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def cifar10_root() -> str:
    """Return the folder or archive named by CIFAR10_ROOT; skip where there is none."""
    root = os.environ.get("CIFAR10_ROOT", "")
    if not root or not Path(root).exists():
        pytest.skip("CIFAR10_ROOT does not name a folder with cifar-10-python.tar.gz")
    return root


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the compiled operators that are called from here on."""
    from kernels import dispatch

    calls, run = [], dispatch.core.eager._run_custom_op
    monkeypatch.setattr(dispatch.core.eager, "_run_custom_op",
                        lambda name, *rest: calls.append(name) or run(name, *rest))
    return calls


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train a tiny network twice in this process, with two seeds; return the runs' folders."""
    from configs.load import load_config
    from engine.train import train
    from processes import ROOT, TINY

    output, config = tmp_path_factory.mktemp("private-folder"), f"{ROOT}/configs/quickstart.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tools/train.py", "-c", config, "-o", f"OUTPUT={output}"])
        for seed in (42, 43):
            own = [f"OUTPUT={output}", "TRAIN.EPOCHS=2", f"NAME=seed{seed}", f"RUNTIME.SEED={seed}"]
            train(load_config(config, [*TINY, *own]))
    return [output / "seed42", output / "seed43"]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, runs: list[Path]) -> Path:
    """Release the first run, with the seeds of both; return the checkpoint's folder."""
    from analysis.results.release import release

    return release(runs[0], tmp_path_factory.mktemp("clone") / "checkpoints", name="toy", seeds=runs[1:])
