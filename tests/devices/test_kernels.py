"""Kernels and waits of a training step at the published settings, counted on fake CUDA tensors."""

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from tests.helpers import run_programs as runs
from tests.helpers.fake_cuda import FakeTrainer, fake_batch, to_fake
from tests.helpers.kernels import fake_gpu, step_kernels

#: method -> (images a batch, largest number of kernels a step): half of what was counted when empty tensors were filled
#: for determinism and resizing was decomposed
CEILINGS = {
    "norm_occ": (8, 55),
    "recontrast": (16, 1275),
    "rlr": (4, 1125),
    "uniad": (8, 915),
    "ltad": (8, 1130),
    "ssae": (8, 400),
}
CATEGORIES = ["bottle", "tile"]


def published(method: str) -> tuple[Any, int]:
    """The method of its configuration file with weights that hold no numbers, and the images' side."""
    with runs.restored(), initialize_config_dir(str(runs.ROOT / "conf"), version_base="1.3"):
        given = [f"method={method}", "backbone.weights=none", "data.root=none", "data.category=bottle"]
        cfg: Any = OmegaConf.to_container(compose("train", given), resolve=True)
        side = cfg["data"]["image_size"]
        with torch.device("meta"):
            uses = get_class(cfg["method"]["_target_"]).uses_backbone  # type: ignore[attr-defined]
            backbone = instantiate(cfg["backbone"], precision="auto") if uses else None
            context = {"image_size": (side, side), "categories": CATEGORIES, "precision": "auto", "steps": 100}
            return instantiate(
                cfg["method"], backbone=backbone, scoring=cfg["scoring"], **context, _convert_="all"
            ), side


def features(model: Any, count: int, side: int) -> list[torch.Tensor]:
    """A batch's stored features: what the method keeps, as they come with it."""
    levels = zip(model.backbone.channels, model.backbone.reductions, strict=True)
    maps = [torch.randn(count, c, -(-side // r), -(-side // r), device="cuda") for c, r in levels]
    return [level.movedim(1, -1).bfloat16() for level in model.kept(maps)]


@pytest.mark.parametrize("method", CEILINGS)
def test_kernels_of_a_training_step(method, capsys):
    count, limit = CEILINGS[method]
    model, side = published(method)
    with fake_gpu():
        to_fake(model)
        trainer = FakeTrainer(CATEGORIES, side)
        model._trainer, trainer.global_step = trainer, 150  # LTAD's second phase, ReContrast's mining

        def batch(count: int) -> dict[str, Any]:
            given = fake_batch(count, side)
            return given | {"features": features(model, count, side)} if model.frozen_features else given

        trainer.datamodule.training_batch = lambda indices, epoch: batch(len(indices))
        model.train().on_train_start()
        if method == "ltad":
            model.share, model.lacking = 0.5, torch.ones(len(CATEGORIES))
        parts = step_kernels(model, batch(count))
    numbers = {name: sum(part.launched.values()) for name, part in parts.items()}
    waits = [wait for part in parts.values() for wait in part.waits]
    with capsys.disabled():
        print(f"\n{method}: {sum(numbers.values())} kernels a step, {numbers}, waits {waits}")
    assert waits == []
    assert sum(numbers.values()) <= limit, {name: part.launched.most_common(14) for name, part in parts.items()}
