"""finetui: plan a fine-tune before you download or rent anything, then run that very plan."""

from .planner.version import VERSION as __version__

__all__ = ["__version__"]
