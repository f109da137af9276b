"""Legend: what the signs and short words of each screen mean, for the help screen."""

from __future__ import annotations

from .format import CHECK_GLYPHS, STATE_GLYPHS

_GLYPH = {state: glyphs[0] for state, glyphs in STATE_GLYPHS.items()}
_FITS = ("✔ ! ✘", "It fits; it fits with little to spare; it does not fit")
_MFU = ("MFU", "Model FLOPs utilisation: the share of the GPU's peak that the model's own arithmetic reaches")

#: Sign or word, and what it says, by the scope of the screen that shows it.
LEGEND: dict[str, tuple[tuple[str, str], ...]] = {
    "plan": (
        _FITS,
        ("├───┤", "The memory that the run may need, from the least to the most; the bar is the likeliest"),
        ("SIM", "This is reckoned for another machine than the one you are on"),
        ("auto", "The planner has chosen what stands beside it; why is said below"),
        ("✔ 13.7 –", "In the list of models (b): the GiB that a tuning takes there; it does not fit"),
        ("by formula", "Counted and computed; calibrated: corrected by runs that finished here; measured: with the"
         " speeds that finetui bench found"),
        ("data assumed", "None was read; estimated: from the size of the files; counted: with the tokenizer"),
        _MFU,
    ),
    "gpus": (
        _FITS,
        ("◆", "No other offer is both cheaper and faster for this plan"),
        ("n", "How many GPUs the machine has"),
        ("fit", "Share of each GPU's memory that the run needs"),
        ("! after an age", "The price is old: look at it again before you rent"),
        ("! ? after $ run", "Over the limit on money or time that the plan or a free machine sets; perhaps over it"),
        ("spot", "Cheaper, but the machine may be taken away at any moment; runs save themselves and can be resumed"),
    ),
    "data": (
        ("underlined", "Tokens that are trained on; the others are only read. m puts [[ ]] around them as well"),
        ("trained", "Share of all tokens that are trained on"),
        ("95% up to", "So many of the rows are no longer than this"),
    ),
    "launch": (
        (f"{CHECK_GLYPHS['ok']} {CHECK_GLYPHS['warn']} {CHECK_GLYPHS['fail']}",
         "In order; worth a look; a run would fail of it"),
        ("bad steps", "So many losses in a row that are not finite end the run"),
    ),
    "monitor": (
        ("mean", "The loss smoothed; the faint curve behind it is the loss of each step"),
        ("held-out", "The loss on rows that are not trained on, as thick points; lowest: it has risen since"),
        ("◆ ! ▸ ✘", "Below the loss: a checkpoint; a warning, or a slower way taken; a further attempt; a failure"),
        ("at step", "What all charts were at the step with the line: ← → or a click; past the newest step it ends"),
        ("× ▲", "A figure that was not finite; one so high that the axis leaves it out"),
        _MFU,
        ("ETA", "Time to the end, at the pace of this attempt"),
        ("! 84 °C", "A figure with a mark is one to look at; words beside it say what holds the clocks back"),
        ("P N E", "With g, where there is little room: GB/s over PCIe and NVLink, in/out, and memory errors"),
        ("GPU load", "Share of time in which the GPU computed at all; power tells better how hard"),
        ("no step for", "Far longer without a step than steps take here: a slow disk, or a process that hangs"),
    ),
    "runs": (
        (f"{_GLYPH['running']} {_GLYPH['preparing']} {_GLYPH['stopping']}", "At work; preparing; about to stop"),
        (f"{_GLYPH['finished']} {_GLYPH['stopped']} {_GLYPH['failed']}", "Finished; stopped, can be resumed; failed"),
        (_GLYPH["lost"], "Lost: its process has gone without a word, so it was killed or the machine went down"),
    ),
    "compare": (
        ("A B …", "Each run's letter stands at the end of its curve, and at the head of its column"),
        ("(+13%)", "Beside what the run's own plan had said"),
        ("reserved", "The most memory that PyTorch has held on a GPU, in use or not"),
    ),
}  # fmt: skip
