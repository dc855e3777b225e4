"""One process of a run: trains the network of examples/mnist.py on its share of every batch.

It takes a step with each clip in turn, so that one start and one checkpoint serve them all. Of each
step it logs what was read and a digest of all that the next step depends on; at the end it leaves
the whole state.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mnist
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

CLIPS = {
    "robust_clip": (),
    "zclip": ("--clip-arg", "warmup_steps=3"),
    "clip_by_global_norm": ("--clip-arg", "max_norm=1.0"),
}
"""What to pass to examples/mnist.py for each."""


def parse_options() -> argparse.Namespace:
    """The command line, which launch.py writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--limit", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--batches", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, required=True)
    parser.add_argument("--checkpoint-after", type=int, required=True, metavar="STEP")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill", type=int, nargs=2, metavar=("RANK", "STEP"))
    return parser.parse_args()


def start(clip: str, image_shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A fresh training state and its step, with momentum SGD behind the clip."""
    arguments = ["--clip", clip, *CLIPS[clip], "--optimizer", "momentum"]
    optimizer = mnist.build_optimizer(mnist.parse_options(arguments))
    state, train_step, _ = mnist.start_linen(optimizer, image_shape, seed=0)
    return state, train_step


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays over all processes, from what each of them has: equal copies, or its share."""

    def spread_leaf(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(jnp.asarray(x)))

    return jax.tree.map(spread_leaf, tree)


def leaves_here(state: Any) -> dict[str, np.ndarray]:
    """This process's copy of every leaf, by name; another process may hold other bits."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x.addressable_data(0)) for path, x in leaves}


def digest(state: Any) -> str:
    """A hash of the bits of this process's copy."""
    result = hashlib.sha256()
    for name, leaf in leaves_here(state).items():
        result.update(f"{name} {leaf.dtype} {leaf.shape} ".encode() + leaf.tobytes())
    return result.hexdigest()


def open_checkpoints(folder: Path) -> ocp.CheckpointManager:
    """The folder that all processes share; every one of them must save and restore."""
    # Not asynchronous: when `save` comes back, to any process, the checkpoint is committed.
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def train(options: argparse.Namespace) -> None:
    """Takes the steps from the first, or from the checkpoint, to the last batch."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    share = NamedSharding(mesh, PartitionSpec("data"))
    with np.load(options.batches) as batches:
        images, labels = batches["images"], batches["labels"]
    size = images.shape[1] // options.processes
    rows = slice(options.rank * size, (options.rank + 1) * size)

    states, train_steps, done = {}, {}, 0
    for clip in CLIPS:
        state, train_steps[clip] = start(clip, images.shape[2:])
        states[clip] = spread(state, whole)
    with open_checkpoints(options.checkpoints) as checkpoints:
        if options.resume:
            done = checkpoints.latest_step()
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, states)
            states = checkpoints.restore(done, args=ocp.args.StandardRestore(like))

        for step in range(done + 1, len(images) + 1):
            batch = spread((images[step - 1, rows], labels[step - 1, rows]), share)
            for clip, train_step in train_steps.items():
                states[clip], readings = train_step(states[clip], *batch)
                # Both wait for the step: with several in flight, collectives can hang.
                row = {name: value.item() for name, value in jax.device_get(readings).items()}
                row = {"step": step, "clip": clip, **row, "digest": digest(states[clip])}
                with (options.out / f"log-{options.rank}.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
            if step == options.checkpoint_after:
                checkpoints.save(step, args=ocp.args.StandardSave(states))
            if options.kill == [options.rank, step]:
                os.kill(os.getpid(), signal.SIGKILL)
    np.savez(options.out / f"state-{options.rank}.npz", **leaves_here(states))


def main() -> None:
    """Joins the other processes, where there are any, and trains."""
    options = parse_options()
    # Ends even a process that hangs and whose parent is gone, and says where it hung.
    faulthandler.dump_traceback_later(options.limit, exit=True)
    if options.processes > 1:
        jax.distributed.initialize(options.coordinator, options.processes, options.rank)
    train(options)


if __name__ == "__main__":
    main()
