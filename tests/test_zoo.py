"""The table of the zoo, the page that is made of it, and the commands that print them."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from analysis.formatting import quantity
from analysis.parity import REFERENCE, fixture_names, model_for
from analysis.results import zoo
from analysis.results.zoo import MODEL_HEADINGS, PARITY_HEADINGS, page
from errors import UserError
from models import list_models, model_info
from processes import ROOT, call, command

MEASURED = {"#Params", "FLOPs", *PARITY_HEADINGS[2:]}
Rows = dict[str, dict[str, str]]
Page = tuple[dict[str, list[str]], Rows, Rows]


def read_page(text: str) -> Page:
    """Return the lines of each section by its reference, with dashes for what was measured; models; fixtures."""
    sections: dict[str, list[str]] = {}
    tables: dict[tuple[str, ...], Rows] = {MODEL_HEADINGS: {}, PARITY_HEADINGS: {}}
    for part in f"\n{text}".split("\n## "):
        lines = sections[" ".join(re.findall(r"Reference: \[([^]]+)", part))] = []
        for line in part.splitlines():
            cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
            if cells in tables:
                headings = cells
            elif line.startswith("| `"):
                row = tables[headings][cells[0].strip("`")] = dict(zip(headings, cells, strict=True))
                line = str({heading: cell for heading, cell in row.items() if heading not in MEASURED})
            lines.append(line)
    return sections, tables[MODEL_HEADINGS], tables[PARITY_HEADINGS]


@pytest.fixture(scope="module")
def committed() -> Page:
    return read_page((ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8"))


def test_page_is_the_generated_one(committed: Page) -> None:
    """A paper that the page does not show at all is a warning: a new one comes before its measurements."""
    generated, *_ = read_page(page({}, {}, fixture_names(REFERENCE)))
    if missing := generated.keys() - committed[0].keys():
        message = f"MODEL_ZOO.md lacks {', '.join(missing)}: run tools/summary.py --write MODEL_ZOO.md"
        warnings.warn(message, stacklevel=1)
    shown = {reference: lines for reference, lines in generated.items() if reference not in missing}
    assert committed[0] == shown, "run tools/summary.py --write MODEL_ZOO.md"


def test_page_has_the_registry_s_counts_and_parity_of_every_fixture(committed: Page) -> None:
    _, models, fixtures = committed
    assert len(models) > 50
    for name, row in models.items():
        variant = model_info(name).variant
        assert row["#Params"].split(" ")[0] == f"{variant.parameters:,}"
        assert variant.macs is None or row["FLOPs"].split(" ")[0] == quantity(variant.macs)
    assert sorted(fixtures) == [name for name in fixture_names(REFERENCE) if model_for(name)[0] in models]
    for row in fixtures.values():
        assert row["#Params"] == "equal"
        assert float(row["Logits, float32"]) < 1e-4 and float(row["Logits, float64"]) < 1e-8


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
    with pytest.raises(UserError, match=r"no model fits the pattern 'iformr_\*'"):
        zoo.select(["iformr_*"])


def test_summary_prints_and_writes(tmp_path: Path) -> None:
    printed = command("summary", "iformer_small", "convmixer_256_8", "--json", tmp_path / "table.json")
    assert re.search(r"iformer_small +224 +19,866,344 +19\.866M += +4\.826G +4\.849G +-0\.5 % +26\.\d\dM\n", printed)
    first, second = json.loads((tmp_path / "table.json").read_text())
    assert (first["parameters"], first["macs"]) == (19_866_344, 4_825_828_736)
    assert first["macs_deviation"] == pytest.approx(4_825_828_736 / 4.849e9 - 1)
    assert second["image_size"] == [32, 32]
    printed = command("summary", "iformer_small", "--image-size", "32x64", "--num-classes", "10")
    assert "32x64" in printed and "19.866M" not in printed


def test_parity_prints_errors_and_returns_1_for_another_network(tmp_path: Path) -> None:
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
    done = call("parity", "--fixtures", tmp_path, code=1)
    assert "not equal: logits_float32" in done.stdout and "0 of 1 equal their references" in done.stdout
