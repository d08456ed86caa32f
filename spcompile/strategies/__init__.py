"""How memory states, keys and values cross ranks: one file and one row per strategy.

A strategy is written as ordinary functions of this rank's tensors; the communication pass traces them into
the graph. What is sharded is the operator: rank r holds tokens [r*block, (r+1)*block) of a
:class:`~spcompile.collectives.Sequence`; tokens at or after ``length`` are padding with any content (NaN in a
debug mode), and no valid result may depend on them. ``sequence`` None is a sequence that this rank holds
whole: the same code without collectives.
"""

from spcompile.strategies.table import LINEAR, SOFTMAX, Strategy, strategy_of

__all__ = ["LINEAR", "SOFTMAX", "Strategy", "strategy_of"]
