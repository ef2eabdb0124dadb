"""The READMEs: both say the same commands, and every one of them runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from engine.weights import save_weights
from models import create_model
from processes import ROOT, overrides, tool

READMES = (ROOT / "README.md", ROOT / "README_cn.md")
RUN_BY_CI = {"make train", "make test"}  # .ci/run calls both; the second is what runs this test


def _commands(path: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_both_languages_give_the_same_commands() -> None:
    english, chinese = map(_commands, READMES)
    assert english == chinese
    assert {"make train", "make test"} <= set(english)


def test_links_and_named_files_exist() -> None:
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"\]\((?!http)([^)]+)\)", text)
        names += re.findall(r"`((?:configs|kernels|docs)/[\w./]+\.\w+)`", text)
        assert names
        for name in names:
            file, _, heading = name.partition("#")
            assert (ROOT / file).exists(), f"{path.name} names {name}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], name
        configs = set(re.findall(r"`(\w+\.yaml)`", text))
        assert configs - {"config.yaml"} <= {config.name for config in (ROOT / "configs").glob("*.yaml")}


def test_requirements_are_installed_by_make() -> None:
    """The pip lines are those of `make setup`, which has made the environment that runs this."""
    rules = subprocess.run(["make", "-n", "-B", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for command in _commands(READMES[0]):
        if command.startswith("python -m pip install"):
            assert command.split("install ")[1] in rules, command


@pytest.mark.slow
def test_every_python_command_runs(cifar10_root: str, tmp_path: Path) -> None:
    """In their order, with the work cut short: one iteration, a small network, the run in a temporary folder."""
    model = create_model("iformer_small")
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_weights(tmp_path / "iformer_small.safetensors", arrays)
    (tmp_path / "iformer_small.safetensors").rename(tmp_path / "iformer_small.pth")  # recognised by its content
    short = overrides("TRAIN.MAX_STEPS=1", f"DATA.ROOT={cifar10_root}", f"OUTPUT={tmp_path / 'output'}",
                      "DATA.HOLDOUT=0", "MODEL.ARGS.depths=[1, 1, 1, 1]", "MODEL.ARGS.attention_heads=[1, 3, 7, 11]")
    part = overrides(f"DATA.ROOT={cifar10_root}", "DATA.MAX_IMAGES=500")
    more = {"train": short, "eval": part, "parity": ["convmixer_256_8"], "explain": ["--samples", "60"]}
    ran = 0
    for command in _commands(READMES[0]):
        words = shlex.split(command)
        if words[0] != "python" or words[1] == "-m":
            assert command in RUN_BY_CI or words[1] == "-m", command
            continue
        name, arguments = Path(words[1]).stem, words[2:]
        arguments = [word.replace("output/", f"{tmp_path}/output/") for word in arguments]
        arguments = [str(ROOT / word) if word.startswith("configs/") else word for word in arguments]
        arguments += more.get(name, [])
        tool(name, *arguments, cwd=tmp_path, timeout=600)
        ran += 1
    assert ran >= 10
    assert (tmp_path / "figures.json").exists() and (tmp_path / "confusion.png").exists()
    assert (tmp_path / "predictions.png").exists()
    run = tmp_path / "output" / "iformer_s_cifar10_32"
    assert (run / "report.html").exists() and (run / "spectrum.png").exists()
    assert list((run / "explain").glob("*.png"))
    assert (tmp_path / "iformer_small.pdparams").stat().st_size > 70_000_000
