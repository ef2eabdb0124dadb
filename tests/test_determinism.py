"""The same seed gives the same weights in every family, in two processes, however many threads prepare batches.

The threads of the operators are one: with another number Paddle adds up in another order.
"""

import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2


def weights_after(name: str, workers: int) -> str:
    """Return the SHA-256 of a network's state after a few steps with everything that draws random numbers."""
    from configs.load import load_config
    from engine import runtime
    from engine.data import build_train_loader
    from engine.state import TrainingState

    config = load_config(None, [
        f"MODEL.NAME={name}", f"MODEL.DROP_PATH={0.0 if name.startswith('paddle/') else 0.3}", "DATA.NAME=digits",
        "DATA.HOLDOUT=180", "DATA.IMAGE_SIZE=32",
        "DATA.BATCH_SIZE=6", f"DATA.WORKERS={workers}", "AUGMENT.MIXUP=0.8", "AUGMENT.CUTMIX=1.0",
        "AUGMENT.ERASING=0.25", "TRAIN.EMA_DECAY=0.9", "TRAIN.GRAD_CLIP=1.0", "RUNTIME.DEVICE=cpu"])
    runtime.start(config)
    state = TrainingState(config)
    batches = build_train_loader(config).epoch(0)
    for step in range(STEPS):
        images, labels, *_ = next(batches)
        state.step(images, labels, step, 1e-3)
    batches.close()
    digest = hashlib.sha256()
    for part in (state.model.state_dict(), state.ema.state):
        for key in sorted(part):
            digest.update(key.encode() + part[key].numpy().tobytes())
    return digest.hexdigest()


def families() -> list[str]:
    """Return the smallest network of each family, and one of Paddle's own."""
    from models import list_models, model_info

    smallest: dict[str, str] = {}
    for name in sorted(list_models(), key=lambda name: model_info(name).variant.parameters or 0):
        smallest.setdefault(model_info(name).family, name)
    return [*smallest.values(), "paddle/mobilenet_v3_small"]


def _digests(workers: int) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, __file__, str(workers)], cwd=ROOT, text=True, capture_output=True,
                          timeout=400, env={**kept, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights() -> None:
    """In two processes, of which one prepares its batches in three threads."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        once, again = pool.map(_digests, (0, 3))
    assert len(once) >= 7
    assert once == again
    assert len(set(once.values())) == len(once)


def test_environment_tells_versions_and_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a clean checkout, a changed one, an archive unpacked inside another repository, and without git."""
    from engine import runtime

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, text=True,
                              capture_output=True).stdout.strip()

    (tmp_path / "file").write_text("1")
    git("init", "-q")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert runtime._git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert runtime._git_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "unpacked").mkdir()
    assert runtime._git_commit(tmp_path / "unpacked") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime._git_commit(tmp_path) is None
    found = runtime.environment("cpu", ["A=1"])
    assert found["command"] and found["threads"] and found["paddle"].startswith("3.")
    assert found["device"] == "cpu" and found["set_by_the_suite"] == ["A=1"]
    assert all(found["packages"][name] for name in ("opencv-python-headless", "safetensors", "PyYAML"))
    assert set(found["kernels"]) >= {"mode", "in_use"}


if __name__ == "__main__":
    from engine import runtime

    runtime.prepare(1)
    print(json.dumps({name: weights_after(name, int(sys.argv[1])) for name in families()}))
