"""Recipes, and the loop that trains them: resumable, seeded, probed."""

from condzoo.training.attempts import state_of
from condzoo.training.data_sets import read_data
from condzoo.training.evaluation import Evaluation, evaluate
from condzoo.training.events import EpochDone, Event, Finished, Message, Notice, Started, StepDone
from condzoo.training.loop import train
from condzoo.training.many_runs import finished_among, run_all
from condzoo.training.recipe import dump_recipe, load_recipe
from condzoo.training.recipe_errors import RecipeError
from condzoo.training.recipe_files import recipe_files, recipe_headers
from condzoo.training.resume import CheckpointError
from condzoo.training.run_directory import RunDirectoryError
from condzoo.training.runs import Diverged, Run, default_run_directory, evaluate_run, load_run
from condzoo.training.schema import Recipe
from condzoo.training.signals import Stopped
from condzoo.training.summaries import summarize
from condzoo.training.sweep import parse_grid, parse_seeds, plan_sweep, sweep, take_shard, train_seeds

__all__ = [
    "CheckpointError",
    "Diverged",
    "EpochDone",
    "Evaluation",
    "Event",
    "Finished",
    "Message",
    "Notice",
    "Recipe",
    "RecipeError",
    "Run",
    "RunDirectoryError",
    "Started",
    "StepDone",
    "Stopped",
    "default_run_directory",
    "dump_recipe",
    "evaluate",
    "evaluate_run",
    "finished_among",
    "load_recipe",
    "load_run",
    "parse_grid",
    "parse_seeds",
    "plan_sweep",
    "read_data",
    "recipe_files",
    "recipe_headers",
    "run_all",
    "state_of",
    "summarize",
    "sweep",
    "take_shard",
    "train",
    "train_seeds",
]
