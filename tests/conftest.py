"""What every test gets, before torch is imported."""

import os

# Tests run side by side; OpenMP threads that spin while they wait would slow each other down several times over.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
