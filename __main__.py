"""``python -m finetui``: the same program as the console script ``finetui``."""

from .tui.cli import main

if __name__ == "__main__":
    main()
