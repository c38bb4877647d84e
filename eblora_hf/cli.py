"""The `eblora` command."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .analysis.commands import app as analyze
from .version import __version__

app = typer.Typer(help="Continual fine-tuning that forgets less.", no_args_is_help=True, add_completion=False)
app.add_typer(analyze, name="analyze")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"eblora_hf {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Continual fine-tuning that forgets less."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Seed of data split, base model and training.")] = 0,
    methods: Annotated[
        str, typer.Option(help="Comma-separated methods, as in `benchmark`.")
    ] = "frozen,lora,ebo,eblora,eblora-anchor",
    output: Annotated[Path, typer.Option(help="Folder for results.json and the plot.")] = Path("eblora-demo"),
) -> None:
    """
    Learn six tasks of handwritten digits one after another, and see what each method forgets.

    Trains a small vision transformer on real digits and then six image transformations in sequence. Offline, on the
    CPU, a few minutes. Writes results.json and accuracy_matrices.png.
    """
    _check_extra()
    _check_writable(output)
    typer.echo("Loading torch and transformers…")
    from .benchmark import demo as benchmark

    names = _names(methods)
    unknown = [name for name in names if name not in benchmark.METHODS]
    if unknown or not names or len(set(names)) < len(names):
        raise typer.BadParameter(
            f"got {methods!r}, expected different names out of {', '.join(benchmark.METHODS)}", param_hint="--methods"
        )
    benchmark.run(seed, names, output)


@app.command()
def benchmark(
    suite: Annotated[
        str,
        typer.Option(
            help="What is learnt: digits; long (eighteen tasks of them); text, text-grow or text-long (docstrings, on "
            "a pre-trained encoder: pip install 'eblora-hf[text]')."
        ),
    ] = "digits",
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated methods; by default all of the suite.", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds, or a range such as 0-4.")] = "0-4",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks in the order they are learnt; by default those of the suite. Of digits: "
            "rotate-<degrees>, invert, invert-left, invert-top, shear, shear-left, edges, swap-columns, swap-rows, "
            "grid, dots, noise, permute, dim, flip-horizontal, flip-vertical, transpose, zoom-in, zoom-out, upright.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, max=16, help="LoRA rank of each task; by default the suite's.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for results, tables and plots.")] = Path("eblora-benchmark"),
    tune: Annotated[
        bool, typer.Option("--tune", help="Tune every method on the validation split of other seeds first.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Parallel processes; by default one per core.")] = (
        os.cpu_count() or 1
    ),
) -> None:
    """
    Compare continual-learning methods on handwritten digits or on text, over several seeds.

    Runs in parallel, offline, on the CPU. Writes one line per method and seed to results.jsonl, and a summary and
    plots beside it. Started again, it makes only the runs that are missing.
    """
    _check_extra()
    _check_writable(output)
    typer.echo("Loading torch and transformers…")
    from .benchmark import benchmark as comparison

    try:
        chosen = comparison.chosen_suite(suite)
        names = list(chosen.methods) if methods is None else _names(methods)
        learnt = list(chosen.tasks) if tasks is None else _names(tasks)
        comparison.check(chosen, names, learnt)
        numbers = _seeds(seeds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        comparison.run(chosen, names, numbers, learnt, rank or chosen.rank, output, tuned_here=tune, workers=workers)
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def repair(folder: Annotated[Path, typer.Argument(help="Folder of a sequence, an `output_dir`.")]) -> None:
    """
    Put the folder of a sequence in order after a run was killed or the index was lost.

    Tasks that the index does not list are moved to `set-aside` in the folder, and the adapter of all tasks is written
    again if it does not fit the index. Nothing is deleted.
    """
    from .published.locks import one_writer
    from .published.sequence import PublishedSequence
    from .published.strays import check_links, set_strays_aside

    try:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder.")
        check_links(folder)
        with one_writer(folder, "run"), one_writer(folder, "append"):
            tasks = PublishedSequence.open(folder, repair=True).tasks if PublishedSequence.exists(folder) else []
            moved = set_strays_aside(folder, tasks)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    for path in moved:
        typer.echo(f"Moved to {path}")
    typer.echo(f"{folder} is in order: {', '.join(task.name for task in tasks) or 'no task'}.")


@app.command()
def show(
    sequence: Annotated[str, typer.Argument(help="Folder of a sequence, user/repo or user/repo@revision.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines: one JSON object.")] = False,
) -> None:
    """
    Show what a sequence has learnt and kept: tasks, accuracies, size, and the room for more.

    Every file is verified against the index on the way.
    """
    import json

    from .analysis.commands import print_table
    from .analysis.overview import describe_sequence, sentences, tables
    from .published.loading import fetch_sequence

    try:
        described = describe_sequence(fetch_sequence(sequence))
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(described, indent=2, allow_nan=False))
        return
    for title, header, rows in tables(described):
        print_table(title, header, rows)
    for line in sentences(described):
        typer.echo(line)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="Published sequences of the same tasks, one of each seed.")],
    benchmark: Annotated[
        str | None,
        typer.Option(help="ucit, mllm-dcl, mtil-order-1, text-order-1…: all its tasks have to be there, in order."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for the same as JSON, run by run.")] = None,
) -> None:
    """
    Print the table of a benchmark: accuracies of each task, and the means, in percent over the seeds.

    Last is after all tasks, Avg the mean over all steps, Transfer that before a task was learnt; zero-shot that of the
    pre-trained model, which the scripts measure with --zero_shot.
    """
    import json

    from .analysis.table import BENCHMARKS, as_markdown, benchmark_table

    if benchmark is not None and benchmark not in BENCHMARKS:
        raise typer.BadParameter(
            f"got {benchmark!r}, expected one of {', '.join(BENCHMARKS)}", param_hint="--benchmark"
        )
    try:
        content = benchmark_table(folders, benchmark)
        if output is not None:
            output.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(as_markdown(content))


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="A model on the Hub, or a folder with its config.json.")],
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks are learnt.")] = 10,
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank of each.")] = 16,
    target_modules: Annotated[str, typer.Option(help="'all-linear', or names with commas.")] = "all-linear",
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or 4-bit.")] = "bfloat16",
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs train.")] = 1,
    sharded: Annotated[bool, typer.Option("--sharded", help="They share the weights (FSDP2).")] = False,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of the model.")] = "main",
) -> None:
    """
    Say what a sequence of tasks will take, before anything is loaded: memory, disk, rank.

    From the config of the model alone. Activations are not in it.
    """
    from peft import LoraConfig
    from transformers import AutoConfig

    from .analysis.cost import as_table, estimate_cost

    try:
        if model.startswith((".", "/", "~")) and not Path(model).is_dir():
            raise FileNotFoundError(f"{model} is not a folder.")
        names = target_modules if target_modules == "all-linear" else _names(target_modules)
        lora = LoraConfig(r=rank, target_modules=names)
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        cost = estimate_cost(config, lora, tasks=tasks, dtype=dtype, gpus=gpus, sharded=sharded)
    except (OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(as_table(cost, tasks))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    """Seeds from "0,1,2" or "0-4"."""
    seeds: list[int] = []
    for part in _names(text):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"seeds {text!r}: expected numbers and ranges such as 0,1,2 or 0-4.")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {text!r}: expected at least one, and none of them twice.")
    return seeds


def _check_extra() -> None:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        typer.echo(f"This command needs {error.name}: pip install 'eblora-hf[demo]'", err=True)
        raise typer.Exit(1) from error


def _check_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {output}: {error}", param_hint="--output") from error
