"""Batch norm that is synchronised over all devices, and batch norm that does not amplify constant channels."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn

from anomalib_lite.data.sampler import rank_and_world


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' tensors, with gradient."""
    return x if rank_and_world()[1] == 1 else _SumOverRanks.apply(x)


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of all ranks' tensors, with gradient."""
    return sum_over_ranks(x) / rank_and_world()[1]


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(x [B, C, …] minus its mean, mean [C], biased variance [C], number of values per channel) over the batches of all
    ranks, which have the same size. Computed in at least float32, with gradient."""
    axes, shape = [i for i in range(x.dim()) if i != 1], [1, -1] + [1] * (x.dim() - 2)
    values, ranks = x.to(torch.promote_types(x.dtype, torch.float32)), rank_and_world()[1]
    mean = mean_over_ranks(values.mean(axes))
    centred = values - mean.view(shape)
    var = mean_over_ranks(centred.square().mean(axes))
    return centred, mean, var, ranks * x.numel() // x.shape[1]


class Norm(nn.BatchNorm2d):
    """nn.BatchNorm2d that does not count its batches: on a GPU the count takes a kernel in every step, and nothing
    reads it. The state dict has the count as always."""

    counts = False

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, self.momentum or 0.0, self.eps)


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm for CPU ranks; the original needs GPUs. All ranks have the same batch size B of [B, C, …]."""

    counts = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        centred, mean, var, count = batch_statistics(x)
        shape = [1, -1] + [1] * (x.dim() - 2)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                if self.counts:
                    self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, share)
                self.running_var.lerp_(var * count / max(count - 1, 1), share)
        y = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """CPUSyncBatchNorm for timm's batch norm with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[operator]


class StableNorm(nn.Module):
    """Batch norm with a lower limit (floor) of the variance, min(min_var, pretrained variance), while training: where
    the batch's variance is below the floor, the floor replaces it. So channels that are constant in normal images are
    not amplified. In evaluation mode it equals the batch norm `norm` that it replaces."""

    running_mean: Tensor
    running_var: Tensor
    floor: Tensor

    def __init__(self, norm: nn.BatchNorm2d, min_var: float, eps: float):
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())
        self.register_buffer("floor", norm.running_var.clamp(max=min_var))
        self.eps, self.momentum = eps, norm.momentum or 0.1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        centred, mean, var, count = batch_statistics(x)
        unbiased = var.detach() * count / max(count - 1, 1)
        alive = unbiased > self.floor
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(torch.where(alive, unbiased, self.floor), self.momentum)
        scale = self.weight * (torch.where(alive, var, self.floor) + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def stabilise(module: nn.Module, min_var: float, eps: float) -> None:
    """Replace every batch norm by a StableNorm; timm's batch norms may contain an activation."""
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            setattr(module, name, nn.Sequential(StableNorm(child, min_var, eps), child.drop, child.act))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, StableNorm(child, min_var, eps))
        else:
            stabilise(child, min_var, eps)


def synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Synchronise every batch norm of `model` over all devices; the names in its state dict stay the same."""
    if device.type != "cpu":
        return convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is BatchNormAct2d:
            module.__class__ = CPUSyncBatchNormAct  # type: ignore[assignment]
        elif type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, Norm):
            module.counts = getattr(module, "counts", True)  # type: ignore[assignment]
            module.__class__ = CPUSyncBatchNorm
    return model
