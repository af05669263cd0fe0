"""The array processor: specification, mapping, schedule, execution and cost of packed layers."""

from workbench.array.choice import Choice, compare_operations, crossover, with_operations
from workbench.array.execute import Execution, StackExecution, execute_layer, execute_stack
from workbench.array.mapping import BlockMapping, LayerMapping, Layout, Region, map_block, map_layer
from workbench.array.schedule import Operation, Schedule, schedule_layer, schedule_layers
from workbench.array.skipping import multiplied
from workbench.array.space import faster_part, grid_points, scaled_points, smallest_array, sweep_space, with_weight_bits
from workbench.array.spec import ASSUMPTIONS, FIELDS, PRESETS, ArraySpec, preset
from workbench.array.stack import StagedSchedule, schedule_hoisted, schedule_stack
from workbench.array.systolic import SYSTOLIC, SystolicArray, SystolicRun, last_cycle, layer_products, run_product

__all__ = [
    "ASSUMPTIONS", "FIELDS", "PRESETS", "SYSTOLIC", "ArraySpec", "BlockMapping", "Choice", "Execution", "LayerMapping",
    "Layout", "Operation", "Region", "Schedule", "StackExecution", "StagedSchedule", "SystolicArray", "SystolicRun",
    "compare_operations", "crossover", "execute_layer", "execute_stack", "faster_part", "grid_points", "last_cycle",
    "layer_products", "map_block", "map_layer", "multiplied", "preset", "run_product", "scaled_points", "schedule_hoisted",
    "schedule_layer", "schedule_layers", "schedule_stack", "smallest_array", "sweep_space",
    "with_operations", "with_weight_bits",
]  # fmt: skip
