"""method.compile=true: the networks run through torch.compile while training, with the same losses and gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from anomalib_lite.errors import UserError
from anomalib_lite.methods import graphs
from anomalib_lite.methods.base import AnomalyModule
from anomalib_lite.methods.ssae import SSAE
from tests.helpers.feature_levels import batch
from tests.methods import test_rlr, test_uniad


def ssae(**options: Any) -> SSAE:
    torch.manual_seed(0)
    return SSAE(width=4, image_size=(32, 32), precision=32, **options)


MODELS = {
    "uniad": lambda **more: test_uniad.model(dropout=0.0, layers=1, **more),
    "rlr": lambda **more: test_rlr.model(layers=1, **more),
    "ssae": ssae,
}


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    given = batch()
    torch.manual_seed(1)
    loss = model.training_step(given | {"clean": given["image"] + 0.1}, 0)
    return loss, list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("name", MODELS)
def test_compiled_networks_train_as_others(name, monkeypatch):
    """The graphs are PyTorch's without a compiler (aot_eager)."""
    parts, compile_part = [], nn.Module.compile
    plain, compiled = MODELS[name](), MODELS[name](compile=True)

    def compile_plainly(part):
        parts.append(part)
        compile_part(part, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_plainly)
    AnomalyModule.on_fit_start(compiled)
    assert parts == compiled.networks()
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


class Doubled(nn.Module):
    """Its batch norm has buffers, and its outputs are a list."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, levels):
        return [2 * self.norm(x) for x in levels]


def test_a_recorded_network_replays_two_kinds_of_calls(monkeypatch):
    """Recording itself needs a GPU (`make gpu-check`); here it calls the network three times, as the warm-up does."""
    replayed = []

    def record(network, samples):
        plain = network.forward
        for _ in range(3):
            plain(*samples)
        torch.rand(5)

        def replay(*inputs):
            replayed.append(inputs)
            return plain(*inputs)

        network.forward = replay

    monkeypatch.setattr("torch.cuda.make_graphed_callables", record)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: torch.get_rng_state())
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: torch.set_rng_state(state))
    network, plain = Doubled(), Doubled()
    now = [0]
    recorded = graphs.Recorded(network, lambda: now[0])
    x = torch.randn(4, 3)
    for now[0], shape in ((0, 3), (1, 4), (1, 4), (2, 4), (3, 2), (4, 3), (5, 4)):  # the first batch is a short one
        torch.manual_seed(now[0])
        found = network([x[:shape]])
        drawn = torch.rand(2)
        torch.manual_seed(now[0])
        torch.testing.assert_close(found, plain([x[:shape]]), rtol=0, atol=0)
        torch.testing.assert_close(drawn, torch.rand(2), rtol=0, atol=0)
    assert len(replayed) == 5  # not: the second call of step 1, the third size
    now[0] = 6
    network(levels=[x])
    with torch.no_grad():
        network([x])
    assert len(replayed) == 5
    mean: Any = plain.norm.running_mean
    torch.testing.assert_close(network.norm.running_mean, mean * 0.81 + 0.19 * x.mean(0))
    recorded.release()
    assert "forward" not in network.__dict__


def test_several_gpus_are_refused():
    two = {"accelerator": "gpu", "devices": 2, "num_nodes": 1}
    for compiles, change in ((True, {"devices": 1}), (True, {"accelerator": "cpu"}), (False, {})):
        graphs.check_devices({"compile": compiles}, two | change)
    with pytest.raises(UserError, match=r"^method.compile=true: CUDA graphs need hardware.devices=1"):
        graphs.check_devices({"compile": True}, two)
