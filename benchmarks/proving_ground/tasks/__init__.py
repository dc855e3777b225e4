"""The tasks by their names, and the settings of each."""

from benchmarks.proving_ground.task import Task
from benchmarks.proving_ground.tasks import (
    deep_network,
    quadratic,
    ranker,
    recurrent,
    transformer,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        quadratic.TASK,
        recurrent.TASK,
        transformer.MOMENTUM,
        transformer.ADAMW,
        *deep_network.TASKS,
        ranker.TASK,
    )
}

VARIANTS: dict[str, Task] = {task.name: task for task in transformer.VARIANTS}
"""Tasks for the candidates alone."""
