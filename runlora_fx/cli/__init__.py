"""Command line: ``runlora explain``, ``crossover``, ``gain``, ``calibrate``, ``demo``, ``doctor``.

``app.py`` has the commands and their options, ``console.py`` says where output goes. Every command
has a module or a folder of its own, which is imported when the command runs.

Invariant: only ``__main__.py`` imports the commands; benchmarks may use ``layers.py`` and
``without_weights.py``.
"""
