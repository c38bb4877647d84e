"""The `eblora analyze` commands: what they read, print and write. The work is in the other files of this folder."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Look into trained LoRA adapters and sequences.", no_args_is_help=True)

_SHOWN = 8  # of the σᵢ/σ₁ in a table; the files have all
_ADAPTER = "A folder with a PEFT LoRA adapter, or user/repo, user/repo@revision, user/repo@revision:subfolder."

Adapters = Annotated[list[str], typer.Argument(metavar="ADAPTER", help=_ADAPTER)]
NewFolder = Annotated[Path, typer.Option(help="Folder for the new adapter.")]


class Equal(StrEnum):
    """What smoothing keeps of a layer's singular values."""

    sum = "sum"
    frobenius = "frobenius"


class Smooth(StrEnum):
    """Smoothing before a merge."""

    none = "none"
    sum = "sum"
    frobenius = "frobenius"


class Kind(StrEnum):
    """What a model is for."""

    text_classification = "text-classification"
    image_classification = "image-classification"
    causal_lm = "causal-lm"


@app.command()
def spectra(
    adapters: Adapters,
    layers: Annotated[bool, typer.Option("--layers", help="Also a row for each layer.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for spectra.json and spectra.png.")] = None,
) -> None:
    """
    How evenly the energy of an adapter's update is spread over its directions.

    Means over the layers: σᵢ/σ₁; the share of the energy in σ₁, σ₁²/Σσ²; the effective rank, exp of the entropy of
    σ/Σσ (Roy and Vetterli 2007).
    """
    with _clear_errors():
        if output is not None:
            _prepare(output, plots=True)
        from ..adapters.spectra import singular_values, summarise
        from ..published.plain_lora import read_adapter

        by_layer = {source: singular_values(read_adapter(source).state) for source in adapters}
        means = {source: summarise(list(values.values())) for source, values in by_layer.items()}
        rows = []
        for source, values in by_layer.items():
            rows.append((source, f"{len(values)} layers", *_cells(means[source])))
            if layers:
                single = {name: summarise([sigma]) if sigma[0] > 0 else None for name, sigma in values.items()}
                rows += [
                    ("", name, *(_cells(spectrum) if spectrum else ["no update"])) for name, spectrum in single.items()
                ]
        print_table("", ("adapter", "layer", "σ₁²/Σσ²", "effective rank", "σᵢ/σ₁"), rows)
        if output is not None:
            from .plots import plot_spectra

            content = {
                source: {**vars(means[source]), "singular_values": {name: s.tolist() for name, s in values.items()}}
                for source, values in by_layer.items()
            }
            _write_json(output / "spectra.json", content)
            plot_spectra(means, output / "spectra.png")
            typer.echo(f"Written: {output / 'spectra.json'} and {output / 'spectra.png'}")


@app.command()
def smooth(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help=_ADAPTER)],
    output: NewFolder,
    equal: Annotated[Equal, typer.Option(help="What of each layer's update stays the same: Σσ or √Σσ².")] = Equal.sum,
) -> None:
    """
    Make all singular values of each layer's update equal, and keep its directions.

    They become their mean (sum) or their root mean square (frobenius). Directions that are zero up to rounding take no
    part and stay zero. Writes an ordinary PEFT adapter of the same rank.
    """
    with _clear_errors():
        from ..adapters.smoothing import smooth_adapter
        from ..published.plain_lora import read_adapter
        from .adapters import check_free, write_adapter

        check_free(output)
        read = read_adapter(adapter)
        _prepare(output)
        write_adapter(output, read.config, smooth_adapter(read.state, equal.value))
        typer.echo(f"Written: {output}")


@app.command()
def merge(
    adapters: Adapters,
    output: NewFolder,
    weight: Annotated[float, typer.Option(help="Weight of every adapter in the sum.")] = 1.0,
    smooth: Annotated[
        Smooth, typer.Option(help="Smooth each adapter first: what `eblora analyze smooth` keeps equal.")
    ] = Smooth.none,
) -> None:
    """
    Add adapters of one base model exactly: weight · Σ ΔW as one ordinary PEFT adapter, whose rank is their sum.

    A head or biases beside the LoRA factors are taken from the last adapter.
    """
    with _clear_errors():
        from ..adapters.merging import merge_adapters
        from ..published.plain_lora import read_adapter
        from .adapters import check_free, check_same_layers, write_adapter

        check_free(output)
        read = [read_adapter(source) for source in adapters]
        check_same_layers(read)
        _prepare(output)
        merged = merge_adapters([adapter.state for adapter in read], weight=weight, smooth=smooth.value)
        write_adapter(output, read[-1].config, merged)
        typer.echo(f"Written: {output}")


@app.command()
def merging(
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds.")] = "0",
    counts: Annotated[str, typer.Option(help="Comma-separated numbers of adapters to merge, from 1 to 6.")] = "2,3,6",
    output: Annotated[Path, typer.Option(help="Folder for merging.json and merging.png.")] = Path("eblora-merging"),
) -> None:
    """
    Does smoothing help to merge independently trained adapters? Measured on handwritten digits.

    Trains six LoRA adapters from one base model, one per task, and merges the first n: raw, smoothed at equal sum of
    the singular values, and at equal Frobenius norm; at weight 1, and with the weight tuned on the validation split.
    Offline, on the CPU, about a minute per seed.
    """
    with _clear_errors():
        chosen_seeds, chosen_counts = _numbers(seeds, "--seeds", 0, 2**31), _numbers(counts, "--counts", 1, 6)
        _prepare(output, plots=True, scikit_learn=True)
        from ..benchmark import merging_experiment as experiment
        from ..benchmark.report import package_versions
        from .plots import plot_merging

        merges = []
        for seed in chosen_seeds:
            merges += experiment.run_seed(seed, chosen_counts, typer.echo)
        table = experiment.over_seeds(merges)
        print_table(
            f"Normalised accuracy index in percent, test split, {len(chosen_seeds)} seed(s)",
            ("adapters", "variant", "weight 1", "weight tuned", "tuned weight"),
            [
                (str(count), variant, str(row["nai"]), str(row["tuned_nai"]), str(row["tuned_weight"]))
                for (count, variant), row in table.items()
            ],
        )
        gains = experiment.gains(merges)
        print_table(
            "Gain over raw adapters in points, paired by seed, with its 95 % interval",
            ("adapters", "variant", "weight 1", "weight tuned"),
            [(str(count), name, str(row["nai"]), str(row["tuned_nai"])) for (count, name), row in gains.items()],
        )
        content = {
            "versions": package_versions(),
            "seeds": chosen_seeds,
            "merges": [vars(merge) for merge in merges],
            "over_seeds": [
                {"count": count, "variant": variant, **{name: vars(value) for name, value in row.items()}}
                for (count, variant), row in table.items()
            ],
            "gains": [
                {"count": count, "variant": variant, **{name: vars(value) for name, value in row.items()}}
                for (count, variant), row in gains.items()
            ],
        }
        _write_json(output / "merging.json", content)
        plot_merging(table, output / "merging.png")
        typer.echo(f"Written: {output / 'merging.json'} and {output / 'merging.png'}")


@app.command()
def interference(
    sequence: Annotated[str, typer.Argument(help="A published sequence: a folder, user/repo or user/repo@revision.")],
    model: Annotated[str, typer.Option(help="Its base model: a folder or Hub repository.")],
    dataset: Annotated[str, typer.Option(help="The new task's data: a folder or Hub repository.")],
    kind: Annotated[Kind, typer.Option(help="Columns: text and label, image and label, or text.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    rank: Annotated[
        int | None, typer.Option(min=1, help="LoRA rank of the new task, by default the newest one's.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Share of the data to use.")] = 0.2,
    output: Annotated[Path | None, typer.Option(help="Folder for interference.json.")] = None,
) -> None:
    """
    Before training a new task: how much of its gradient lies where earlier tasks live, and what room is left.

    Per layer: the share of the gradient's energy inside the basis of the sequence, ‖G F‖²/‖G‖², and the directions
    d_in - p that are left, of which the new task needs as many as its rank.
    """
    with _clear_errors():
        if output is not None:
            _prepare(output)
        from .interference import interference_report
        from .new_task import new_task_trainer

        with tempfile.TemporaryDirectory() as folder:
            trainer = new_task_trainer(
                sequence, model, dataset, kind.value, split=split, rank=rank, fraction=fraction, folder=folder
            )
            rows = interference_report(trainer)
        ranks = {layer.name: layer.rank for layer in trainer.layers}
        content = [
            {**vars(row), "room": row.room, "rank": ranks[row.layer], "fits": row.room >= ranks[row.layer]}
            for row in rows
        ]
        print_table(
            "Energy of the new task's gradient inside the basis of earlier tasks",
            ("layer", "share", "basis", "room", "rank fits"),
            [
                (
                    row["layer"],
                    f"{row['share']:.3f}",
                    f"{row['columns']} of {row['d_in']}",
                    str(row["room"]),
                    f"{row['rank']}: {'yes' if row['fits'] else 'no'}",
                )
                for row in content
            ],
        )
        typer.echo(f"Mean share over {len(rows)} layers: {sum(row.share for row in rows) / len(rows):.3f}")
        if output is not None:
            _write_json(output / "interference.json", content)
            typer.echo(f"Written: {output / 'interference.json'}")


@contextlib.contextmanager
def _clear_errors() -> Iterator[None]:
    """Bad input ends a command with its message instead of a traceback."""
    try:
        yield
    except Exception as error:
        # datasets is slow to import, and only some commands load it
        known = (ValueError, OSError, ModuleNotFoundError)
        if not isinstance(error, known) and not type(error).__module__.startswith("datasets."):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


def _prepare(output: Path, *, plots: bool = False, scikit_learn: bool = False) -> None:
    """Creates an output folder and looks for what is needed, before any work."""
    try:
        if plots:
            import matplotlib  # noqa: F401
        if scikit_learn:
            import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"This command needs {error.name}: pip install 'eblora-hf[demo]'") from error
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {output}: {error}") from error


def _numbers(text: str, option: str, lowest: int, highest: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and lowest <= int(part) <= highest for part in parts) or len({*parts}) < len(parts):
        raise ValueError(
            f"{option} {text!r}: expected different numbers from {lowest} to {highest}, separated by commas."
        )
    return [int(part) for part in parts]


def _cells(spectrum: Any) -> tuple[str, str, str]:
    shown = [f"{ratio:.3f}" for ratio in spectrum.sigma_ratio[:_SHOWN]]
    ratios = " ".join([*shown, "…"] if len(spectrum.sigma_ratio) > _SHOWN else shown)
    return f"{spectrum.top_energy:.3f}", f"{spectrum.effective_rank:.2f}", ratios


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; long cells are folded."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(*(Column(name, overflow="fold") for name in columns), title=title or None)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
