"""The devices that programs are compiled for.

Nothing here imports JAX before it is needed: the environment must be set first.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

HOW = 'pip install -e ".[accelerators]"'


class Target(NamedTuple):
    """A device, or a slice of several.

    Attributes:
        name: What is typed for it.
        title: What tables call it.
        platform: "cuda" or "tpu".
        topology: What JAX calls it.
        mesh: Devices along each axis of `AXES`; () for one device.
    """

    name: str
    title: str
    platform: str
    topology: str
    mesh: tuple[int, ...] = ()


AXES = ("fsdp", "tensor")

TARGETS = (
    Target("h100", "NVIDIA H100", "cuda", "1x1x1"),
    Target("v5e", "TPU v5e", "tpu", "v5e:2x2"),
    Target("8xh100", "eight NVIDIA H100", "cuda", "1x1x8", (4, 2)),
    Target("v5e-4x4", "TPU v5e slice of 4 x 4", "tpu", "v5e:4x4", (4, 4)),
)

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA asks of a GPU, as the H100 SXM answers (NVIDIA's data sheet and occupancy tables)."""


def set_environment() -> None:
    """Before JAX is imported: so that its plugins do not look for devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    flags = ["--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
    if (folder := _cuda()) is not None:
        flags.append(f"--xla_gpu_cuda_data_dir={folder}")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _cuda() -> Path | None:
    """The folder with `bin/ptxas` and `nvvm/libdevice`, of the wheel where it is installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "cuda_nvcc/bin/ptxas").exists():
            return Path(folder) / "cuda_nvcc"
    return None


def missing(target: Target) -> str | None:
    """What is not installed that compiling for it needs; None where all is there."""
    module = {"cuda": "jax_plugins.xla_cuda12", "tpu": "libtpu"}[target.platform]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"{target.name} needs its compiler: {HOW}"


@functools.cache
def mesh_of(target: Target) -> Any:
    """A `jax.sharding.Mesh` of the devices; of one, on an axis of length 1."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    if target.platform == "cuda":
        found = topologies.get_topology_desc(
            platform="cuda", topology=target.topology, target_config=H100
        )
    else:
        found = topologies.get_topology_desc(target.topology, "tpu")
    devices = np.array(found.devices if target.mesh else found.devices[:1])
    return Mesh(devices.reshape(target.mesh or (1, 1)), AXES)
