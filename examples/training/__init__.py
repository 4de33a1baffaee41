"""The parts of the training scripts, from flags to figures.

A run goes parse -> open its folder -> build -> fit -> write:

* :mod:`training.settings` says what can be asked for, :mod:`training.command_line` reads it, and
  :mod:`training.methods` names the rows of Table 3;
* :mod:`training.data`, :mod:`training.models` and :mod:`training.optimisers` build it;
* :mod:`training.engine` trains, evaluates and resumes, on one process or many (:mod:`training.processes`);
* :mod:`training.folder` and :mod:`training.checkpoints` see to it that nothing is lost;
* :mod:`training.measures` and :mod:`training.reporting` say what came of it;
* :mod:`training.grid` runs many of them and compares.
"""

import fgo_geo  # noqa: F401  before Geoopt, which warns if it is imported alone
