"""What a job needs, imported once by the fork server before its first job.

Only the fork server imports this module. The imports touch no GPU, and the only threads they start are those of the
OpenBLAS of NumPy and SciPy, which ends them before a fork and starts them again afterwards.
"""

import contextlib
import gc
import importlib
import os
import pkgutil
import signal

from hydra import compose, initialize_config_dir
from PIL import Image

from anomalib_lite import methods
from anomalib_lite.cli import signals
from anomalib_lite.paths import HOME
from anomalib_lite.sweeps.command import die_with

MODULES = (
    "anomalib_lite.cli.program", "anomalib_lite.cli.schema", "anomalib_lite.runs.run", "anomalib_lite.data.readers",
    "anomalib_lite.data.corruptions", "albumentations", "fsspec.implementations.chained", "rich._emoji_codes",
    "torch.utils.serialization", "wandb",
)  # fmt: skip

signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is meant for the launcher, which ends the jobs
signals.leave_to_launcher()
die_with(os.getppid())  # the launcher; the jobs in turn die with this server
os.environ["HYDRA_FULL_ERROR"] = "1"
for name in (*MODULES, *(module.name for module in pkgutil.iter_modules(methods.__path__, "anomalib_lite.methods."))):
    with contextlib.suppress(Exception):  # a job that needs the module reports the error
        importlib.import_module(name)
with contextlib.suppress(Exception), initialize_config_dir(str(HOME / "conf"), version_base="1.3"):
    compose("train")  # loads Hydra's plugins, and the parsers remember the grammar
Image.preinit()
gc.freeze()  # a job's garbage collector need not write to the memory that all jobs share
