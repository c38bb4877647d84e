"""What `eblora demo` does: one seed, a few methods, progress bars, tables, a plot and JSON."""

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .digits import PRETRAINING_STEPS, digits_problem, load_digits, pretrain, steady_cpu
from .plots import plot_matrices
from .protocol import STEPS_PER_TASK, MethodResult, run_method
from .report import print_tables, save_results
from .suites import SUITES
from .transformations import PROTOCOL_TASKS

METHODS = SUITES["digits"].methods


def run(seed: int, methods: list[str], output: Path) -> dict[str, MethodResult]:
    """
    Runs the methods on one seed and reports.

    Args:
        seed (`int`): Seed of data split, base model and training.
        methods (`list[str]`): Out of `METHODS`.
        output (`Path`): Existing folder for `results.json` and `accuracy_matrices.png`.

    Returns:
        `dict[str, MethodResult]`: By method.
    """
    console = Console()
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    splits, results = load_digits(seed), {}
    with steady_cpu(), Progress(*columns, console=console) as progress:
        bar = progress.add_task("pre-training on upright digits", total=PRETRAINING_STEPS)
        model = pretrain(seed, splits["train"], lambda: progress.advance(bar))
        problem = digits_problem(model, splits, PROTOCOL_TASKS)
        for method in methods:
            total = 1 if method == "frozen" else STEPS_PER_TASK * len(PROTOCOL_TASKS)
            bar = progress.add_task(f"{method}: {len(PROTOCOL_TASKS)} tasks", total=total)
            results[method] = run_method(
                method, SUITES["digits"], problem, seed, advance=partial(progress.advance, bar)
            )
            progress.update(bar, completed=total)
    print_tables(console, results, PROTOCOL_TASKS)
    save_results(results, seed, output / "results.json")
    matrices = {method: result.accuracy_matrix for method, result in results.items()}
    titles = {method: f"MFN {result.MFN:.1f}, BWT {result.BWT:.1f}" for method, result in results.items()}
    plot_matrices(matrices, titles, PROTOCOL_TASKS, output / "accuracy_matrices.png")
    console.print(f"Written: {output / 'results.json'} and {output / 'accuracy_matrices.png'}")
    return results
