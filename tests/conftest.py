"""What every test gets, before torch and triton are imported."""

import glob
import os

from hypothesis import settings

# Tests run side by side; OpenMP threads that spin while they wait would slow each other down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Triton reads this once, when it is imported, which the first test module that needs it does for all.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A test that fails fails everywhere: the same examples on each machine. HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))
