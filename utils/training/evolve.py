"""`train.py --evolve`: a search over hyper-parameters whose trials are trainings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.cli import processes
from utils.darknet import cfg as cfg_file
from utils.errors import InputError
from utils.model_files import ModelFiles
from utils.report.run_dir import RunDirectory
from utils.training.resumed import START
from utils.training.search import Search, Watch
from utils.training.settings import Hyperparameters


def run_search(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Search from the hyper-parameters of a plan on; the best ones are in the run directory's hyp.yaml.

    Args:
        plan: fields of TrainPlan, for one training; `resume` is the folder of a search.

    Returns:
        The values of `train.py --evolve --json`.

    Raises:
        InputError: there are no pictures to evaluate on, or several processes.
    """
    if plan["data"].valid is None:
        raise InputError(f"--evolve: {plan['data'].path} names no valid pictures; the trials are compared on them")
    if processes() > 1:
        raise InputError("--evolve: trains in one process; start it without torchrun")
    settings = plan["settings"]

    def train(hyp: Hyperparameters, folder: Path, watch: Watch) -> dict[str, Any]:
        from utils.training.workflow import TrainPlan, run_training

        return run_training(TrainPlan(**{**plan, **_trial(hyp, folder)}), watch)

    with _run(plan).until("trial-*/results.csv", "trial-*/weights/last.pt") as run:
        _describe(run, plan)
        trials = plan["args"]["evolve"]
        search = Search(run.path, plan["hyp"], trials, settings.epochs, settings.seed, prune=settings.test)
        return search.run(train)


def search_summary(document: Mapping[str, Any]) -> str:
    """The result in words."""
    start = document["start_fitness"]
    states = ", ".join(f"{document[key]} {key.replace('_', ' ')}" for key in ("complete", "given_up", "failed"))
    return (
        f"best of {document['trials']} trials ({states}) is {document['best_trial']}: fitness "
        f"{document['fitness']:.4f}, the first one's {'none' if start is None else f'{start:.4f}'}\n"
        f"{document['run_dir']}/hyp.yaml\n{document['best']}"
    )


def _run(plan: Mapping[str, Any]) -> RunDirectory:
    """The run directory of the search, a new one or that of --resume."""
    if plan["resume"] is not None:
        return RunDirectory(plan["resume"])
    return RunDirectory.create(plan["project"], plan["name"], exist_ok=plan["exist_ok"])


def _describe(run: RunDirectory, plan: Mapping[str, Any]) -> None:
    """Write all that an interrupted search goes on from."""
    if plan["resume"] is not None:
        run.write_yaml("args.yaml", plan["args"])
        return
    values = plan["hyp"].flat
    run.describe(args=plan["args"], hyp=values, cfg=cfg_file.format_network(plan["files"].network))
    run.write_yaml(START, values)


def _trial(hyp: Hyperparameters, folder: Path) -> dict[str, Any]:
    """What a trial's plan has of its own; it goes on where it was interrupted."""
    own = {"hyp": hyp, "project": folder.parent, "name": folder.name, "exist_ok": True, "resume": None}
    if (folder / "weights" / "last.pt").is_file():
        own |= {"resume": folder, "files": ModelFiles(cfg_file.load(folder / "model.cfg"), None)}
    return own
