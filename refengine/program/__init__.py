"""Programs: the traced decoder, its precision and its memory plan."""

from __future__ import annotations

from refengine.program.fusion import Fusion
from refengine.program.ir import Instruction, Program, Value, concrete
from refengine.program.plan import MemoryPlan, Placement, WorkspaceOf, golden_workspace, plan_memory
from refengine.program.precision import POLICIES, Policy, kv_formats, policy
from refengine.program.precision_pass import apply_policy
from refengine.program.step_batch import StepBatch, StepInputs, check_step_batch
from refengine.program.tracer import SymbolicWeights, Tracer, input_arrays, symbolic_inputs

__all__ = [
    "POLICIES",
    "Fusion",
    "Instruction",
    "MemoryPlan",
    "Placement",
    "Policy",
    "Program",
    "StepBatch",
    "StepInputs",
    "SymbolicWeights",
    "Tracer",
    "Value",
    "WorkspaceOf",
    "apply_policy",
    "check_step_batch",
    "concrete",
    "golden_workspace",
    "input_arrays",
    "kv_formats",
    "plan_memory",
    "policy",
    "symbolic_inputs",
]
