"""The table of the zoo, the page that is made of it, and the commands that print them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.formatting import quantity
from analysis.parity import fixture_names, model_for
from analysis.results import zoo
from analysis.results.zoo import MODEL_HEADINGS, PARITY_HEADINGS, page
from errors import UserError
from models import list_models, model_info

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "references"
MEASURED = {MODEL_HEADINGS: ("#Params", "FLOPs"), PARITY_HEADINGS: PARITY_HEADINGS[1:]}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def without_measurements(text: str) -> list[str]:
    """Return the lines of a page with dashes for what was measured."""
    lines, measured = [], []
    for line in text.splitlines():
        if line.startswith("| "):
            row = cells(line)
            if tuple(row) in MEASURED:
                measured = [row.index(heading) for heading in MEASURED[tuple(row)]]
            elif line.startswith("| `"):
                line = " | ".join("–" if index in measured else cell for index, cell in enumerate(row))
        lines.append(line.strip("| "))
    return lines


def page_rows(headings: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Return the rows of the committed page's tables with these headings, by their first cell."""
    rows, inside = {}, False
    for line in (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8").splitlines():
        inside = tuple(cells(line)) == headings or (inside and line.startswith("| "))
        if inside and line.startswith("| `"):
            row = dict(zip(headings, cells(line), strict=True))
            rows[row[headings[0]].strip("`")] = row
    return rows


def sections(text: str) -> dict[str, list[str]]:
    """Return the parts of a page by family and reference, with dashes for what was measured."""
    parts = f"\n{text}".split("\n## ")
    keys = [": ".join(re.findall(r"^[^:\n]+(?=:)|(?<=Reference: \[)[^]]+", part)) for part in parts]
    return {key: without_measurements(part) for key, part in zip(keys, parts, strict=True)}


def test_page_is_the_generated_one() -> None:
    """A paper that the page does not show at all is a warning: a new one comes before its measurements."""
    committed = sections((ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8"))
    generated = sections(page({}, {}, fixture_names(REFERENCE)))
    if missing := generated.keys() - committed.keys():
        message = f"MODEL_ZOO.md lacks {', '.join(missing)}: run tools/summary.py --write MODEL_ZOO.md"
        warnings.warn(message, stacklevel=1)
    shown = {heading: lines for heading, lines in generated.items() if heading not in missing}
    assert committed == shown, "run tools/summary.py --write MODEL_ZOO.md"


def test_page_has_the_counts_of_the_registry() -> None:
    rows = page_rows(MODEL_HEADINGS)
    assert len(rows) > 50
    for name, row in rows.items():
        variant = model_info(name).variant
        assert row["#Params"].split(" ")[0] == f"{variant.parameters:,}"
        if variant.macs is not None:
            assert row["FLOPs"].split(" ")[0] == quantity(variant.macs)


def test_page_shows_parity_of_every_fixture() -> None:
    rows = page_rows(PARITY_HEADINGS)
    models = page_rows(MODEL_HEADINGS)
    assert sorted(rows) == [name for name in fixture_names(REFERENCE) if model_for(name)[0] in models]
    for row in rows.values():
        assert row["#Params"] == "equal"
        assert float(row["Logits, float32"]) < 1e-4
        assert float(row["Logits, float64"]) < 1e-8


@pytest.mark.parametrize("name", list_models())
def test_deviations_from_the_paper_are_explained(name: str) -> None:
    variant = model_info(name).variant
    deviations = (zoo.deviation(variant.parameters, variant.paper_parameters),
                  zoo.deviation(variant.macs, variant.paper_macs))
    assert variant.note or all(abs(value or 0) <= 0.01 for value in deviations)


@pytest.mark.parametrize(
    ("value", "figure", "expected"),
    [(19_866_344, "19.866M", 0), (19_866_344, "20M", 0), (20_899_944, "20M", 0.045), (1_812_267_008, "1.8G", 0),
     (4_825_828_736, "4.849G", -0.004779), (23_550_208, "26M", -0.09422), (5, "", None), (5, "n/a", None)],
)
def test_deviation_from_a_printed_figure(value: int, figure: str, expected: float | None) -> None:
    assert zoo.deviation(value, figure) == (expected if expected is None else pytest.approx(expected, abs=1e-5))


def test_patterns_and_names_select_models() -> None:
    assert zoo.select([]) == list_models()
    assert zoo.select(["convmixer_*_20", "iformer_small", "convmixer_1536_20"]) == [
        "convmixer_1536_20", "convmixer_1024_20", "iformer_small"]
    assert zoo.select(["paddle/resnet18"]) == ["paddle/resnet18"]
    with pytest.raises(UserError, match="nearest: iformer_small"):
        zoo.select(["iformer_smal"])
    with pytest.raises(UserError, match=r"no model fits the pattern 'iformr_\*'"):
        zoo.select(["iformr_*"])


def test_summary_prints_and_writes(tmp_path: Path, command: Callable[..., str]) -> None:
    printed = command("summary", "iformer_small", "convmixer_256_8", "--json", tmp_path / "table.json")
    assert re.search(r"iformer_small +224 +19,866,344 +19\.866M += +4\.826G +4\.849G +-0\.5 % +26\.\d\dM\n", printed)
    first, second = json.loads((tmp_path / "table.json").read_text())
    assert (first["parameters"], first["macs"]) == (19_866_344, 4_825_828_736)
    assert first["macs_deviation"] == pytest.approx(4_825_828_736 / 4.849e9 - 1)
    assert second["image_size"] == [32, 32]
    printed = command("summary", "iformer_small", "--image-size", "32x64", "--num-classes", "10")
    assert "32x64" in printed and "19.866M" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("iformer_smal",), "nearest: iformer_small"),
        (("iformer_small", "--image-size", "-3"), "--image-size is '-3'"),
        (("iformer_small", "--num-classes", "-3"), "num_classes is -3"),
        (("iformer_small", "--write", "page.md"), "--write is for all models"),
    ],
)
def test_summary_refuses_invalid_arguments(arguments: tuple[str, ...], said: str, command: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=said):
        command("summary", *arguments)


def test_parity_prints_errors_and_returns_1_for_another_network(
        tmp_path: Path, command: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(REFERENCE / "convmixer_256_8.json", tmp_path)
    (tmp_path / "fill.py").write_text("raise SystemExit('code of the folder has run')")
    arrays = dict(np.load(REFERENCE / "convmixer_256_8.npz"))
    np.savez(tmp_path / "convmixer_256_8.npz", **arrays)
    printed = command("parity", "--fixtures", tmp_path, "--json", tmp_path / "errors.json")
    assert "1 of 1 equal their references" in printed
    (record,) = json.loads((tmp_path / "errors.json").read_text())
    assert record["missed"] == [] and 0 < record["logits_float64"] < 1e-8

    arrays["logits_float64"][1, 3] += 1e-3
    np.savez(tmp_path / "convmixer_256_8.npz", **arrays)
    from tools import parity

    assert parity.main(parity.parser().parse_args(["--fixtures", str(tmp_path)])) == 1
    printed = capsys.readouterr().out
    assert "not equal: logits_float32" in printed and "0 of 1 equal their references" in printed


def test_parity_refuses_unknown_names_and_empty_folders(tmp_path: Path, command: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="nearest: iformer_small"):
        command("parity", "iformer_smal")
    with pytest.raises(UserError, match="has no fixtures"):
        command("parity", "--fixtures", tmp_path)
