"""One thread in every test process: results must not depend on what else the machine does."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start

import torch

torch.set_num_threads(1)
