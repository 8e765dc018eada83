import os

# Before torch is imported: waiting threads of OpenMP otherwise spin, and beside other work on the same cores a small
# convolution takes a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
