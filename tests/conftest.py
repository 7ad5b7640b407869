"""What all tests share: the checkout on the import path, and one thread, since small tensors lose time on more."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch; subprocesses inherit it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
