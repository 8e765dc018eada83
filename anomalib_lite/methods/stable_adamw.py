"""StableAdamW: AdamW whose update is limited per tensor (Wortsman et al., NeurIPS 2023, arXiv 2304.13013)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StableAdamW(torch.optim.Optimizer):
    """AdamW with update clipping, as Dinomaly and INP-Former are trained with it. For every tensor p with gradient g:

        p ← p · (1 − lr · weight_decay)
        m ← β₁m + (1 − β₁)g,  v ← β₂v + (1 − β₂)g²,  v̂ ← max(v̂, v) with amsgrad, else v
        den = √v̂ / √(1 − β₂ᵗ) + eps
        r = max(1, RMS(g / den)), RMS over the tensor's elements
        p ← p − lr / (1 − β₁ᵗ) / r · m / den

    Args:
        skip: whether a step in which any gradient is NaN or infinite changes nothing, not even moments and t.

    No step waits for the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        skip: bool = False,
    ):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError("lr, eps and weight_decay are numbers from 0, and betas two numbers from 0, below 1")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, options | {"skip": skip})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if given and any(group["skip"] for group in self.param_groups):
            is_finite = torch.stack([torch.isfinite(g).all() for g in given]).all()
        else:
            is_finite = None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, is_finite)
        return loss

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any], is_finite: Tensor | None) -> None:
        state = self.state[p]
        if not state:
            names = ("m", "v", "largest") if group["amsgrad"] else ("m", "v")
            state |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
            state["t"] = torch.zeros((), dtype=torch.float32, device=p.device)
        applied: Any = 1.0  # 0 in a step that is skipped
        if is_finite is not None:
            applied, g = is_finite.to(p.device, p.dtype), torch.where(is_finite.to(p.device), g, 0)
        beta1, beta2 = group["betas"]
        state["t"] += applied
        t = state["t"].double().clamp(min=1)  # float32 would round 1 − β₂ᵗ
        state["m"].lerp_(g, (1 - beta1) * applied)
        state["v"].lerp_(g * g, (1 - beta2) * applied)
        v = state["v"]
        if group["amsgrad"]:
            v = torch.maximum(state["largest"], v, out=state["largest"])
        den = v.sqrt().div_((1 - beta2**t).sqrt()).add_(group["eps"])
        r = (g / den).square_().mean().sqrt_().clamp_(min=1)
        p.mul_(1 - group["lr"] * group["weight_decay"] * applied)
        p.addcdiv_(state["m"] * (applied / ((1 - beta1**t) * r)), den, value=-group["lr"])
