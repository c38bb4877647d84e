"""What `eblora benchmark` does: methods on several seeds in parallel, resumable; tables, plots and JSON lines."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .plots import plot_benchmark
from .report import markdown, print_summary
from .runs import run_all, tuned_run
from .suite import Suite
from .suites import SUITES
from .tuning import tune, tuning_runs

REFERENCE = "eblora"  # what the others are compared with


def chosen_suite(name: str) -> Suite:
    """
    The suite of a name.

    Raises:
        ValueError: if there is none; the message lists those that there are.
    """
    if name not in SUITES:
        known = "; ".join(f"{suite.name} ({suite.about})" for suite in SUITES.values())
        raise ValueError(f"There is no suite {name!r}: expected one of {known}.")
    return SUITES[name]


def check(suite: Suite, methods: Sequence[str], tasks: Sequence[str]) -> None:
    """
    Raises for names that do not exist or stand twice.

    Raises:
        ValueError: naming them and what is possible.
    """
    unknown = [method for method in methods if method not in suite.methods]
    if unknown or not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods {', '.join(methods)}: expected different names out of {', '.join(suite.methods)}.")
    for name in tasks:
        suite.check_task(name)
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks {', '.join(tasks)}: expected at least one, and none of them twice.")


def run(
    suite: Suite,
    methods: Sequence[str],
    seeds: Sequence[int],
    tasks: Sequence[str],
    rank: int,
    output: Path,
    *,
    tuned_here: bool,
    workers: int,
) -> None:
    """
    Runs what is not in `output` yet, and reports.

    Args:
        suite ([`Suite`]): The tasks and settings.
        methods (`Sequence[str]`): Out of the suite's.
        seeds (`Sequence[int]`): Seeds of data split, base model and training.
        tasks (`Sequence[str]`): Names of its tasks, in the order they are learnt.
        rank (`int`): LoRA rank of each task.
        output (`Path`): Existing folder for `results.jsonl`, `tuning.jsonl`, `summary.md` and the plots.
        tuned_here (`bool`): Tune every method on validation first, instead of taking those in `settings/`.
        workers (`int`): Number of processes.
    """
    console = Console()
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bases, tasks = output / "base_models", tuple(tasks)
    with Progress(*columns, console=console) as progress:
        best = {}
        if tuned_here:
            bar = progress.add_task("tuning", total=len(tuning_runs(suite, methods, tasks, rank)))
            path = output / "tuning.jsonl"
            best = tune(suite, methods, tasks, rank, path, bases, workers, lambda: progress.advance(bar))
        runs = [tuned_run(suite, method, seed, tasks, rank, best) for method in methods for seed in seeds]
        bar = progress.add_task("benchmark", total=len(runs))
        lines = run_all(runs, output / "results.jsonl", bases, workers, lambda: progress.advance(bar))
    for method, settings in best.items():
        console.print(f"{method}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    print_summary(console, lines, REFERENCE)
    (output / "summary.md").write_text(markdown(lines, REFERENCE), encoding="utf-8")
    plots = plot_benchmark(lines, output)
    written = [output / "results.jsonl", output / "summary.md", *plots]
    console.print(f"Written: {', '.join(str(path) for path in written)}")
