"""The array processor: specification, mapping, schedule, execution and cost of packed layers."""

from workbench.array.execute import Execution, StackExecution, execute_layer, execute_stack
from workbench.array.mapping import BlockMapping, LayerMapping, Layout, Region, map_block, map_layer
from workbench.array.schedule import Operation, Schedule, schedule_layer, schedule_layers
from workbench.array.spec import ASSUMPTIONS, PRESETS, ArraySpec, preset

__all__ = [
    "ASSUMPTIONS", "PRESETS", "ArraySpec", "BlockMapping", "Execution", "LayerMapping", "Layout", "Operation", "Region",
    "Schedule", "StackExecution", "execute_layer", "execute_stack", "map_block", "map_layer", "preset", "schedule_layer",
    "schedule_layers",
]  # fmt: skip
