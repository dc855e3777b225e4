"""Threshold rules: how large may each norm be now?

A rule sees norms, steps and the norms of the parameters, never a gradient, and works in two
phases: `threshold` before the gradient is limited, `observe` after. Its memory is whatever
`init` returns; the array of norms it is given has one entry per group, so that one rule serves
every scope.

Neither a step with a non-finite gradient nor, in its group, a norm of exactly 0 is ever learned
from: the one says nothing, the other has no scale.
"""

from optclip.thresholds.averages import (
    LearnFrom,
    leaf_average,
    moving_average,
    online_quantile,
)
from optclip.thresholds.combinators import maximum, minimum, patient, switch
from optclip.thresholds.outliers import robust, zscore
from optclip.thresholds.rules import (
    ParameterNorms,
    Rule,
    Step,
    as_rule,
    constant,
    per_group,
    relative_to_params,
)
from optclip.thresholds.windows import mean_over_window, quantile_over_window

__all__ = [
    "LearnFrom",
    "ParameterNorms",
    "Rule",
    "Step",
    "as_rule",
    "constant",
    "leaf_average",
    "maximum",
    "mean_over_window",
    "minimum",
    "moving_average",
    "online_quantile",
    "patient",
    "per_group",
    "quantile_over_window",
    "relative_to_params",
    "robust",
    "switch",
    "zscore",
]
