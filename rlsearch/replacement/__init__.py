"""What is replaced, and by what: units of a model, the blocks that stand in for them, and the surgery.

Replacement Learning (arXiv 2410.01239): a replaced unit owns no weights; it computes with weights made from those of
the preceding and the succeeding unit. What is published and what is our reconstruction stands at each block.
"""

from __future__ import annotations

from rlsearch.replacement.blocks import BLOCKS, BlockKind
from rlsearch.replacement.fitting import fits
from rlsearch.replacement.layers import composed_parameters, mixing_parameters
from rlsearch.replacement.surgery import (
    PlannedUnit,
    ReplacedUnit,
    SurgeryPlan,
    SurgeryReport,
    apply_policy,
    learnable_params,
    materialize,
    plan,
    total_params,
)
from rlsearch.replacement.units import Unit, find_units

__all__ = [
    "BLOCKS",
    "BlockKind",
    "PlannedUnit",
    "ReplacedUnit",
    "SurgeryPlan",
    "SurgeryReport",
    "Unit",
    "apply_policy",
    "composed_parameters",
    "find_units",
    "fits",
    "learnable_params",
    "materialize",
    "mixing_parameters",
    "plan",
    "total_params",
]
