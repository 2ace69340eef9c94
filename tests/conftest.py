"""One thread in every test process, and in CI the same examples every time.

Results must not depend on what else the machine does.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
