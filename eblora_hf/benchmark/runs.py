"""Many runs of the protocol: in parallel processes, one line of JSON each, and nothing is run twice."""

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..published.identity import describe_base_model
from .digits import steady_cpu
from .protocol import MethodResult, quiet, run_method
from .report import as_json, package_versions
from .suite import Problem, Suite
from .suites import SUITES


@dataclasses.dataclass(frozen=True)
class Run:
    """
    One run of the protocol.

    Args:
        suite (`str`): One of `SUITES`.
        method (`str`): One of the suite's.
        seed (`int`): Seed of data split, base model and training.
        tasks (`tuple[str, ...]`): Names of its tasks.
        rank (`int`): LoRA rank of each task.
        settings (`dict`): Learning rate and options of the method.
        measured_on (`str`, defaults to `"test"`): The split that is measured.
    """

    suite: str
    method: str
    seed: int
    tasks: tuple[str, ...]
    rank: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    measured_on: str = "test"

    def describe(self) -> dict[str, Any]:
        """As the first keys of its line."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


_KEYS = {field.name for field in (*dataclasses.fields(Run), *dataclasses.fields(MethodResult))}
_KEYS |= {"base_model", "versions"}


def tuned_run(suite: Suite, method: str, seed: int, tasks: tuple[str, ...], rank: int, tuned: dict[str, dict]) -> Run:
    """A run on the test split, with the settings that tuning gave a method."""
    settings = tuned.get(method) or suite.tuning.get(method, {}).get("tuned", {})
    return Run(suite.name, method, seed, tasks, rank, settings)


def read_results(path: Path) -> list[dict[str, Any]]:
    """
    The lines of a results file; a last line that a killed process left half-written is taken off the file.

    Raises:
        ValueError: if a whole line is not JSON, or not of a run; or if those of a seed are of several base models.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    results = []
    for number, line in enumerate(lines):
        if not line.endswith(b"\n"):  # only the last one can be without an end
            os.truncate(path, path.stat().st_size - len(line))
            break
        try:
            result = json.loads(line)
            missing = sorted(_KEYS - set(result))
            if missing:
                raise ValueError(f"{', '.join(missing)} is missing")
            results.append(result)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Line {number + 1} of {path} is not a result ({error}). Delete the line, or use another folder."
            ) from error
    for result in results:
        _check_base(result, result["base_model"], results, path)
    return results


def _check_base(what: dict[str, Any], base_model: str, results: Iterable[dict[str, Any]], path: Path) -> None:
    """Raises if `path` has results of the same suite, seed and versions on another base model: they do not compare."""
    same = ("suite", "seed", "versions")
    for result in results:
        if result["base_model"] != base_model and all(result[key] == what[key] for key in same):
            raise ValueError(
                f"{path} has results of seed {what['seed']} on another base model ({result['base_model']!s:.12}… of "
                f"{result['method']}, not {base_model!s:.12}…): another processor trains another from the same seed. "
                "Use another folder."
            )


def run_all(
    runs: Iterable[Run],
    path: Path,
    bases: Path,
    workers: int,
    done: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """
    Makes the runs that `path` does not hold yet, in processes of one thread each, and appends a line per run.

    Args:
        runs (iterable of [`Run`]): The runs.
        path (`Path`): The results file.
        bases (`Path`): Folder for what the runs of a seed share, pre-trained models.
        workers (`int`): Number of processes.
        done (`Callable`): Called for each run that is there.

    Returns:
        `list[dict]`: The lines of these runs, in their order.

    Raises:
        RuntimeError: if a run failed; those finished before are kept.
        ValueError: if the results that are there cannot be read, or are of another base model.
    """
    runs = list(runs)
    known = {_key(result): result for result in read_results(path)}
    versions = {"versions": package_versions()}  # numbers of other versions are not mixed with these
    missing = [run for run in runs if _key(run.describe() | versions) not in known]
    for _ in range(len(runs) - len(missing)):
        done()
    if missing:
        # spawned, not forked: torch's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent) as pool:
            try:
                shared = sorted({(run.suite, run.seed) for run in missing})
                prepared = {pool.submit(_prepare, *what, bases): f"pre-training {what}" for what in shared}
                for what in _finished(prepared):
                    _check_base(what | versions, what["base_model"], known.values(), path)
                futures = {
                    pool.submit(_execute, run, bases): f"{run.method}, seed {run.seed}, {run.settings}"
                    for run in missing
                }
                for line in _finished(futures):
                    with path.open("ab") as file:
                        file.write(line)
                        file.flush()
                        os.fsync(file.fileno())
                    known[_key(json.loads(line))] = json.loads(line)
                    done()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [known[_key(run.describe() | versions)] for run in runs]


def _finished(futures: dict[Future, str]) -> Iterator[Any]:
    """What futures return, as they finish; an error says which one failed."""
    for future in as_completed(futures):
        try:
            yield future.result()
        except Exception as error:
            raise RuntimeError(f"The run «{futures[future]}» failed: {error}") from error


def _key(result: dict[str, Any]) -> str:
    names = [*(field.name for field in dataclasses.fields(Run)), "versions"]
    return json.dumps([result[name] for name in names], sort_keys=True)


# ---- in the processes ----


def _die_with_parent() -> None:
    """A killed benchmark leaves no processes behind."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("This is not the process of a pool.")
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare(name: str, seed: int, bases: Path) -> dict[str, Any]:
    """Makes what the runs of a seed share, and says which base model that is."""
    suite = SUITES[name]
    with steady_cpu(), quiet():
        suite.prepare(seed, bases)
        return {"suite": name, "seed": seed, "base_model": _hash(suite.problem(seed, bases, suite.tasks, "test"))}


def _hash(problem: Problem) -> str:
    """Of the base model's weights, but for those of its head, which tasks may have fresh."""
    return str(describe_base_model(problem.model, heads=["classifier"])["weights"])


def _execute(run: Run, bases: Path) -> bytes:
    """The line of a run."""
    suite = SUITES[run.suite]
    with steady_cpu(), quiet():
        problem = suite.problem(run.seed, bases, run.tasks, run.measured_on)
        result = run_method(run.method, suite, problem, run.seed, settings=run.settings, rank=run.rank)
    line = run.describe() | as_json(result) | {"base_model": _hash(problem), "versions": package_versions()}
    return (json.dumps(line, allow_nan=False) + "\n").encode()
