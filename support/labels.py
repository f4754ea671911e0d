"""Names of runs in the legends of figures, in any script for which a font is installed."""

import contextlib
import sys
from pathlib import Path

from support import run_files


def of_runs(runs: list[Path]) -> list[str]:
    """Name each run after its folder, or by its path if names repeat."""
    sources = [run_files.folder_of(run) for run in runs]
    sources = [source.resolve() if source.name in ("", "..") else source for source in sources]
    names = [source.stem if source.is_file() else source.name for source in sources]
    if len(set(names)) < len(names):
        names = [str(source) for source in sources]
    # A line break would split the label, and an SVG cannot hold a control character.
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) for name in names]


def tell_apart(labels: list[str]) -> tuple[list[str], list[str]]:
    """Number labels that would look alike. Also returns the font families that can draw all of them.

    Characters that no installed font has are drawn as boxes, with a note on stderr.
    """
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font

    families = list(rcParams["font.family"])
    usual = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    missing = {c for c in "".join(labels) if not any(font.get_char_index(ord(c)) for font in usual)}
    # Not matplotlib's own list of fonts, which is cached and lacks those installed since.
    paths = sorted(findSystemFonts()) if missing else []
    found = {path: _outlines(path, missing) for path in paths if "lastresort" not in path.lower()}
    for path in sorted(found, key=lambda path: (-len(found[path]), "regular" not in path.lower())):
        if found[path] & missing:
            fontManager.addfont(path)
            families.append(FontProperties(fname=path).get_name())
            missing -= found[path]
    if missing:
        print(
            f"note: no installed font has {''.join(sorted(missing))}: such runs are numbered in the legend; "
            "install Noto Sans CJK for Chinese or Noto Emoji for emoji, then draw again",
            file=sys.stderr,
        )
    numbered = [
        f"{label} (run {number})" if labels.count(label) > 1 or missing & set(label) else label
        for number, label in enumerate(labels, start=1)
    ]
    return numbered, families


def _outlines(path: str, characters: set[str]) -> set[str]:
    """Return the characters that a font file can draw. Fonts of coloured emoji have no outlines."""
    from matplotlib import font_manager

    found = set()
    with contextlib.suppress(RuntimeError, OSError):  # a file that FreeType does not read
        font = font_manager.get_font(path)
        font.set_size(10, 72)
        for character in characters:
            if font.get_char_index(ord(character)):
                font.load_char(ord(character))
                if len(font.get_path()[0]):
                    found.add(character)
    return found
