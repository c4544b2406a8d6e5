"""Importance criteria: how much it would hurt to lose a weight or a unit; the lowest scores are pruned first.

A recipe's `criterion: l1` names one of `__all__`; what a criterion is, `tersor.prune.criteria.base` tells.
"""

from tersor.prune.criteria.apoz import apoz
from tersor.prune.criteria.batchnorm_scale import batchnorm_scale
from tersor.prune.criteria.fisher import fisher
from tersor.prune.criteria.fpgm import fpgm
from tersor.prune.criteria.l1 import l1
from tersor.prune.criteria.l2 import l2
from tersor.prune.criteria.lamp import lamp
from tersor.prune.criteria.movement import movement
from tersor.prune.criteria.obd import obd
from tersor.prune.criteria.obs import obs
from tersor.prune.criteria.order import order
from tersor.prune.criteria.random import random
from tersor.prune.criteria.taylor import taylor
from tersor.prune.criteria.wanda import wanda

__all__ = [
    "apoz",
    "batchnorm_scale",
    "fisher",
    "fpgm",
    "l1",
    "l2",
    "lamp",
    "movement",
    "obd",
    "obs",
    "order",
    "random",
    "taylor",
    "wanda",
]
