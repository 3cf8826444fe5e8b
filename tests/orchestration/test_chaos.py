"""Workers, coordinator and server killed at random, devices, network and data that fail: every planned row, once."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from storage_schemas.runs.ledger import run_names
from storage_schemas.sql.views import query
from storage_schemas.workspace import Workspace
from tasks.config.files import load_config
from tasks.context import open_context
from tasks.inputs.samples import ingest_samples
from tests import tiny, warm
from tests.orchestration.chaos_case import FAULTS, QUERIES, SAMPLES, lay_out, mend, rot
from tests.prefect_processes import BIN, ROOT, Prefect, marked, prefect_server

NOT_A_NUMBER, ROTTEN = 17, 7  # train_ids, of which the Fisher draws none


BLOWS = ("job", "coordinator", "server", "worker", "worker and job", "hang")


class Chaos:
    """A curation under way, and what befalls it."""

    def __init__(self, server: Prefect, config: Path, faults: Path, chance: random.Random) -> None:
        self.server, self.config, self.faults, self.chance = server, config, faults, chance
        self.coordinators = 0
        for name in ("gpu-1", "gpu-2"):
            self.start_worker(name)
        self.start_coordinator()

    def start_worker(self, name: str) -> None:
        path = f"{FAULTS}:{ROOT}"
        self.server.start_worker(name, "fastgda-gpu", extra={"FAULTS": str(self.faults), "PYTHONPATH": path})

    def start_coordinator(self) -> None:
        self.coordinators += 1
        self.server.start(self.coordinator, str(BIN / "fastgda"), "curate", str(self.config))

    @property
    def coordinator(self) -> str:
        return f"coordinator-{self.coordinators}"

    def ended(self) -> int | None:
        """The coordinator's exit code, if it is over."""
        return self.server.processes[self.coordinator].poll()

    def strike(self, blow: str) -> None:
        """What a person or a supervisor would start again is started again."""
        if blow == "job":
            jobs = marked(str(self.faults), "prefect.engine") + marked(str(self.faults), "prefect.flow_engine")
            for pid in jobs[:1]:
                os.kill(pid, signal.SIGKILL)
        elif blow == "coordinator":
            self.server.kill(self.coordinator)
            self.start_coordinator()
        elif blow == "server":
            self.server.kill("server")
            time.sleep(self.chance.uniform(0, 3))
            self.server.start_server()
        elif blow == "hang":
            (self.faults / f"hang-{time.monotonic_ns()}").touch()
        else:
            name = self.chance.choice(["gpu-1", "gpu-2"])
            self.server.kill(name, group=blow == "worker and job")
            self.start_worker(name)


def run_to_its_end(*arguments: str, environment: dict[str, str]) -> None:
    done = warm.run(arguments, environment)
    assert done.returncode == 0, done.stderr


def scores(folder: Path) -> dict[tuple[str, int], float]:
    rows = query(folder / "workspace", "SELECT query_id, train_id, score FROM scores").to_pylist()
    found = {(row["query_id"], row["train_id"]): row["score"] for row in rows}
    assert len(found) == len(rows), "a pair occurs twice"
    return found


@pytest.mark.parametrize(
    ("shards", "blows"), [(8, 3), pytest.param(500, 18, marks=pytest.mark.slow)], ids=["8 shards", "500 shards"]
)
def test_every_planned_row_but_those_of_quarantined_samples_whatever_dies(
    tmp_path: Path, model_folder: Path, shards: int, blows: int
) -> None:
    chance, faults, user = random.Random(shards), tmp_path / "faults", tmp_path / "user"
    faults.mkdir()
    patience = {"retry_delay": 0.1, "retries": 8, "max_deaths": 20, "timeout_floor": 20}
    patience |= {"lost_after": 20, "start_within": 60}
    rate = 24 if shards < 100 else 40
    config = lay_out(user, model_folder, shards=shards, job_minutes=0.1, forwards_per_second=rate, **patience)
    with prefect_server(tmp_path / "server") as server:
        server.deploy(config, "process")  # all that a coordinator starts
        ingest_samples.fn(open_context(load_config(config)))
        whole = rot(user / "data" / "shapes-0.tar", tiny.draw(ROTTEN)[0])
        likely = {"out_of_memory": 0.1, "connection": 0.03, "device": 0.004, "slow": 0.1, "slow_seconds": 0.5}
        (faults / "faults.json").write_text(json.dumps({**likely, "nan": NOT_A_NUMBER}))
        (faults / "reset-1").touch()  # so that there is one however few shards there are
        chaos = Chaos(server, config, faults, chance)
        coming = list(itertools.islice(itertools.cycle(BLOWS), blows))
        pause = (2, 10) if shards < 100 else (5, 30)  # so that most of them fall while scores are made
        struck, due = 0, time.monotonic() + 25
        while (code := chaos.ended()) is None:
            if coming and time.monotonic() > due:
                chaos.strike(coming.pop(0))
                struck, due = struck + 1, time.monotonic() + chance.uniform(*pause)
            time.sleep(0.1)
        assert code == 0, server.log(chaos.coordinator)
        assert struck >= blows // 3

        planned = {(f"q{number:04d}", train) for number in range(QUERIES) for train in range(SAMPLES)}
        bad = {NOT_A_NUMBER, ROTTEN}
        assert scores(user).keys() == {pair for pair in planned if pair[1] not in bad}
        named = query(user / "workspace", "SELECT train_id, reason FROM quarantined_samples").to_pylist()
        reasons = {row["train_id"]: row["reason"] for row in named}
        assert reasons.keys() == bad
        assert "s0007" in reasons[ROTTEN] and "nan" in reasons[NOT_A_NUMBER]
        attempts = query(user / "workspace", "SELECT max(attempts) AS n FROM shards").to_pylist()
        assert attempts[0]["n"] > 1

        mend(user / "data" / "shapes-0.tar", whole)
        (faults / "faults.json").write_text("{}")
        (run,) = run_names(Workspace(user / "workspace"))
        run_to_its_end("retry", run, "--workspace", str(user / "workspace"), environment=server.environment)
        calm = lay_out(tmp_path / "calm", model_folder, shards=shards, runner="local")
        run_to_its_end("curate", str(calm), environment=server.environment)

    found, expected = scores(user), scores(tmp_path / "calm")
    assert found.keys() == expected.keys() == planned
    # A halved micro-batch rounds otherwise in the last digits of float32.
    assert all(found[pair] == pytest.approx(expected[pair], rel=1e-3, abs=1e-9) for pair in planned)
    assert not query(user / "workspace", "SELECT * FROM quarantined_samples").num_rows
