"""A text that every Python ships, and a small decoder-only transformer that reads it byte by byte.

The text is that of `help()`: the topics of the language reference in `pydoc_data.topics`. How long
it is differs with the version of Python: about half a megabyte.

Parameters carry the names of the mesh axes that they are split over, as Flax's metadata; `jit` does
the rest. A transformer's kernels come in pairs, the first split by columns over "tensor" and the
second by rows, so that each pair needs one sum over "tensor" (Megatron-LM); the other dimension of
each is split over "fsdp".
"""

import functools
import pydoc_data.topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

BYTES = 256  # how many different ones there are
BLOCK = 4096  # bytes; every tenth block is held out

COLUMNS = ("fsdp", "tensor")  # how kernels are split: (input, output)
ROWS = ("tensor", "fsdp")

# The text ----------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The bytes to learn from, and those to be judged by; uint8."""

    train: np.ndarray
    held_out: np.ndarray


class Batch(NamedTuple):
    """Bytes, and the byte that follows each; int32, (windows, context)."""

    inputs: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


def load_text() -> Text:
    """The topics of `help()` in the order of their names."""
    topics = pydoc_data.topics.topics
    whole = np.frombuffer("\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8)
    blocks = whole[: len(whole) // BLOCK * BLOCK].reshape(-1, BLOCK)
    held_out = np.arange(len(blocks)) % 10 == 9
    return Text(blocks[~held_out].reshape(-1), blocks[held_out].reshape(-1))


def windows(text: np.ndarray, starts: np.ndarray, context: int) -> Batch:
    """The windows of a text that begin at `starts`."""
    bytes_ = text[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    return Batch(bytes_[:, :-1], bytes_[:, 1:])


def training_batch(text: Text, size: int, context: int, seed: int, step: int) -> Batch:
    """Windows from anywhere; which ones depends on seed and step alone, so a run can be resumed."""
    starts = np.random.default_rng((seed, step)).integers(len(text.train) - context, size=size)
    return windows(text.train, starts, context)


def held_out_batches(text: Text, size: int, context: int) -> list[Batch]:
    """The held-out text in windows that do not overlap; what fills no batch is left out."""
    starts = np.arange(0, len(text.held_out) - context, context)
    return [
        windows(text.held_out, starts[first : first + size], context)
        for first in range(0, len(starts) - size + 1, size)
    ]


# The network -------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int, split: tuple[str, str], **settings: Any) -> nnx.Linear:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), split)
    return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, **settings)


def _embed(count: int, width: int, split: tuple[str | None, str], **settings: Any) -> nnx.Embed:
    init = nnx.with_partitioning(nnx.initializers.normal(width**-0.5), split)
    return nnx.Embed(count, width, embedding_init=init, **settings)


class Attention(nnx.Module):
    """Every byte looks at itself and at those before it."""

    def __init__(self, width: int, heads: int, **settings: Any):
        self.heads = heads
        self.query = _linear(width, width, COLUMNS, **settings)
        self.key = _linear(width, width, COLUMNS, **settings)
        self.value = _linear(width, width, COLUMNS, **settings)
        self.out = _linear(width, width, ROWS, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, context, width) to the same."""

        def by_head(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.heads, -1)

        query, key, value = (by_head(f(x)) for f in (self.query, self.key, self.value))
        seen = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(seen.reshape(x.shape))


class Block(nnx.Module):
    """Attention, then two dense layers, each added to what came in."""

    def __init__(self, width: int, heads: int, **settings: Any):
        self.norm1 = nnx.LayerNorm(width, **settings)
        self.attention = Attention(width, heads, **settings)
        self.norm2 = nnx.LayerNorm(width, **settings)
        self.up = _linear(width, 4 * width, COLUMNS, **settings)
        self.down = _linear(4 * width, width, ROWS, **settings)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, context, width) to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """A decoder-only transformer over bytes, with learned positions and norms before each part."""

    def __init__(
        self, layers: int, width: int, heads: int, context: int, dtype: Any, rngs: nnx.Rngs
    ):
        settings = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.bytes = _embed(BYTES, width, ROWS, **settings)
        self.positions = _embed(context, width, (None, "fsdp"), **settings)
        self.blocks = nnx.List([Block(width, heads, **settings) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, **settings)
        self.head = _linear(width, BYTES, COLUMNS, **settings)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The logits of the byte that follows each byte."""
        x = self.bytes(inputs) + self.positions(jnp.arange(inputs.shape[1]))
        x = functools.reduce(lambda x, block: block(x), self.blocks, x)
        return self.head(self.norm(x))
