"""What a child process needs in its environment to import this package, and to be a rank."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from ..planner.cgroup import usable_cpus

_PACKAGE = (__package__ or "finetui.engine").partition(".")[0]


def import_environment() -> dict[str, str]:
    """What a child process needs in its environment to import this very package: PYTHONPATH, or nothing.

    Children run with ``-P`` and in another folder, so a package found through the current folder, or through a
    PYTHONPATH that was relative, would be out of their reach.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(os.path.abspath(next(iter(spec.submodule_search_locations))))  # keeps a symlink's own name
    entry = str(folder.parent)
    if folder.name != _PACKAGE or entry in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        return {}  # installed, or editable: an import hook finds it
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join([entry, *(path for path in paths if path != entry)])}


def rank_environment(present: Mapping[str, str], *, world: int, cuda: bool) -> dict[str, str]:
    """How PyTorch is to behave in a rank, which reads it as it is imported; what the user has set by hand stays.

    Args:
        present: the environment as it is.
        world: ranks on this machine.
        cuda: the ranks have GPUs.
    """
    wanted = {
        "OMP_NUM_THREADS": str(max(1, usable_cpus() // world)),
        # Idle OpenMP threads sleep instead of spinning: on two cores shared with other work, spinning made a step of
        # the tiny model eight times slower (2.0 s against 0.25 s).
        "OMP_WAIT_POLICY": "PASSIVE",
        # The ranks of one machine listen where nobody else can reach them.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # After one rank has failed, its peers hang in a collective: elastic waits so long before it kills them.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
    }
    if cuda and "PYTORCH_CUDA_ALLOC_CONF" not in present:  # its old name, which torch still reads
        wanted["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {key: value for key, value in wanted.items() if key not in present}
