"""Crossover: `runlora crossover` shows which plan wins for one LoRA layer, over tokens and rank.

``problem.py`` poses the layer, ``fields.py`` finds the winners, ``contenders.py`` names them,
``variants.py`` knows the variants of "Run LoRA Run", ``borders.py`` has the break-evens as
formulas, ``timed.py`` measures, ``picture.py``, ``drawing.py`` and ``command.py`` show it all.

Invariant: the plans, their order and their break-evens are those that the pass itself finds.
"""
