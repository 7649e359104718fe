"""The figures and tables of the appendix of arXiv:2002.10801: which runs, which plot, which claim.

Each is one file, recipes/paper/<id>.toml, that says everything in words and numbers: what is run at scale
"paper" (the appendix's own setup) and at scale "cpu" (what two cores can do; each reduction is listed), how it is
drawn, and each claim as a measure with a bound that was written down before the run, or says that it was not. The way
through:

    load_experiment(id)                     recipes/paper/<id>.toml, checked (schema.py, loading.py)
    collect(...)                            runs what is missing; a dict of plain numbers (collecting.py), by kind:
                                            training.py, initialization.py, theory.py, growth.py
    judge(experiment, data)                 a Verdict for each claim (claims.py, measures.py)
    draw(experiment, data, png)             the figure, of the dict alone (figures.py)
    report(...)                             docs/reproduction.md, of the files alone (report.py)

The dict is written as JSON beside the figure, so that drawing, judging and reporting never run anything again.
"""

from condzoo.experiments.claims import Verdict, judge
from condzoo.experiments.collecting import collect, finished, stem
from condzoo.experiments.data_files import read_data_file
from condzoo.experiments.figures import draw
from condzoo.experiments.loading import experiment_ids, load_experiment
from condzoo.experiments.planning import estimated_minutes
from condzoo.experiments.reductions import reductions_of
from condzoo.experiments.report import report
from condzoo.experiments.schema import Experiment

__all__ = [
    "Experiment",
    "Verdict",
    "collect",
    "draw",
    "estimated_minutes",
    "experiment_ids",
    "finished",
    "judge",
    "load_experiment",
    "read_data_file",
    "reductions_of",
    "report",
    "stem",
]
