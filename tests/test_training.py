"""Training as a user runs it: what it leaves, how it stops, and that resuming changes nothing."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from test_kills import differences

from engine.run import read_table
from processes import overrides, start_tool, tiny_run, tool, trained, wait_for

# Everything that draws random numbers (dropout, drop path, mixup, cutmix, augmentation), and everything that must be
# carried along (EMA, batch statistics, optimizer).
RANDOM = ("TRAIN.EPOCHS=3", "MODEL.DROP_PATH=0.2", "MODEL.ARGS.drop_rate=0.1", "AUGMENT.MIXUP=0.8",
          "AUGMENT.CUTMIX=1.0", "TRAIN.EMA_DECAY=0.9", "TRAIN.LOG_EVERY=1", "DATA.WORKERS=2", "TRAIN.GRAD_CLIP=1.0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    tool("train", *tiny_run(output, *RANDOM))
    return output / "quickstart"


def test_run_folder_holds_what_it_should(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "environment.json", "train.log", "history.csv", "steps.csv", "timing.csv",
                     "best_model.pdparams", "best_optimizer.pdopt", "final_model.pdparams", "final_optimizer.pdopt",
                     "checkpoints", "loss.png", "accuracy.png", "predictions.png", "results.json", "vdl"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert [row["epoch"] for row in read_table(finished / "history.csv")] == ["1", "2", "3"]
    assert len(read_table(finished / "steps.csv")) == 3 * 19
    assert len(list((finished / "checkpoints").iterdir())) == 2
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["device"] == "cpu" and environment["precision"] == "float32"
    for name in ("loss.png", "accuracy.png", "predictions.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_evaluation_gives_the_metrics_of_the_run(finished: Path, tmp_path: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    done = tool("eval", "-w", finished, "--json", tmp_path / "e.json", "--confusion", tmp_path / "c.png",
                "--report", tmp_path / "r.csv", "--report-every", "1")
    metrics, expected = json.loads((tmp_path / "e.json").read_text()), results["selected"]["test"]
    assert {key: metrics[key] for key in expected} == expected
    confusion = np.array(metrics["confusion"])
    assert confusion.sum() == metrics["images"] == 360
    assert confusion.trace() / 360 == metrics["top1"]
    assert f"{metrics['top1']:.4%}" in done.stdout and f"* Acc@1 {100 * metrics['top1']:.3f}" in done.stdout
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3


def test_a_run_stopped_killed_and_damaged_ends_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    """SIGTERM saves; after SIGKILL the newest checkpoint is truncated, and the one before it is used."""
    run = tmp_path / "quickstart"
    process = start_tool("train", *tiny_run(tmp_path, *RANDOM))
    wait_for(process, run / "steps.csv", "\n5,1,")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "continue with --resume" in output and "Traceback" not in output

    process = start_tool("train", *tiny_run(tmp_path, *RANDOM), "--resume")
    wait_for(process, run / "history.csv", "\n2,38,")
    wait_for(process, run / "steps.csv", "\n40,3,")
    process.kill()
    process.communicate()
    newest = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])

    done = tool("train", *tiny_run(tmp_path, *RANDOM), "--resume")
    assert f"{newest}: not a whole checkpoint" in done.stdout and "resuming from" in done.stdout
    assert not differences(finished, run)


def test_resuming_a_folder_by_its_name_and_for_longer(tmp_path: Path) -> None:
    trained(tmp_path, "TRAIN.EPOCHS=2", "TRAIN.MAX_STEPS=10")
    more = tool("train", "--resume", tmp_path / "quickstart", *overrides("TRAIN.MAX_STEPS=0"))
    assert "TRAIN.MAX_STEPS was 10, now 0" in more.stdout
    assert [row["iteration"] for row in read_table(tmp_path / "quickstart" / "history.csv")] == ["19", "38"]
