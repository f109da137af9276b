"""The embedded default model: its shape and tokenizer are shipped, its weights are made here from a fixed seed.

A checkpoint folder in Hugging Face format is written beside its final place and renamed when whole, so that several
processes may ask for it at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

from ...planner.errors import MissingExtraError

#: The weights are the same bits for the same seed, config and torch release.
SEED = 20_240_229


def tiny_folder() -> Path:
    """The shipped folder: config.json and tokenizer, no weights."""
    with as_file(files("finetui.presets") / "tiny") as folder:
        return Path(folder)


def is_tiny(model: str | Path) -> bool:
    """Whether a recipe's model is the shipped folder without weights, or a copy of it, as jobs take it elsewhere."""
    path, shipped = Path(model).expanduser(), tiny_folder()
    if not path.is_dir() or path.resolve() == shipped.resolve():
        return path.is_dir()
    names = sorted(file.name for file in shipped.iterdir() if file.is_file())
    return sorted(file.name for file in path.iterdir()) == names and all(
        (path / name).read_bytes() == (shipped / name).read_bytes() for name in names
    )


def ensure_tiny_model(cache_dir: str | Path) -> Path:
    """The tiny model as a complete checkpoint folder below ``cache_dir``, made on first use.

    Raises:
        MissingExtraError: torch or transformers are not installed.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        raise MissingExtraError("the tiny model", "train") from None
    source = tiny_folder()
    content = hashlib.sha256(f"{SEED} {torch.__version__}".encode())
    shipped = sorted(path for path in source.iterdir() if path.is_file())
    for path in shipped:
        content.update(path.name.encode() + path.read_bytes())
    folder = Path(cache_dir) / f"tiny-{content.hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".tiny-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(work)
        for path in shipped:
            shutil.copyfile(path, work / path.name)
        work.chmod(0o755)
        try:
            os.rename(work, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder
