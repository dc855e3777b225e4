"""The same step in PyTorch, where it is installed: `clip_grad_norm_` and SGD, for comparison.

It runs eagerly, as training scripts run it, over all leaves at a time (`foreach`), on as many
threads as JAX has. Parameters and gradient are its own; both are changed in place. It runs after
the others have finished: what it is compared with was measured a little earlier.
"""

import importlib
from typing import Any

from benchmarks.speed import machine
from benchmarks.speed.trees import Tree

NAME = "torch.clip_grad_norm_"
MAX_NORM, LEARNING_RATE = 1.0, 0.01


class Step:
    """One step on the CPU, at each call."""

    def __init__(self, torch: Any, tree: Tree, dtype: str):
        torch.set_num_threads(machine.cores())
        generator = torch.Generator().manual_seed(0)

        def normal(shape: tuple[int, ...], scale: float) -> Any:
            return (scale * torch.randn(shape, generator=generator)).to(getattr(torch, dtype))

        self.params = [torch.nn.Parameter(normal(x, 0.1)) for x in tree.shapes.values()]
        for param in self.params:
            param.grad = normal(tuple(param.shape), 0.01)
        self._clip = torch.nn.utils.clip_grad_norm_
        self._optimizer = torch.optim.SGD(self.params, lr=LEARNING_RATE, foreach=True)

    def __call__(self) -> None:
        """Clips and steps."""
        self._clip(self.params, MAX_NORM, foreach=True)
        self._optimizer.step()


def step_of(tree: Tree, dtype: str) -> Step | None:
    """The step; None where there is no PyTorch."""
    torch = _torch()
    return None if torch is None else Step(torch, tree, dtype)


def version() -> str | None:
    """That of PyTorch; None where it is missing."""
    torch = _torch()
    return None if torch is None else str(torch.__version__)


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None
