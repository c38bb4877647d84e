"""The `eblora` command."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .version import __version__

app = typer.Typer(help="Continual fine-tuning that forgets less.", no_args_is_help=True, add_completion=False)


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
        str, typer.Option(help="Comma-separated methods out of frozen, lora, ebo, eblora.")
    ] = "frozen,lora,ebo,eblora",
    output: Annotated[Path, typer.Option(help="Folder for results.json and the plot.")] = Path("eblora-demo"),
) -> None:
    """
    Learn six tasks of handwritten digits one after another, and see what each method forgets.

    Trains a small vision transformer on real digits and then six image transformations in sequence. Offline, on the
    CPU, a few minutes. Writes results.json and accuracy_matrices.png.
    """
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        typer.echo(f"The demo needs {error.name}: pip install 'eblora-hf[demo]'", err=True)
        raise typer.Exit(1) from error
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {output}: {error}", param_hint="--output") from error
    typer.echo("Loading torch and transformers…")
    from .benchmark import demo as benchmark

    names = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in names if name not in benchmark.METHODS]
    if unknown or not names or len(set(names)) < len(names):
        raise typer.BadParameter(
            f"got {methods!r}, expected different names out of {', '.join(benchmark.METHODS)}", param_hint="--methods"
        )
    benchmark.run(seed, names, output)
