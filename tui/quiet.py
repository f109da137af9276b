"""Keeps off the terminal what libraries have to say about each other."""

from __future__ import annotations

import logging
import warnings


def hush_libraries() -> None:
    """For verbs that load a model in this very process: what follows is nothing that a user could do anything about.

    On the CPU bitsandbytes 0.50 warns that it lacks a kernel that it does without, and PEFT 0.21 asks transformers 5 in
    a way that the latter will not answer in version 6.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
