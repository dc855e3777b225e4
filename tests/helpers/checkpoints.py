"""A state saved, and restored into a fresh one, by the libraries that people use."""

from pathlib import Path
from typing import Any

import flax.serialization
import jax
import orbax.checkpoint


def with_orbax(state: Any, fresh: Any, folder: Path) -> Any:
    """By Orbax's manager, into the shapes of a fresh state."""
    with orbax.checkpoint.CheckpointManager(folder) as manager:
        manager.save(0, args=orbax.checkpoint.args.StandardSave(state))
        manager.wait_until_finished()
        template = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, fresh)
        return manager.restore(0, args=orbax.checkpoint.args.StandardRestore(template))


def with_flax(state: Any, fresh: Any, folder: Path) -> Any:
    """By Flax's serialization, through a file."""
    file = folder / "state.msgpack"
    file.write_bytes(flax.serialization.to_bytes(state))
    return flax.serialization.from_bytes(fresh, file.read_bytes())
