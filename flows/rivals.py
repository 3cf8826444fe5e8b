"""Rivals: other teachers, each scored as a run of its own on the samples and queries of the run that is judged."""

from __future__ import annotations

import logging
from dataclasses import replace

from fastgda_core.errors import UsageError
from flows.curation import curate
from storage_schemas.runs.rivals import RivalRecord, read_rivals, write_rivals
from tasks import logs
from tasks.artifact import Made
from tasks.execution.outcomes import RunCancelled, RunIncomplete
from tasks.execution.rivals import rival_names
from tasks.progress import console
from tasks.teaching.run import Run

log = logging.getLogger("fastgda.judging")


def score_rivals(run: Run) -> list[Made]:
    """Score every rival of a run, and write down where its scores are; what is there already is reused.

    One that is refused or fails is named and does not stop the others.

    Raises:
        RunCancelled: somebody asked for it.
    """
    config = run.config
    made: list[Made] = []
    found: dict[str, RivalRecord] = {}
    for name in rival_names(config):
        try:
            curation = curate(config.of_rival(name))
        except RunCancelled:
            raise
        except Exception as error:  # its flow run has the traceback; the next rival is another method
            found[name] = RivalRecord(run=getattr(error, "run", ""), failed=_told(error))
            _say_failed(run, name, error)
        else:
            found[name] = RivalRecord(run=curation.run.name, snapshot=curation.ranks.key)
            new = [each.seconds for each in curation.made if not each.reused]
            made.append(Made(replace(curation.ranks, name=f"rival {name}"), sum(new), reused=not new))
        write_rivals(run.workspace, run.name, found)
    if not found and read_rivals(run.workspace, run.name):
        write_rivals(run.workspace, run.name, {})
    return made


def _told(error: Exception) -> str:
    known = isinstance(error, (UsageError, RunIncomplete))
    return str(error) if known else f"{type(error).__name__}: {error}"


def _say_failed(run: Run, name: str, error: Exception) -> None:
    with logs.about(run=run.name):
        log.error("rival %s failed: %s", name, error)
    console.print(f"rival {name} has no scores: {_told(error)}", markup=False, highlight=False, soft_wrap=True)
