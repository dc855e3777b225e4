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
        *transformer.TASKS,
        *deep_network.TASKS,
        ranker.TASK,
    )
}
