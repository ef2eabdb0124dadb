"""How every picture of the suite is written."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

from utils.fileio import write_atomically

log = logging.getLogger("suite")
DEFAULT = font_manager.findfont("DejaVu Sans")


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> Path:
    """Write a figure as PNG, atomically; returns ``path``.

    Texts are drawn as they are (a ``$`` in a name is no formula), with a font of the machine for characters that
    matplotlib's own lacks, such as Chinese ones.
    """
    texts = figure.findobj(Text)
    missing = "".join(sorted({char for text in texts for char in text.get_text() if not _has(DEFAULT, char)}))
    family = [font_manager.FontProperties(fname=DEFAULT).get_name(), *filter(None, [_family_with(missing)])]
    for text in texts:
        text.set_parse_math(False)
        text.set_fontfamily(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # reported once by _family_with
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    return path


def _has(font: str, char: str) -> bool:
    return not char.isprintable() or font_manager.get_font(font).get_char_index(ord(char)) != 0


@cache
def _family_with(characters: str) -> str | None:
    """Return the family of the installed font that has most of ``characters``; log a line where some are missing."""
    best, family = 0, None
    for font in sorted(font_manager.findSystemFonts()) if characters else []:
        try:
            count = sum(_has(font, char) for char in characters)
            if count > best:
                font_manager.fontManager.addfont(font)
                best, family = count, font_manager.FontProperties(fname=font).get_name()
        except (OSError, RuntimeError):  # not a font that FreeType reads
            continue
        if best == len(characters):
            break
    if best < len(characters):
        log.warning("no font on this machine has all of %s: install one for your script, such as the package "
                    "fonts-noto-cjk", characters[:20])
    return family
