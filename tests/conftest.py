import atexit
import os
import shutil
import tempfile

# Before torch is imported: waiting threads of OpenMP otherwise spin, and beside other work on the same cores a small
# convolution takes a hundred times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What runs share (synthetic images, features of frozen backbones) lies in a folder of this session.
if "ANOMALIB_LITE_CACHE" not in os.environ:
    os.environ["ANOMALIB_LITE_CACHE"] = tempfile.mkdtemp(prefix="anomalib_lite_cache_")
    atexit.register(shutil.rmtree, os.environ["ANOMALIB_LITE_CACHE"], ignore_errors=True)
