"""method.compile=true: the networks run through torch.compile while training, with the same losses and gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.ssae import SSAE
from tests.helpers.feature_levels import batch
from tests.methods import test_rlr, test_uniad


def ssae(**options: Any) -> SSAE:
    torch.manual_seed(0)
    return SSAE(width=4, image_size=(32, 32), precision=32, **options)


MODELS = {"uniad": lambda **more: test_uniad.model(dropout=0.0, **more), "rlr": test_rlr.model, "ssae": ssae}


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    given = batch()
    torch.manual_seed(1)
    loss = model.training_step(given | {"clean": given["image"] + 0.1}, 0)
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_networks_train_as_others(name, monkeypatch):
    """The graphs are PyTorch's without a compiler (aot_eager); on a GPU they become CUDA graphs."""
    given, compile_part = [], nn.Module.compile
    plain, compiled = MODELS[name](), MODELS[name](compile=True)

    def compile_plainly(part, mode):
        given.append(mode)
        compile_part(part, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_plainly)
    AnomalyModule.on_fit_start(compiled)
    assert given == [None] * len(compiled.networks())
    expected, found = loss_and_gradients(plain), loss_and_gradients(compiled)
    torch.testing.assert_close(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    compiled.on_fit_end()
    assert all(part._compiled_call_impl is None for part in compiled.networks())


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"^method.compile=true: torch.compile needs the compiler g\+\+; install it"):
        test_rlr.model(compile=True).on_fit_start()
