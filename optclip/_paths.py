"""The leaves of a tree by path, and what a caller says of each."""

from typing import Any

import jax
import optax


def leaves_with_paths(updates: optax.Updates) -> list[tuple[str, Any]]:
    """The leaves with their paths ("block_0/attention/kernel"), in order."""
    found: list[tuple[Any, Any]] = []
    for path, node in jax.tree_util.tree_flatten_with_path(updates, is_leaf=is_variable)[0]:
        if is_variable(node):
            # Parameters in an nnx variable have the path of the gradient, which is in none.
            inside, _ = jax.tree_util.tree_flatten_with_path(node)
            found += [(path + rest[1:], x) for rest, x in inside]
        else:
            found.append((path, node))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in found]


def is_variable(node: Any) -> bool:
    """Whether a node of a tree is a variable of Flax nnx, which holds an array."""
    return hasattr(node, "get_value")


def array_in(node: Any) -> Any:
    """The array in a leaf of a state; `nnx.Optimizer` wraps its leaves in variables."""
    return node.get_value() if is_variable(node) else node


def answer_per_leaf(question: Any, updates: optax.Updates, name: str) -> list[Any]:
    """One answer per leaf, from a function of the path or from a (prefix) tree of answers."""
    if callable(question):
        return [question(path) for path, _ in leaves_with_paths(updates)]
    is_answer = lambda x: x is None or isinstance(x, jax.sharding.PartitionSpec)  # noqa: E731
    try:
        spread = jax.tree.broadcast(question, updates, is_leaf=is_answer)
    except ValueError as error:
        raise ValueError(
            f"{name}= must be a function from path to answer, or a tree whose structure is that of "
            f"the updates or a prefix of it: {error}"
        ) from None
    answers = jax.tree.leaves(spread, is_leaf=is_answer)
    # A hole in the tree is no leaf, but is answered like one.
    leaves = jax.tree.leaves(updates, is_leaf=lambda x: x is None)
    return [answer for answer, x in zip(answers, leaves, strict=True) if x is not None]
