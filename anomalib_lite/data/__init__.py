"""From files to batches."""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before its first import: it would ask the network for its newest version
