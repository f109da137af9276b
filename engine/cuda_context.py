"""A GPU's context, made by the driver while Python imports: it takes some tenths of a second and no Python at all.

PyTorch would make it at its first use of the GPU, and hold the interpreter all the while. It takes the primary context
of a device (CUDA Driver API, "Primary Context Management"), of which a process has one, so it finds this one there.
"""

from __future__ import annotations

import ctypes
import os
import threading

#: The variable that says when the driver loads kernels: all at once, or each at its first use.
LOADING = "CUDA_MODULE_LOADING"


def begin(index: int) -> None:
    """Begin to make the context of a device, as ``CUDA_VISIBLE_DEVICES`` counts them now.

    What fails here fails again, with a reason, when PyTorch uses the device.
    """
    os.environ.setdefault(LOADING, "LAZY")  # as PyTorch does before it asks the driver for anything
    threading.Thread(target=_make, args=(index,), name="context", daemon=True).start()


def _make(index: int) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")  # whose functions are called without the interpreter's lock
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), ctypes.c_int(index)) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
