"""LSTM compression workbench: `import workbench as wb` gives the public names, each loaded when first used.

Nothing is imported here (PEP 562), so that `workbench.array` and `workbench.engine` never load torch.
"""

import difflib
import importlib

__version__ = "0.1.0"

# Public name -> module that defines it. Submodules are reached under their own names (`wb.tasks.load`).
_NAMES = {
    name: f"workbench.{module}"
    for module, names in {
        "acceleration": "accelerate check_acceleration headline_schedules overlap_study speed_up stalls train_points",
        "allocation": "allocate choices_to_measure search_allocation",
        "cheap": "cheap_agreement cheap_over_seeds cheap_sensitivity",
        "constrain": "attach bake compress pack",
        "deployment": "deploy packed_from present_deployment present_layers present_packed",
        "emulation": "emulate mismatch_rate",
        "exploration": "Question array_of explore explorer present_answer untrained",
        "fixedpoint": "QFormat",
        "methods": "METHODS BankBalanced BlockCirculant BlockSparse Dense LowRank RowBalanced Structured TopK"
        " method_from_label",
        "models": "LanguageModel SequenceClassifier build_classifier build_language_model",
        "packed": "PackedModel load",
        "plan": "Plan uniform",
        "precision": "Arithmetic Tuning anatomy check_precision measure_precision mix_precision observe_models"
        " one_signal_at_a_time quantised_training train_baselines",
        "quantise": "calibrate observe weight_format",
        "report": "show",
        "schedules": "admm gradual iterative one_shot",
        "sensitivity": "Loop Strength check_sensitivity class_stability classify hybrid_plan method_agreement rank_blocks"
        " search_hybrid seed_agreement sensitive_gates sensitivity_table strengths",
        "signals": "signal_errors",
        "sparsity": "delta_study operation_study",
        "sweep": "results",
        "study": "array_layers check_study check_tradeoff compare over_folds over_settings pairs_over_folds"
        " sensitivity_over_seeds tradeoff train_dense variants with_chosen",
        "runs": "record run",
        "tables": "acceleration_parts_table acceleration_table acceleration_verdict accuracy_table assumption_table"
        " baseline_note count_table crossover_table delta_verdict device_table energy_note energy_table"
        " front_table hardware_table layout_table mixture_table omission_table operation_verdict overlap_table"
        " plan_table precision_published precision_table precision_verdict present price_table published_table"
        " ranking_table record_acceleration product_table record_precision record_sensitivity record_study"
        " record_tradeoff refusal_note region_table sensitivity_summary sensitivity_verdict settings_grid"
        " signal_table smallest_array_table smallest_table space_table spec_table speed_up_table speed_up_verdict"
        " split_table stability_table stall_table systolic_table task_table tradeoff_grid tradeoff_table"
        " tradeoff_verdict unreachable_table verdict",
        "units": "remove_units unit_scores",
        "train": "baseline evaluate fit load_checkpoint paired_interval save_checkpoint",
    }.items()
    for name in names.split()
}
_SUBMODULES = (
    "acceleration", "allocation", "array", "budget", "cheap", "constrain", "container", "deployment", "emulation", "engine",
    "exploration", "fixedpoint", "gates", "index", "methods", "models", "packed", "pareto", "plan", "plots", "precision",
    "published", "quantise", "report", "runs", "schedules", "sensitivity", "signals", "sparsity", "study", "sweep", "tables",
    "tasks", "train", "units",
)  # fmt: skip

__all__ = ["__version__", *_NAMES, *_SUBMODULES]


def __getattr__(name):
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"workbench.{name}")
    close = difflib.get_close_matches(name, __all__, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise AttributeError(f"module 'workbench' has no attribute {name!r}{hint}")


def __dir__():
    return sorted(__all__)
