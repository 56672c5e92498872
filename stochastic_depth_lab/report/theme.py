"""The style of the figures: one palette, which a page's style sheet replaces in dark mode."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import matplotlib as mpl

INK, MUTED, GRID = "#1c1c1c", "#666666", "#dddddd"
# Okabe and Ito's color-blind-safe hues, darkened to a contrast of at least 3:1 against white.
SERIES = ("#d55e00", "#0072b2", "#00795b", "#a8457e", "#8a6a00", "#4d4d4d")
# Names of the colors in a style sheet, so that one figure works on a light and a dark page.
CSS_NAMES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", **{hue: f"--series-{i}" for i, hue in enumerate(SERIES)}}
DARK = {
    "--ink": "#e8e8e8",
    "--muted": "#a0a0a0",
    "--grid": "#3a3a3a",
    "--series-0": "#ff9b54",
    "--series-1": "#5cb8f0",
    "--series-2": "#35c79c",
    "--series-3": "#e694c1",
    "--series-4": "#e3c34a",
    "--series-5": "#b8b8b8",
}


@contextmanager
def figure_style() -> Generator[None, None, None]:
    """A context with matplotlib's defaults and our changes, regardless of the user's matplotlibrc."""
    with mpl.rc_context(), warnings.catch_warnings():
        # Characters of a run's name that the font lacks become boxes in a PNG; an SVG leaves the font to the reader.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": 9,
                "axes.titlesize": 9,
                "axes.titlelocation": "left",
                "axes.labelsize": 9,
                "axes.labelcolor": INK,
                "axes.titlecolor": INK,
                "axes.edgecolor": MUTED,
                "axes.linewidth": 0.8,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": GRID,
                "grid.linewidth": 0.6,
                "text.color": INK,
                # A run's name may hold dollar signs.
                "text.parse_math": False,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "legend.frameon": False,
                "lines.linewidth": 1.6,
                "lines.solid_capstyle": "round",
                "savefig.dpi": 160,
                # Text stays text: readers can search and copy it.
                "svg.fonttype": "none",
                # Without it the identifiers in SVG files are random.
                "svg.hashsalt": "stochastic-depth",
            }
        )
        yield
