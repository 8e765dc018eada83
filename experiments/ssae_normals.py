"""How an autoencoder's run scores normal textures drawn anew, and the same with small artificial defects:

python experiments/ssae_normals.py RUN...    RUN is a folder of ssae's on one synthetic texture

No image of the run's test set takes part. Prints the mean of the normal images' maps (with
method.calibrate=false their mean squared error), and image AUROC per content.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from anomalib_lite.data.corruptions import CONTENTS, corrupt
from anomalib_lite.data.dataset import Batch
from anomalib_lite.data.synthetic_drawings import picture
from anomalib_lite.methods.scoring import smooth
from anomalib_lite.runs.load import load

SEED, COUNT = 77, 60  # of the pictures; the data set's own is 0
AREAS = ((0.002, 0.01), (0.01, 0.05))  # shares of the image


def main(run: Path) -> None:
    cfg = json.loads((run / "checkpoints" / "config.json").read_text())["config"]
    category = cfg["data"]["category"]
    model, _ = load(run / "checkpoints" / "last.ckpt", cfg, "cpu")

    @torch.no_grad()
    def errors(images: list[np.ndarray]) -> torch.Tensor:
        x = torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 255
        batches = [Batch(image=part, category=torch.zeros(len(part), dtype=torch.int64)) for part in x.split(8)]
        return torch.cat([model.anomaly_map(batch) for batch in batches])  # type: ignore[misc]

    def scores(maps: torch.Tensor) -> np.ndarray:
        return smooth(maps, {"box": 21}).flatten(1).amax(1).numpy()

    pictures = [picture(category, None, SEED, 256, 0, i)[0] for i in range(COUNT)]
    normal = [image if image.shape[2] == 3 else image.repeat(3, 2) for image in pictures]
    maps, rng = errors(normal), np.random.default_rng(3)
    print(f"{run}: {category}, mean of the maps of {COUNT} normal images {float(maps.mean()):.4f}")
    labels = [0] * COUNT + [1] * COUNT
    for content in CONTENTS:
        found = []
        for area in AREAS:
            how = {"contents": {content: 1}, "shapes": {"stain": 0.7, "line": 0.3}, "area": area, "max_shapes": 1}
            spoilt = scores(errors([corrupt(image, rng, **how)[0] for image in normal]))  # type: ignore[arg-type]
            found.append(f"{roc_auc_score(labels, np.r_[scores(maps), spoilt]):.3f}")
        print(f"  {content:10} image AUROC at 0.2 to 1 % of the image {found[0]}, at 1 to 5 % {found[1]}")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        main(Path(folder))
