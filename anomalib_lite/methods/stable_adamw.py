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
        given: Any = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if given and any(group["skip"] for group in self.param_groups):
            is_finite = torch.stack(torch._foreach_norm(given, torch.inf)).isfinite().all()
        else:
            is_finite = None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group, is_finite)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any], is_finite: Tensor | None) -> None:
        """One step of a group's tensors. On a GPU, an operation of torch._foreach is one kernel for all of them."""
        names = ("m", "v", "largest") if group["amsgrad"] else ("m", "v")
        for p in parameters:
            if not self.state[p]:
                self.state[p] |= {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}
                self.state[p]["t"] = torch.zeros((), dtype=torch.float32, device=p.device)
        m, v, steps = ([self.state[p][name] for p in parameters] for name in ("m", "v", "t"))
        g: Any = [p.grad for p in parameters]
        squares: Any = torch._foreach_mul(g, g)
        applied: Any = 1.0  # 0 in a step that is skipped, which moves no moment
        if is_finite is None:
            torch._foreach_add_(steps, 1)
        else:
            applied = is_finite.to(parameters[0].dtype)
            torch._foreach_add_(steps, [is_finite.to(steps[0].dtype)] * len(steps))
            g, squares = ([torch.where(is_finite, *x) for x in zip(*y, strict=True)] for y in ((g, m), (squares, v)))
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_lerp_(v, squares, 1 - beta2)
        del squares  # copies of all weights are held for as short as possible
        if group["amsgrad"]:
            largest = [self.state[p]["largest"] for p in parameters]
            torch._foreach_maximum_(largest, v)
            v = largest
        t = torch.stack(steps).double().clamp(min=1)  # float32 would round 1 − β₂ᵗ
        den = torch._foreach_sqrt(v)
        for x, correction in zip(den, (1 - beta2**t).sqrt().unbind(), strict=True):
            x.div_(correction)
        torch._foreach_add_(den, group["eps"])
        updates = torch._foreach_div(g, den)
        sizes = torch._foreach_norm(updates)
        r = torch.stack(torch._foreach_div(sizes, [p.numel() ** 0.5 for p in parameters])).clamp(min=1)
        scales = (applied / ((1 - beta1**t) * r)).unbind()
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"] * applied)
        for update, moment, scale in zip(updates, m, scales, strict=True):
            torch.mul(moment, scale, out=update)
        torch._foreach_addcdiv_(parameters, updates, den, -group["lr"])
