"""Forward and backward of a training step as one CUDA graph each, and the same on a CPU without a graph.

A graph repeats kernels at addresses that are fixed, so all that changes is handed in: images, what drop path leaves (as
masks, drawn on the host outside of the graph) and the weights. Gradients go to the parameters by autograd, as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipeline.models.hornet import HorNet
from pipeline.ops import kernels
from pipeline.ops.layers import compute_dtype

Step = Callable[..., Tensor]


def capture(model: HorNet, batch: int, side: int, autocast: torch.dtype | None) -> None:
    """Have `model`, in place, train by CUDA graphs on images (batch, in_chans, side, side) in the dtype of its weights.

    On a CPU the same is done eagerly. `autocast`: its dtype, or None. Names and shapes of the state stay, no gradient
    is left behind and no hook of a parameter called. A pass that is not captured is that of the net as it was: in
    evaluation, without gradients, on images of another size, under another autocast, and once the head is another, or
    what is frozen. So is every pass of a deep copy, and of what is unpickled.

    When: with weights where they stay (of those that have moved, each step makes a copy), and on a GPU before other
    threads use it, which would spoil the capture. A forward pass has to have its backward pass before the next one.

    Raises:
        ValueError: dropout before the head, which would be drawn within the graph; compiled blocks.
    """
    if model.drop_rate:
        raise ValueError(f"CUDA graphs with drop_rate={model.drop_rate:g}: set it to 0, a graph draws nothing")
    if any(stage.compiled for stage in model.stages):
        raise ValueError("CUDA graphs of compiled blocks: leave out one of compile_blocks() and capture()")
    like = next(model.parameters())
    names = [f"net.{name}" for name, _ in model.named_parameters()]
    plain = _Plain(model)

    def step(images: Tensor, masks: Tensor, *weights: Tensor) -> Tensor:
        # No cache of casts: it would hand a tensor from the capture on to the next pass.
        with torch.autocast(like.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            return torch.func.functional_call(plain, dict(zip(names, weights, strict=True)), (images, masks))

    images = like.new_zeros(batch, model.in_chans, side, side)
    draws = sum(rate > 0 for rate in model.drop_path_rates())
    masks = torch.ones(draws, batch, 1, 1, 1, device=like.device)
    # The parameters' storages under other names: hooks of theirs (DeepSpeed's) do not see what goes on in the capture.
    weights = [weight.detach().requires_grad_(weight.requires_grad) for weight in model.parameters()]
    if like.is_cuda:
        kernels.why_not(like.device.index)  # they cannot be tried while a graph is captured
    trained = model.training
    model.train()
    replay = (_graphed if like.is_cuda else _static)(step, (images, masks, *weights))
    model.train(trained)
    model.forward = _Forward(model, replay, _fixed(model, images, autocast))  # type: ignore[method-assign]


class _Forward:
    """`HorNet.forward` where training passes go through the graph."""

    def __init__(self, model: HorNet, replay: Step, fixed: tuple[Any, ...]) -> None:
        self._model, self._replay, self._fixed = weakref.ref(model), replay, fixed

    def __call__(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        model = self._model()
        assert model is not None
        trains = model.training and torch.is_grad_enabled() and masks is None and not x.requires_grad
        if not trains or _fixed(model, x, compute_dtype(x)) != self._fixed:
            return type(model).forward(model, x, masks)
        masks = model.draw_masks(len(x))
        if x.is_cuda:
            masks = masks.pin_memory().to(x.device, non_blocking=True)
        return self._replay(x, masks, *_HandedIn.apply(*model.parameters()))

    def __reduce__(self) -> Any:
        """Of a copy of the model, its own plain `forward`: the graph has the weights of this one."""
        return getattr, (self._model(), "forward")


def _fixed(model: HorNet, images: Tensor, autocast: torch.dtype | None) -> tuple[Any, ...]:
    """What a graph has once and for all."""
    sizes = tuple((weight.shape, weight.dtype, weight.device, weight.requires_grad) for weight in model.parameters())
    dropped = tuple(rate > 0 for rate in model.drop_path_rates())
    return images.shape, images.dtype, images.device, autocast, model.drop_rate, dropped, sizes


class _Plain(nn.Module):
    """The net as it is without graphs, and without the hooks on its call: who calls it with graphs has them called."""

    def __init__(self, net: HorNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        return type(self.net).forward(self.net, images, masks)


class _HandedIn(torch.autograd.Function):
    """Weights on their way into the graph, and copies of their gradients on the way out.

    The graph's own are written over by its next pass, and autograd and DeepSpeed would keep them as they come: of two
    micro-batches that are accumulated, the second would count twice and the first not at all.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(weight.detach() for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return tuple(None if gradient is None else gradient.clone() for gradient in gradients)


def _graphed(step: Step, sample: tuple[Tensor, ...]) -> Step:
    with torch.cuda.device(sample[0].device):
        return cast(Step, torch.cuda.make_graphed_callables(step, sample, allow_unused_input=True))


def _static(step: Step, sample: Sequence[Tensor]) -> Step:
    """What `torch.cuda.make_graphed_callables` returns, without a graph: inputs are copied to where those of `sample`
    are, and gradients are always at one place, which the next pass writes over.
    """
    gradients = [torch.empty_like(tensor) if tensor.requires_grad else None for tensor in sample]
    wanted = [tensor for tensor in sample if tensor.requires_grad]

    class Static(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            for place, given in zip(sample, inputs, strict=True):
                if place.data_ptr() != given.data_ptr():
                    place.detach().copy_(given)
            with torch.enable_grad():
                ctx.output = step(*sample)
            return ctx.output.detach()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Any:
            # Kept: who calls for the backward pass once more has a graph replayed once more.
            found = iter(torch.autograd.grad(ctx.output, wanted, gradient, retain_graph=True, allow_unused=True))
            return tuple(_put(place, None if place is None else next(found)) for place in gradients)

    return Static.apply


def _put(place: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if place is None or gradient is None else place.copy_(gradient).detach()
