"""A run as one self-contained HTML page: metrics, curves, errors, explanations, config and environment."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from yacs.config import CfgNode

from analysis.confusion import draw_confusion
from analysis.curves import draw_curves
from analysis.error_analysis import (
    Advance,
    calibration,
    class_table,
    draw_errors,
    draw_reliability,
    predict_split,
    write_errors,
)
from analysis.grids import draw_predictions
from configs.load import dump_config, flatten, load_config, to_plain
from configs.schema import default_config
from engine.released import find_released
from engine.run import read_table
from errors import UserError
from utils.fileio import read_json, write_json, write_text

TEMPLATE = "report.html"
LARGEST_PICTURE = 4_000_000  # bytes; a page should open on a phone
MOST_EXPLANATIONS = 8
MOST_CONFUSION_CLASSES = 100


def write_report(run: Path, split: str = "test", out: Path | None = None, advance: Advance = lambda images: None, *,
                 home: Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Evaluate a run's selected weights and write the page; returns its path.

    ``run`` is the folder of a run or of a released checkpoint. Pictures and numbers (``report.json``,
    ``mistakes.csv``) go into ``HOME/report/`` (``home``: by default the run), the page to ``out``, by default
    ``HOME/report.html``. ``overrides`` are of the config. Raises UserError where ``run`` has no weights.
    """
    if not (run / "config.yaml").is_file() or not ((run / "best_model.pdparams").is_file() or find_released(run)):
        raise UserError(f"{run} is no run with weights: expected config.yaml and best_model.pdparams in it, as "
                        "tools/train.py leaves them")
    config = load_config(run / "config.yaml", overrides)
    found = predict_split(config, run, split, advance)
    measured, home = calibration(found.probabilities, found.labels), home or run
    folder, title = home / "report", f"{config.NAME}, {split}"
    errors = draw_errors(found, folder / "mistakes.png", title=title)
    pictures = {"curves": draw_curves(run, home),
                "reliability": [draw_reliability(measured, folder / "reliability.png", title)],
                "predictions": [draw_predictions(config, run, folder / "predictions.png")],
                "mistakes": [errors] if errors else [],
                "confusion": [], "spectrum": _existing([home / "spectrum.png"]),
                "explanations": _existing(sorted((home / "explain").glob("*.png")))[:MOST_EXPLANATIONS]}
    if len(found.names) <= MOST_CONFUSION_CLASSES:
        pictures["confusion"] = [draw_confusion(found.confusion, found.names, folder / "confusion.png", title)]
    summary = {"name": config.NAME, "model": config.MODEL.NAME, "dataset": found.dataset.name, "split": split,
               "images": len(found.labels), "top1": measured["accuracy"], "top5": found.top5,
               "results": _json(run / "results.json"), "calibration": measured, "classes": class_table(found)}
    write_errors(found, folder / "mistakes.csv")
    write_json(folder / "report.json", summary)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                              autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "flat": _flat}
    page = environment.get_template(TEMPLATE).render(
        summary=summary, environment=_json(run / "environment.json") or {}, changed=_changed(config),
        config=dump_config(config), epochs=read_table(run / "history.csv"), timing=read_table(run / "timing.csv"),
        pictures={name: [_embedded(path) for path in paths] for name, paths in pictures.items()})
    path = out or home / "report.html"
    write_text(path, page)
    return path


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _flat(value: Any) -> Any:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {item}" for key, item in value.items() if item is not None)
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _existing(paths: list[Path]) -> list[Path]:
    return [path for path in paths if path.is_file() and path.stat().st_size <= LARGEST_PICTURE]


def _embedded(path: Path) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"name": path.stem, "source": f"data:image/png;base64,{data}"}


def _json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _changed(config: CfgNode) -> list[tuple[str, Any, Any]]:
    """Return (key, value, default) of every key that differs from its default."""
    standard = dict(flatten(default_config()))
    return [(key, to_plain(value), to_plain(standard[key])) for key, value in flatten(config) if value != standard[key]]
