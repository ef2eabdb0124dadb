"""Released checkpoints: made from a real run, found by name and by ``paddle.hub``, refused when anything changed."""

import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from analysis.report import write_report
from analysis.results import release
from analysis.results.run_record import scrubber, seed_rows, training_command, training_cost
from configs.load import flatten, load_config
from datasets import build_dataset
from engine import released
from engine.model import find_weights, load_model, predict
from engine.released import check_released, released_names
from engine.weights import read_weights
from errors import UserError
from processes import ROOT, command, python
from tools import cli
from utils.fileio import read_csv, read_json

NAMES = {"model.safetensors", "config.yaml", "history.csv", "timing.csv", "train.log", "environment.json",
         "dataset.json", "results.json", "mistakes.csv", "SHA256SUMS"}
PRIVATE = re.compile(r"(?<![\w./])/(?:home|root|tmp|work|usr|opt|mnt|Users)/")


def read_results(folder: Path) -> dict:
    return read_json(folder / "results.json")


def config_of(file: Path | str | None, *overrides: str) -> dict:
    return dict(flatten(load_config(file, overrides)))


def differing(one: dict, other: dict) -> set[str]:
    return {key for key in one if one[key] != other[key]}


def test_the_folder_holds_what_it_should(toy: Path, runs: list[Path]) -> None:
    assert {path.name for path in toy.iterdir()} == {*NAMES, "seeds.csv"}
    assert [path.name for path in toy.parent.iterdir()] == ["toy"]
    check_released(toy)
    sums = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=toy, capture_output=True, text=True, check=True)
    assert sums.stdout.count(": OK") == len(NAMES)
    for path in set(toy.iterdir()) - {toy / "model.safetensors"}:
        text = path.read_text(encoding="utf-8")
        for private in (str(runs[0].parent), runs[0].parent.name, str(Path.home()) + "/", str(ROOT) + "/"):
            assert private not in text, f"{path.name} names {private}"
        assert not PRIVATE.search(text), path.name
    weights = load_file(toy / "model.safetensors")
    np.testing.assert_equal(weights, read_weights(runs[0] / "best_model.pdparams").arrays)
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}
    assert differing(config_of(toy / "config.yaml"), config_of(runs[0] / "config.yaml")) == {"OUTPUT"}


def test_its_metrics_are_those_of_the_file(toy: Path, runs: list[Path], tmp_path: Path) -> None:
    printed = command("eval", "-w", toy, "--json", tmp_path / "figures.json")
    figures, results = json.loads((tmp_path / "figures.json").read_text()), read_results(toy)
    (test,), own = results["test"], read_results(runs[0])
    for key in ("data", "pixels_sha256", "images", "loss", "top1", "top5", "ece", "brier", "per_class"):
        assert figures[key] == test[key], key
    assert {key: test[key] for key in own["selected"]["test"]} == own["selected"]["test"], "float32: the run's own"
    assert results["selected"] == own["selected"] and results["final"] == own["final"]
    assert f"released with {test['top1']:.2%} on these images (digits): the same here" in printed
    assert f"{test['top1']:.4%}" in printed and f"ECE    {test['ece']:8.4%}" in printed
    assert len((toy / "mistakes.csv").read_text().splitlines()) - 1 == round((1 - test["top1"]) * 360)
    training = results["training"]
    assert training["images"] == training["iterations"] * 64 == 2 * 19 * 64
    assert training["macs"] == 3 * results["macs"] * training["images"]
    assert training["seconds"] == training_cost(runs[0], load_config(runs[0] / "config.yaml"))["seconds"]
    weights = load_file(toy / "model.safetensors")
    trainable = [array.size for name, array in weights.items() if not name.endswith(("._mean", "._variance"))]
    assert results["parameters"] == sum(trainable)


def test_the_command_gives_the_config(toy: Path, runs: list[Path], tmp_path: Path) -> None:
    """It names a config of ours and what differs; carried out, it is the run's own config."""
    words = shlex.split(read_results(toy)["training"]["command"])
    assert words[:4] == ["python", "tools/train.py", "-c", "configs/quickstart.yaml"] and set(words[4::2]) == {"-o"}
    assert differing(config_of(ROOT / words[3], *words[5::2]), config_of(runs[0] / "config.yaml")) == {"OUTPUT"}

    config = load_config("configs/quickstart.yaml", ["TRAIN.EPOCHS=3"])
    environments = [{"command": ["train.py", "-c", "/a b/configs/quickstart.yaml", "--weights", "/x/w.pth"],
                     "processes": 2}, {"command": ["train.py", "--resume"], "processes": 1}]
    assert training_command(config, environments) == (
        "python -m paddle.distributed.launch --nproc_per_node 2 tools/train.py -c configs/quickstart.yaml "
        "-o TRAIN.EPOCHS=3 --weights w.pth")
    bare = shlex.split(training_command(config, [], tmp_path))
    assert load_config(None, bare[3::2]) == load_config("configs/quickstart.yaml", ["TRAIN.EPOCHS=3"])


def test_seeds_are_rows_of_their_results(toy: Path, runs: list[Path], tmp_path: Path) -> None:
    rows = (toy / "seeds.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["seed", "42", "43"]
    for row, run in zip(rows[1:], runs, strict=True):
        assert float(row.split(",")[2]) == read_results(run)["selected"]["test"]["top1"]
    with pytest.raises(UserError, match=r"RUNTIME\.SEED is 42, as in another"):
        seed_rows([runs[0], runs[0]])
    other = shutil.copytree(runs[1], tmp_path / "other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("LABEL_SMOOTHING: 0.1", "LABEL_SMOOTHING: 0.2"))
    with pytest.raises(UserError, match=r"LOSS\.LABEL_SMOOTHING is 0\.2, not 0\.1"):
        seed_rows([runs[0], other])


def test_names_are_found_and_paths_win(toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(released, "FOLDER", toy.parent)
    monkeypatch.chdir(tmp_path)
    assert released_names() == ["toy"]
    weights = toy / "model.safetensors"
    assert find_weights("toy") == find_weights(str(toy)) == find_weights(str(weights)) == weights
    with pytest.raises(UserError, match=r"toi: no such weights \(nearest: toy\); .*or a name in checkpoints/"):
        find_weights("toi")
    for name in ("../checkpoints/toy", "toy/..", ".", "*"):
        with pytest.raises(UserError):
            find_weights(name)
    (tmp_path / "toy").write_bytes(b"a file of one's own")
    assert find_weights("toy") == Path("toy")
    (tmp_path / "toy").rename(tmp_path / "toy.pdparams")
    assert find_weights("toy") == Path("toy.pdparams")


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: shutil.copy(folder / "config.yaml", folder / "model.safetensors"), "model.safetensors has sha256"),
    (lambda folder: (folder / "config.yaml").write_text("NAME: x"), "config.yaml has sha256"),
    (lambda folder: (folder / "train.log").unlink(), "train.log: cannot be read"),
    (lambda folder: (folder / "SHA256SUMS").write_text(""), "model.safetensors is not in it"),
    (lambda folder: (folder / "SHA256SUMS").write_text("0" * 64 + "  ../x\n"), "not a list of checksums"),
    (lambda folder: (folder / "SHA256SUMS").write_bytes(b"\xff\n"), "not a list of checksums"),
])
def test_what_is_not_as_released_is_refused(toy: Path, tmp_path: Path, change, words: str) -> None:
    folder = shutil.copytree(toy, tmp_path / "toy")
    change(folder)
    with pytest.raises(UserError, match=re.escape(words)):
        find_weights(str(folder))


def test_pictures_of_a_release_go_to_the_runs(toy: Path, tmp_path: Path) -> None:
    """A released folder is never written to; its report is written beside the runs."""
    config = load_config(toy / "config.yaml", [f"OUTPUT={tmp_path}"])
    home = cli.work_folder(str(toy), config)
    assert home == tmp_path / "released" / "toy"
    page = write_report(toy, home=home, overrides=["DATA.MAX_IMAGES=60"])
    assert page == home / "report.html" and (home / "report" / "mistakes.csv").exists() and (home / "loss.png").exists()
    assert f"{read_results(toy)['selected']['test']['top1']:.2%}"[:-1] in page.read_text()
    assert {path.name for path in toy.iterdir()} == {*NAMES, "seeds.csv"}


def test_runs_that_cannot_be_released(
        runs: list[Path], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = tmp_path / "none"
    with pytest.raises(UserError, match="is there already: replace it with --overwrite"):
        command("release", runs[0], "--name", "toy", "--into", toy.parent)
    with pytest.raises(UserError, match="is a released checkpoint, expected the folder of a run"):
        command("release", toy, "--into", none)
    for name in ("a/b", "..", "/x"):
        with pytest.raises(UserError, match=r"--name is|is there already"):
            release.release(runs[0], tmp_path, name=name)
    with pytest.raises(UserError, match=r"has no best_model\.pdparams and no environment\.json"):
        release.release(shutil.copytree(runs[0], tmp_path / "bare", ignore=lambda *found: {
            "best_model.pdparams", "environment.json"}), none)
    stopped = shutil.copytree(runs[0], tmp_path / "stopped")
    history = (stopped / "history.csv").read_text().splitlines()
    (stopped / "history.csv").write_text("\n".join(history[:2]) + "\n")
    (stopped / "results.json").unlink()
    with pytest.raises(UserError, match=r"epoch 1 of 2, no results\.json; continue it with --resume"):
        release.release(stopped, none)
    monkeypatch.setattr(release, "LARGEST", 1000)
    with pytest.raises(UserError, match="in float16, expected at most 1,000"):
        release.release(runs[0], none)
    assert not none.exists() or not list(none.iterdir())
    monkeypatch.undo()
    made = release.release(stopped, tmp_path / "some", unfinished=True)
    results = read_results(made)
    assert results["weights"]["epoch"] == 1 and "selected" not in results
    check_released(made)


def test_without_held_out_images_the_final_weights_are_released(runs: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs[0], tmp_path / "all")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("HOLDOUT: 180", "HOLDOUT: 0"))
    (run / "best_model.pdparams").write_bytes(b"not to be read")
    made = release.release(run, tmp_path / "some")
    assert read_results(made)["weights"]["kind"] == "final"
    weights = read_weights(run / "final_model.pdparams").arrays
    np.testing.assert_equal(load_file(made / "model.safetensors"), weights)


def test_large_weights_become_float16_in_filters_and_matrices() -> None:
    arrays = {"weight": np.linspace(-3, 3, 4096, dtype=np.float32).reshape(64, 64), "bias": np.full(64, 1e-9, "f4"),
              "counter": np.array([7])}
    same, precision = release.compact(arrays, largest=64 * 66 * 4)
    assert precision == "float32"
    np.testing.assert_equal(same, arrays)
    half, precision = release.compact(arrays, largest=64 * 66 * 3)
    assert precision.startswith("float16") and {name: array.dtype for name, array in half.items()} == {
        "weight": np.float16, "bias": np.float32, "counter": np.int64}
    np.testing.assert_allclose(half["weight"], arrays["weight"], rtol=2**-11)
    with pytest.raises(UserError, match=r"16,648 bytes in float32 and 8,456 in float16, expected at most 1,000"):
        release.compact(arrays, largest=1000)
    with pytest.raises(UserError, match="too large for float16"):
        release.compact({"weight": arrays["weight"] * 1e6}, largest=9000)


def test_a_file_in_float16_is_evaluated_as_it_is(runs: list[Path], tmp_path: Path) -> None:
    printed = command("release", runs[0], "--float16", "--name", "half", "--into", tmp_path)
    folder = tmp_path / "half"
    results = read_results(folder)
    assert results["weights"]["precision"].startswith("float16")
    assert f"# Result: {100 * results['test'][0]['top1']:.2f} % top-1 on digits (checkpoints/half)." in printed
    assert "bytes now" not in printed
    kinds = {array.dtype for array in load_file(folder / "model.safetensors").values()}
    assert kinds == {np.dtype("float16"), np.dtype("float32")}
    assert results["test"][0]["loss"] != results["selected"]["test"]["loss"]


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
    assert scrubber(["/secret-place/run"])({"texts": [text, 1]}) == {"texts": [clean, 1]}


@pytest.mark.parametrize("name", released_names())
def test_a_released_checkpoint_agrees_with_its_record(name: str, cifar10_root: str) -> None:
    """As released, small enough, from a config of today, and right and wrong on the images that it says."""
    folder = released.FOLDER / name
    check_released(folder)
    results = read_results(folder)
    (row,) = results["test"]
    assert results["weights"]["bytes"] == (folder / "model.safetensors").stat().st_size <= release.LARGEST
    for path in set(folder.iterdir()) - {folder / "model.safetensors"}:
        assert not PRIVATE.search(path.read_text(encoding="utf-8")), path
    words = shlex.split(results["training"]["command"])
    overrides = [word for flag, word in pairwise(words) if flag == "-o"]
    for path in (word for word in words if word.startswith("configs/")):
        changed = differing(config_of(ROOT / path, *overrides), config_of(folder / "config.yaml"))
        assert changed <= {"OUTPUT", "DATA.ROOT", "RUNTIME.THREADS"}, f"{path} has changed since"
        if not overrides:
            assert f"{100 * row['top1']:.2f} %" in (ROOT / path).read_text(encoding="utf-8"), path
    config = load_config(folder / "config.yaml", [f"DATA.ROOT={cifar10_root}", "RUNTIME.DEVICE=cpu"])
    if config.DATA.NAME == "cifar10":
        test = build_dataset(config.DATA, "test")
        chosen = np.arange(0, 10_000, 200)
        predicted = predict(config, load_model(config, folder)[0], [test.images[index] for index in chosen]).argmax(1)
        mistakes = [int(line["index"]) for line in read_csv(folder / "mistakes.csv")]
        assert len(mistakes) == round((1 - row["top1"]) * 10_000)
        # Other processors may round an image across the border.
        assert ((predicted != test.labels[chosen]) != np.isin(chosen, mistakes)).sum() <= 1


def test_all_released_checkpoints_together_are_small() -> None:
    total = sum(path.stat().st_size for path in released.FOLDER.rglob("*") if path.is_file())
    assert total <= release.LARGEST_TOGETHER


def test_networks_are_listed_described_and_loaded() -> None:
    names = paddle.hub.list(str(ROOT), source="local")
    assert {"iformer_cifar", "convmixer_256_8_cifar10", "coatnet_4", *released.released_names()} <= set(names)
    assert all(name.isidentifier() and name == name.lower() for name in names)
    described = paddle.hub.help(str(ROOT), "iformer_cifar", source="local")
    assert "iFormer" in described and "pretrained" in described

    name = "convmixer_256_8_cifar10"  # not the name of its network
    model = paddle.hub.load(str(ROOT), name, source="local", pretrained=True)
    images = paddle.randn([2, 3, 32, 32])
    own, _ = load_model(load_config(released.folder_of(name) / released.CONFIG), name)
    assert paddle.equal_all(model(images), own(images))
    other = paddle.hub.load(str(ROOT), "iformer_cifar", source="local", num_classes=3)
    assert other(images).shape == [2, 3]


def test_without_released_weights_pretrained_is_an_error() -> None:
    with pytest.raises(UserError, match=r"coatnet_0 has no released weights.*iformer_cifar"):
        paddle.hub.load(str(ROOT), "coatnet_0", source="local", pretrained=True)
    with pytest.raises(RuntimeError, match="Cannot find callable coatnet_9"):
        paddle.hub.load(str(ROOT), "coatnet_9", source="local")


def test_it_works_from_any_folder(tmp_path) -> None:
    """In a process that knows nothing of the suite's folder but through ``paddle.hub``."""
    code = ("import json, paddle; model = paddle.hub.load({0!r}, 'iformer_cifar', source='local', pretrained=True); "
            "print(json.dumps(model(paddle.ones([1, 3, 32, 32])).shape))")
    assert json.loads(python(code.format(str(ROOT)), cwd=tmp_path).splitlines()[-1]) == [1, 10]
