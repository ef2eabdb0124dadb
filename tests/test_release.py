"""Released checkpoints: made from a real run, found by name in a copy of the suite, refused when anything changed."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from releasing import run_in
from safetensors.numpy import load_file

from analysis.report import write_report
from analysis.results import release
from analysis.results.page import duration, page, read_released
from analysis.results.run_record import Scrubber, seed_rows, training_command, training_cost
from configs.load import flatten, load_config
from datasets import build_dataset
from engine.model import find_weights, load_model, predict
from engine.weights import released
from engine.weights.load import read_weights
from engine.weights.released import check_released, released_names
from errors import UserError
from processes import ROOT, TINY, tool

NAMES = {"model.safetensors", "config.yaml", "history.csv", "timing.csv", "train.log", "environment.json",
         "dataset.json", "results.json", "mistakes.csv", "SHA256SUMS"}


def test_the_folder_holds_what_it_should(suite: Path, runs: list[Path]) -> None:
    folder = suite / "checkpoints" / "toy"
    assert {path.name for path in folder.iterdir()} == {*NAMES, "seeds.csv"}
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]
    check_released(folder)
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    assert sums.stdout.count(": OK") == len(NAMES)
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            for private in (str(runs[0].parent), runs[0].parent.name, str(Path.home()) + "/", str(ROOT) + "/"):
                assert private not in text, f"{path.name} names {private}"
            assert not re.search(r"(?<![\w./])/(?:home|root|tmp|work|usr|opt|mnt|Users)/", text), path.name
    weights, ours = load_file(folder / "model.safetensors"), read_weights(runs[0] / "best_model.pdparams").arrays
    assert weights.keys() == ours.keys()
    assert all(np.array_equal(weights[name], ours[name]) and weights[name].dtype == np.float32 for name in ours)
    config, trained = (dict(flatten(load_config(path / "config.yaml"))) for path in (folder, runs[0]))
    assert {key for key in config if config[key] != trained[key]} == {"OUTPUT"}


def test_its_figures_are_those_of_the_file(suite: Path, runs: list[Path]) -> None:
    folder = suite / "checkpoints" / "toy"
    done = run_in(suite, "eval", "-w", "toy", "--json", "figures.json")
    assert done.returncode == 0, done.stderr
    figures, results = (json.loads(path.read_text()) for path in (suite / "figures.json", folder / "results.json"))
    test, own = results["test"][0], json.loads((runs[0] / "results.json").read_text())
    for key in ("data", "pixels_sha256", "images", "loss", "top1", "top5", "ece", "brier", "per_class"):
        assert figures[key] == test[key], key
    assert {key: test[key] for key in own["selected"]["test"]} == own["selected"]["test"], "float32: the run's own"
    assert results["selected"] == own["selected"] and results["final"] == own["final"]
    assert f"released with {test['top1']:.2%} on these images (digits): the same here" in done.stdout
    assert f"{test['top1']:.4%}" in done.stdout and f"ECE    {test['ece']:8.4%}" in done.stdout
    wrong = (folder / "mistakes.csv").read_text().splitlines()[1:]
    assert len(wrong) == round((1 - test["top1"]) * 360)
    training = results["training"]
    assert training["images"] == training["iterations"] * 64 == 2 * 19 * 64
    assert training["macs"] == 3 * results["macs"] * training["images"]
    assert training["seconds"] == pytest.approx(training_cost(runs[0], load_config(runs[0] / "config.yaml"))["seconds"])
    weights = load_file(folder / "model.safetensors")
    trainable = [array.size for name, array in weights.items() if not name.endswith(("._mean", "._variance"))]
    assert results["parameters"] == sum(trainable)


def test_the_command_gives_the_config(suite: Path, runs: list[Path]) -> None:
    """It names a config of ours and what differs; carried out, it is the run's own config."""
    results = json.loads((suite / "checkpoints" / "toy" / "results.json").read_text())
    words = shlex.split(results["training"]["command"])
    assert words[:4] == ["python", "tools/train.py", "-c", "configs/quickstart.yaml"] and set(words[4::2]) == {"-o"}
    config = dict(flatten(load_config(ROOT / words[3], words[5::2])))
    trained = dict(flatten(load_config(runs[0] / "config.yaml")))
    assert {key for key in config if config[key] != trained[key]} == {"OUTPUT"}


def test_commands_of_several_processes_and_of_weights(tmp_path: Path) -> None:
    config = load_config("configs/quickstart.yaml", ["TRAIN.EPOCHS=3"])
    environments = [{"command": ["train.py", "-c", "/a b/configs/quickstart.yaml", "--weights", "/x/w.pth"],
                     "processes": 2}, {"command": ["train.py", "--resume"], "processes": 1}]
    assert training_command(config, environments) == (
        "python -m paddle.distributed.launch --nproc_per_node 2 tools/train.py -c configs/quickstart.yaml "
        "-o TRAIN.EPOCHS=3 --weights w.pth")
    bare = shlex.split(training_command(config, [], tmp_path))
    assert load_config(None, bare[3::2]) == load_config("configs/quickstart.yaml", ["TRAIN.EPOCHS=3"])


def test_what_starts_from_a_release_counts_its_cost(suite: Path, tmp_path: Path) -> None:
    """A run from released weights and one from its own: each has the cost of all before it, its command their name."""
    copy = shutil.copytree(suite, tmp_path / "copy")
    for name, start in (("again", "toy"), ("thrice", "checkpoints/again/model.safetensors")):
        overrides = [word for override in (*TINY, "TRAIN.EPOCHS=1", f"NAME={name}") for word in ("-o", override)]
        done = run_in(copy, "train", "-c", "configs/quickstart.yaml", "--weights", start, *overrides)
        assert done.returncode == 0, done.stderr
        done = run_in(copy, "release", f"output/{name}")
        assert done.returncode == 0, done.stderr
    results = {name: json.loads((copy / "checkpoints" / name / "results.json").read_text())["training"]
               for name in ("toy", "again", "thrice")}
    for name, before in (("again", ["toy"]), ("thrice", ["toy", "again"])):
        found = results[name]["before"]
        assert found["checkpoint"] == before[-1] and results[name]["command"].endswith(f" --weights {before[-1]}")
        assert found["sha256"] == released.file_sha256(copy / "checkpoints" / before[-1] / "model.safetensors")
        for key in ("epochs", "images", "seconds", "macs"):
            assert found[key] == sum(results[each][key] for each in before), key
    thrice = next(each for each in read_released(copy / "checkpoints") if each.name == "thrice")
    cost = page([thrice], [], {})
    assert f"| `thrice` | 3 + 1 | {duration(sum(each['seconds'] for each in results.values()))} |" in cost
    assert "- `thrice` starts from the weights of `again` (no longer in `checkpoints/`" in cost
    commands = [results[name]["command"] for name in ("toy", "again", "thrice")]
    assert results["thrice"]["before"]["commands"] == commands[:2]
    assert "\n".join(["```", "# thrice", *commands, "```"]) in cost
    cost = page(read_released(copy / "checkpoints"), [], {})
    assert "- `thrice` starts from the weights of `again`: " in cost and f"# thrice\n{commands[2]}\n" in cost
    assert "before" not in results["toy"]


def test_the_mean_with_what_a_run_started_from(suite: Path, tmp_path: Path) -> None:
    """It is that of both files, told with what chose it; refused where the held-out images do not prefer it."""
    copy = shutil.copytree(suite, tmp_path / "copy")
    overrides = [word for override in (*TINY, "TRAIN.EPOCHS=1", "NAME=again", "OPTIMIZER.LR=1e-5")
                 for word in ("-o", override)]
    done = run_in(copy, "train", "-c", "configs/quickstart.yaml", "--weights", "toy", *overrides)
    assert done.returncode == 0, done.stderr
    run, made = copy / "output" / "again", copy / "checkpoints" / "again"
    history = run / "history.csv"
    truth = history.read_text()
    heading, row = (line.split(",") for line in truth.splitlines())
    column = heading.index("val_accuracy")

    history.write_text(truth.replace(",".join(row), ",".join([*row[:column], "1.0", *row[column + 1:]])))
    refused = run_in(copy, "release", "output/again", "--average")
    assert refused.returncode == 2 and "the selected weights for 100.00%: release these, without" in refused.stderr
    assert not made.exists()
    history.write_text(truth.replace(",".join(row), ",".join([*row[:column], "0.0", *row[column + 1:]])))
    done = run_in(copy, "release", "output/again", "--average")
    assert done.returncode == 0, done.stderr
    started, own = (read_weights(path).arrays for path in (copy / "checkpoints" / "toy" / "model.safetensors",
                                                           run / "best_model.pdparams"))
    mean = load_file(made / "model.safetensors")
    assert mean.keys() == own.keys()
    for name, array in mean.items():
        np.testing.assert_allclose(array, (started[name].astype(float) + own[name]) / 2, rtol=1e-6, atol=1e-7)
    assert any(np.abs(mean[name] - own[name]).max() > 1e-6 for name in own)
    weights = json.loads((made / "results.json").read_text())["weights"]
    assert weights["kind"] == "averaged" and weights["selected_holdout_top1"] == 0.0
    config = load_config(made / "config.yaml")
    held_out = build_dataset(config.DATA, "holdout")
    predicted = predict(config, load_model(config, made)[0], list(held_out.images)).argmax(1)
    assert weights["holdout_top1"] == pytest.approx((predicted == held_out.labels).mean())
    text = page(read_released(copy / "checkpoints", ["again"]), [], {})
    assert "- `again` is the mean of the run's selected weights and those of `toy` that it started from: " in text
    assert "--weights toy\npython tools/release.py output/again --average\n" in text

    config = run / "config.yaml"
    config.write_text(re.sub(r"HOLDOUT: \d+", "HOLDOUT: 0", config.read_text()))
    refused = run_in(copy, "release", "output/again", "--average", "--overwrite")
    assert refused.returncode == 2 and "DATA.HOLDOUT is 0: --average needs held-out images" in refused.stderr


def test_a_release_is_made_anew_in_float16(suite: Path, tmp_path: Path) -> None:
    """All but the weights' precision and the figures of the new file stays as it was."""
    copy = shutil.copytree(suite, tmp_path / "copy")
    toy = copy / "checkpoints" / "toy"
    before, exact = json.loads((toy / "results.json").read_text()), load_file(toy / "model.safetensors")
    kept = {name: (toy / name).read_text() for name in (*NAMES, "seeds.csv")
            if name not in ("model.safetensors", "results.json", "mistakes.csv", "SHA256SUMS")}
    refused = run_in(copy, "release", "toy", "--float16")
    assert refused.returncode == 2 and "toy is there already: replace it with --overwrite" in refused.stderr
    refused = run_in(copy, "release", "toy", "--overwrite", "--average")
    assert refused.returncode == 2 and "toy is a released checkpoint: --average is for a run" in refused.stderr
    done = run_in(copy, "release", "toy", "--float16", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert "bytes now" not in done.stdout
    half = (toy / "model.safetensors").read_bytes()
    with (toy.parent / "large").open("wb") as file:
        file.truncate(60_000_000)
    done = run_in(copy, "release", "toy", "--overwrite")
    assert "bytes now: the suite's own repository keeps to 60,000,000" in done.stdout
    assert done.returncode == 0 and (toy / "model.safetensors").read_bytes() == half, "float16 stays"
    assert {name: (toy / name).read_text() for name in kept} == kept
    assert {path.name for path in toy.iterdir()} == {*NAMES, "seeds.csv"}
    for name, array in load_file(toy / "model.safetensors").items():
        assert array.dtype == (np.float16 if array.ndim > 1 else exact[name].dtype)
        np.testing.assert_array_equal(array, exact[name].astype(array.dtype))
    after = json.loads((toy / "results.json").read_text())
    assert after["weights"]["bytes"] == (toy / "model.safetensors").stat().st_size < 0.7 * before["weights"]["bytes"]
    assert after["weights"]["precision"].startswith("float16")
    assert after["test"][0]["loss"] != before["test"][0]["loss"]
    for results in (before, after):
        del results["test"], results["weights"]["bytes"], results["weights"]["precision"]
    assert after == before
    evaluated = run_in(copy, "eval", "-w", "toy")
    assert evaluated.returncode == 0 and "the same here" in evaluated.stdout, evaluated.stderr


def test_seeds_are_rows_of_their_results(suite: Path, runs: list[Path], tmp_path: Path) -> None:
    rows = (suite / "checkpoints" / "toy" / "seeds.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["seed", "42", "43"]
    for row, run in zip(rows[1:], runs, strict=True):
        assert float(row.split(",")[2]) == json.loads((run / "results.json").read_text())["selected"]["test"]["top1"]
    with pytest.raises(UserError, match=r"RUNTIME\.SEED is 42, as in another"):
        seed_rows([runs[0], runs[0]])
    other = shutil.copytree(runs[1], tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("LABEL_SMOOTHING: 0.1", "LABEL_SMOOTHING: 0.2"))
    with pytest.raises(UserError, match=r"LOSS\.LABEL_SMOOTHING is 0\.2, not 0\.1"):
        seed_rows([runs[0], other])


def test_names_are_found_and_paths_win(suite: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(released, "FOLDER", suite / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert released_names() == ["toy"]
    weights = suite / "checkpoints" / "toy" / "model.safetensors"
    assert find_weights("toy") == find_weights(str(weights.parent)) == find_weights(str(weights)) == weights
    with pytest.raises(UserError, match=r"toi: no such weights \(nearest: toy\); .*or a name in checkpoints/"):
        find_weights("toi")
    for name in ("../checkpoints/toy", "toy/..", ".", "*"):
        with pytest.raises(UserError):
            find_weights(name)
    (tmp_path / "toy").write_bytes(b"a file of one's own")
    assert find_weights("toy") == Path("toy")
    (tmp_path / "toy").rename(tmp_path / "toy.pdparams")
    assert find_weights("toy") == Path("toy.pdparams")


def test_a_wrong_name_and_a_changed_file_are_one_sentence(suite: Path, tmp_path: Path) -> None:
    done = run_in(suite, "eval", "-w", "toyy")
    assert done.returncode == 2 and "toyy: no such weights (nearest: toy)" in done.stderr
    copy = shutil.copytree(suite / "checkpoints" / "toy", tmp_path / "toy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    done = tool("predict", "-w", copy, "--index", "0", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "model.safetensors has sha256" in done.stderr and "restore it" in done.stderr
    assert not (tmp_path / "predictions.png").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: (folder / "config.yaml").write_text("NAME: x"), "config.yaml has sha256"),
    (lambda folder: (folder / "train.log").unlink(), "train.log cannot be read"),
    (lambda folder: (folder / "SHA256SUMS").write_text(""), "model.safetensors is not in it"),
    (lambda folder: (folder / "SHA256SUMS").write_text("0" * 64 + "  ../x\n"), "not a list of checksums"),
    (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\n"), "cannot be read"),
])
def test_what_is_not_as_released_is_refused(suite: Path, tmp_path: Path, change, words: str) -> None:
    folder = shutil.copytree(suite / "checkpoints" / "toy", tmp_path / "toy")
    change(folder)
    with pytest.raises(UserError, match=re.escape(words)):
        find_weights(str(folder))


def test_pictures_of_a_release_go_to_the_runs(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is released stays as it is; a report of it stands beside the runs."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    cli = importlib.import_module("cli")
    toy = suite / "checkpoints" / "toy"
    config = load_config(toy / "config.yaml", [f"OUTPUT={tmp_path}"])
    home = cli.work_folder(str(toy), config)
    assert home == tmp_path / "released" / "toy"
    page = write_report(toy, home=home, overrides=["DATA.MAX_IMAGES=60"])
    assert page == home / "report.html" and (home / "report" / "mistakes.csv").exists() and (home / "loss.png").exists()
    assert f"{json.loads((toy / 'results.json').read_text())['selected']['test']['top1']:.2%}"[:-1] in page.read_text()
    assert {path.name for path in toy.iterdir()} == {*NAMES, "seeds.csv"}


def test_what_cannot_be_released_is_told(runs: list[Path], suite: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    toy = suite / "checkpoints" / "toy"
    with pytest.raises(UserError, match="is there already: replace it with --overwrite"):
        release.release(runs[0], toy.parent, name="toy")
    for name in ("a/b", "..", "/x"):
        with pytest.raises(UserError, match=r"--name is|is there already"):
            release.release(runs[0], tmp_path, name=name)
    with pytest.raises(UserError, match=r"for a run started with --weights .*, this one started from random weights"):
        release.release(runs[0], tmp_path, average=True)
    with pytest.raises(UserError, match=r"has no best_model\.pdparams and no environment\.json"):
        release.release(shutil.copytree(runs[0], tmp_path / "bare", ignore=lambda *found: {
            "best_model.pdparams", "environment.json"}), tmp_path / "none")
    stopped = shutil.copytree(runs[0], tmp_path / "stopped")
    history = (stopped / "history.csv").read_text().splitlines()
    (stopped / "history.csv").write_text("\n".join(history[:2]) + "\n")
    (stopped / "results.json").unlink()
    with pytest.raises(UserError, match=r"epoch 1 of 2, no results\.json; continue it with --resume"):
        release.release(stopped, tmp_path / "none")
    monkeypatch.setattr(release, "LARGEST", 1000)
    with pytest.raises(UserError, match="in float16, expected at most 1,000"):
        release.release(runs[0], tmp_path / "none")
    assert not (tmp_path / "none").exists() or not list((tmp_path / "none").iterdir())
    monkeypatch.undo()
    made = release.release(stopped, tmp_path / "some", unfinished=True)
    assert made.results["weights"]["epoch"] == 1 and "selected" not in made.results
    assert made.together == sum(path.stat().st_size for path in made.folder.iterdir())
    check_released(made.folder)


def test_of_a_run_that_held_nothing_out_the_final_weights(runs: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "all")
    config = run / "config.yaml"
    text = config.read_text()
    assert "HOLDOUT: 180" in text
    config.write_text(text.replace("HOLDOUT: 180", "HOLDOUT: 0"))
    final = read_weights(run / "final_model.pdparams").arrays
    (run / "best_model.pdparams").write_bytes(b"not to be read")
    made = release.release(run, tmp_path / "some")
    weights = load_file(made.folder / "model.safetensors")
    assert made.results["weights"]["kind"] == "final"
    assert all(np.array_equal(weights[name], final[name]) for name in final)


def test_large_weights_become_float16_in_filters_and_matrices() -> None:
    arrays = {"weight": np.linspace(-3, 3, 4096, dtype=np.float32).reshape(64, 64), "bias": np.full(64, 1e-9, "f4"),
              "counter": np.array([7])}
    same, told = release.compact(arrays, largest=64 * 66 * 4)
    assert told == "float32" and all(np.array_equal(same[name], arrays[name]) for name in arrays)
    half, told = release.compact(arrays, largest=64 * 66 * 3)
    assert told.startswith("float16") and {name: array.dtype for name, array in half.items()} == {
        "weight": np.float16, "bias": np.float32, "counter": np.int64}
    np.testing.assert_allclose(half["weight"], arrays["weight"], rtol=2**-11)
    with pytest.raises(UserError, match=r"16,648 bytes in float32 and 8,456 in float16, expected at most 1,000"):
        release.compact(arrays, largest=1000)
    with pytest.raises(UserError, match="too large for float16"):
        release.compact({"weight": arrays["weight"] * 1e6}, largest=9000)


def test_a_file_in_float16_is_evaluated_as_released(runs: list[Path], tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "LARGEST", 80_000)
    made = release.release(runs[0], tmp_path, name="half")
    assert made.results["weights"]["precision"].startswith("float16")
    kinds = {array.dtype for array in load_file(made.folder / "model.safetensors").values()}
    assert kinds == {np.dtype("float16"), np.dtype("float32")}
    config = load_config(made.folder / "config.yaml")
    test = build_dataset(config.DATA, "test")
    predicted = predict(config, load_model(config, made.folder)[0], list(test.images)).argmax(1)
    assert (predicted == test.labels).mean() == made.results["test"][0]["top1"]
    assert made.results["test"][0]["loss"] != made.results["selected"]["test"]["loss"]


@pytest.mark.parametrize(("text", "clean"), [
    ("wrote /tmp/x y/run", "wrote <path> y/run"),
    ("epoch 1/3, 5 images/s, N/A, a / b", "epoch 1/3, 5 images/s, N/A, a / b"),
    ("DATA.ROOT=/data/me/cifar", "DATA.ROOT=<path>"), ("OUTPUT=../../private", "OUTPUT=<path>"), ("~/data", "<path>"),
    ("see https://a.org/b/c", "see https://a.org/b/c"), ("/home/me/suite/configs/a.yaml", "configs/a.yaml"),
    (f"{ROOT}/configs/_base_/a.yaml", "configs/_base_/a.yaml"), ("g++ -I/usr/inc -O3", "g++ -I<path> -O3"),
    ("file:///secret-place/run/a", "file://<path>"), ("Linux-6.1.2-me-v6-x86_64-with-glibc2.36",
                                                    "Linux-6.1.2-x86_64-with-glibc2.36"),
])
def test_names_of_folders_are_taken_out(text: str, clean: str) -> None:
    assert Scrubber(["/secret-place/run"]).text(text) == clean


@pytest.mark.parametrize("name", released_names())
def test_a_released_checkpoint_says_what_its_record_says(name: str, cifar10_root: str) -> None:
    """As released, small enough, told in its config's head, and right and wrong on the images that it says."""
    folder = released.FOLDER / name
    check_released(folder)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["weights"]["bytes"] == (folder / "model.safetensors").stat().st_size <= release.LARGEST
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert not re.search(r"(?<![\w./])/(?:home|root|tmp|work|opt|mnt|Users)/", path.read_text(encoding="utf-8"))
    before = results["training"].get("before")
    if before and before["checkpoint"] not in released_names():
        assert len(before["commands"]) > 0, "it can be made again"
    elif before:
        assert before["sha256"] == released.file_sha256(released.FOLDER / before["checkpoint"] / "model.safetensors")
    for teacher in results["training"].get("teachers", {}):
        sha256 = released.file_sha256(released.FOLDER / teacher / "model.safetensors")
        assert f"teacher {teacher}: sha256 {sha256}" in (folder / "train.log").read_text(encoding="utf-8")
    words = shlex.split(results["training"]["command"])
    configs = [word for word in words if word.startswith("configs/")]
    for path in configs:
        overrides = [word for flag, word in pairwise(words) if flag == "-o"]
        now = dict(flatten(load_config(ROOT / path, overrides)))
        then = dict(flatten(load_config(folder / "config.yaml")))
        assert {key for key in now if now[key] != then[key]} <= {"OUTPUT", "DATA.ROOT"}, f"{path} has changed since"
        if len(overrides) == 0:
            assert f"{100 * results['test'][0]['top1']:.2f} %" in (ROOT / path).read_text(encoding="utf-8"), path
    config = load_config(folder / "config.yaml", [f"DATA.ROOT={cifar10_root}", "RUNTIME.DEVICE=cpu"])
    if config.DATA.NAME == "cifar10" and results["test"][0]["images"] == 10_000:
        test = build_dataset(config.DATA, "test")
        chosen = np.arange(0, 10_000, 100)
        predicted = predict(config, load_model(config, folder)[0], [test.images[index] for index in chosen]).argmax(1)
        wrong = {int(line.split(",")[0]) for line in (folder / "mistakes.csv").read_text().splitlines()[1:]}
        assert len(wrong) == round((1 - results["test"][0]["top1"]) * 10_000)
        for row in results["test"][1:]:
            images = row["images"]
            assert row["same_pictures_top1"] == (images - sum(index < images for index in wrong)) / images
        differing = [index for index, guess in zip(chosen, predicted, strict=True)
                     if (guess != test.labels[index]) != (index in wrong)]
        assert len(differing) <= 1, "other processors may round an image across the border"


def test_all_released_checkpoints_together_are_small() -> None:
    total = sum(path.stat().st_size for path in released.FOLDER.rglob("*") if path.is_file())
    assert total <= release.LARGEST_TOGETHER
