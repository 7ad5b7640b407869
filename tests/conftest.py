"""What all tests share: one thread, since small tensors lose time on more. pytest.ini puts the checkout on the path."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the first import of torch; subprocesses inherit it
