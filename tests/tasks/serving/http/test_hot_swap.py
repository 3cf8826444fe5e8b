"""Promotions, rollbacks and take-downs while four clients ask: no answer is mixed, none fails."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from flows.indexing import rebuild_index
from flows.training import train_rank_head
from storage_schemas.publishing.serving import promote_index
from storage_schemas.snapshots.published import read_published
from storage_schemas.workspace import Workspace
from tasks.distilling.versions import load_trained_head
from tasks.inputs.features import load_features
from tasks.inputs.queries import load_queries
from tasks.serving.attributor import Attributor
from tasks.serving.http.keys import add_key
from tasks.serving.http.settings import ServiceSettings
from tests.tasks.serving.http.conftest import serving
from tests.tasks.serving.http.running import running
from tests.tasks.whole_runs import SAMPLES, WholeRun
from tests.tasks.without_prefect import without_prefect

CLIENTS, K = 4, 6
pytestmark = pytest.mark.integration


@dataclass
class Two:
    """A workspace of its own with two indexes, the first of which is served.

    orders: for each index and query all train_ids by the head's cosine, by NumPy.
    """

    workspace: Workspace
    versions: list[str]
    orders: dict[tuple[str, str], list[int]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def built(similar: WholeRun, tmp_path_factory: pytest.TempPathFactory) -> Two:
    root = tmp_path_factory.mktemp("two") / "workspace"
    shutil.copytree(similar.workspace.root, root)
    config = similar.config.model_copy(update={"workspace": str(root)})
    config = config.model_copy(update={"head": config.head.model_copy(update={"seed": 5})})
    with without_prefect():
        head = train_rank_head(config, similar.curation.ranks.key).artifact
        index = rebuild_index(config, head.key).artifact
    found = Two(Workspace.at(root), [similar.index.artifact.key, index.key])
    artifacts, context = similar.run.artifacts, similar.context
    phi, asked = (load_features(context, artifacts[name], artifacts["samples"]) for name in ("samples", "queries"))
    for version, path in zip(found.versions, (similar.head.artifact.path, head.path), strict=True):
        trained = load_trained_head(path)
        cosines = trained.queries(asked).numpy() @ trained(phi).numpy().T
        for query, row in zip(load_queries(artifacts["queries"]), cosines, strict=True):
            found.orders[version, query.query_id] = np.argsort(-row, kind="stable").tolist()
    return found


@pytest.fixture
def two(built: Two, tmp_path: Path) -> Two:
    """The same, for one test alone."""
    root = tmp_path / "workspace"
    shutil.copytree(built.workspace.root, root)
    return replace(built, workspace=Workspace.at(root))


class Asking:
    """One connection that is kept."""

    def __init__(self, url: str, key: str) -> None:
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self.headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        self.connection.request("POST", path, json.dumps(body), self.headers)
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize("changes", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_changes_under_load_fail_nobody_and_mix_nothing(two: Two, tmp_path: Path, changes: int) -> None:
    keys = tmp_path / "keys.json"
    reader, boss = add_key(keys, "reader", "read"), add_key(keys, "boss", "admin")
    names = sorted({query for _, query in two.orders})
    removed: list[int] = []  # in order; what is in it was removed before
    faults: list[str] = []
    seen: dict[str, int] = dict.fromkeys(two.versions, 0)
    over = threading.Event()

    def ask(number: int) -> None:
        client, draw = Asking(url, reader), random.Random(number)
        while not over.is_set():
            name, gone = draw.choice(names), set(removed)
            status, answer = client.post("/v1/attribute", {"query_id": name, "k": K, "around": 0})
            if status != 200:
                faults.append(f"{status} {answer}")
                continue
            version = answer["versions"]["index"]
            seen[version] += 1
            hits = [hit["train_id"] for hit in answer["hits"]]
            fault = wrong(two.orders[version, name], hits, gone, set(removed) | pending)
            if fault:
                faults.append(f"{version} {name}: {fault}")

    pending: set[int] = set()
    with running(tmp_path, "--workspace", str(two.workspace.root), "--keys", str(keys)) as found:
        url = found.url
        clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for each in clients:
            each.start()
        try:
            change(Asking(url, boss), two, changes, removed, pending)
        finally:
            over.set()
            for each in clients:
                each.join(60)
        assert not faults, faults[:3]
        assert all(count > 20 for count in seen.values()), seen
        published = read_published(two.workspace)
        _, now = Asking(url, reader).post("/v1/attribute", {"query_id": names[0]})
        assert now["versions"]["index"] == (published.index or "").rsplit("/", 1)[-1]
        lines = [json.loads(line) for line in Path(f"{keys}.audit.jsonl").read_text().splitlines()]
        assert {line["caller"] for line in lines} == {"boss"}
        assert sum(line["outcome"] == "done" for line in lines) == changes
        assert "Traceback" not in found.log.read_text()


def change(boss: Asking, two: Two, changes: int, removed: list[int], pending: set[int]) -> None:
    """Promote, roll back and remove, at random but the same each time; every call is answered with success."""
    draw, served = random.Random(1), two.versions[0]
    candidates = iter(draw.sample(range(SAMPLES), 10))
    back: list[str] = []
    for number in range(changes):
        if number % 10 == 5:
            train_id = next(candidates)
            pending.add(train_id)
            status, told = boss.post(f"/v1/samples/{train_id}:remove", {"reason": "a test"})
            assert status == 200 and train_id in told["removed"], told
            removed.append(train_id)
        elif back and draw.random() < 0.4:
            status, told = boss.post("/v1/indexes:rollback", None)
            served = back.pop()
            assert status == 200 and told["index"] == served, told
        else:
            back.append(served)
            served = next(version for version in two.versions if version != served)
            status, told = boss.post(f"/v1/indexes/{served}:promote", {"force": True})
            assert status == 200 and told["versions"]["index"] == served, told


def wrong(order: list[int], hits: list[int], gone: set[int], maybe: set[int]) -> str:
    """Say what is wrong with hits, of which `gone` were removed before and `maybe` may be by now; empty: nothing."""
    if named := gone & set(hits):
        return f"names {named}, removed before"
    places = [order.index(each) for each in hits]
    if places != sorted(places) or len(set(hits)) != len(hits):
        return f"{hits} are not in the order of this head"
    left_out = set(order[: places[-1] + 1]) - set(hits)
    if left_out - maybe or len(hits) != K:
        return f"{hits} leave out {left_out - maybe}"
    return ""


def test_a_version_whose_encoders_are_the_served_ones_loads_no_encoder(two: Two) -> None:
    before = Attributor(two.workspace)
    promote_index(two.workspace, two.versions[1], force=True)
    after = Attributor(two.workspace)
    assert before.versions.head != after.versions.head
    pairs = list(zip(before.fast.encoders, after.fast.encoders, strict=True))
    assert pairs and all(old is new for old, new in pairs)


def test_administrators_alone_change_anything(two: Two, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    reader, boss = add_key(keys, "reader", "read"), add_key(keys, "boss", "admin")
    calls: list[tuple[str, Any]] = [
        ("/v1/samples/23:remove", {"reason": "x"}),
        (f"/v1/indexes/{two.versions[1]}:promote", {"force": True}),
        ("/v1/indexes:rollback", None),
    ]
    before = read_published(two.workspace)
    root = str(two.workspace.root)
    with serving(ServiceSettings(workspace=root, poll_seconds=0.05)) as client:
        for path, body in calls:
            assert client.post(path, json=body).status_code == 403
    with serving(ServiceSettings(workspace=root, keys=str(keys), poll_seconds=0.05)) as client:
        for path, body in calls:
            assert client.post(path, json=body).status_code == 401
            refused = client.post(path, json=body, headers={"x-api-key": reader})
            assert refused.status_code == 403 and "scope admin" in refused.json()["error"]
        assert read_published(two.workspace) == before
        mine = {"x-api-key": boss}
        assert client.post("/v1/indexes/nothing:promote", headers=mine).status_code == 409
        assert client.post("/v1/samples/99999:remove", json={"reason": "x"}, headers=mine).status_code == 404
        assert client.post("/v1/samples/1:remove", json={"reason": " "}, headers=mine).status_code == 422
        gone = client.post("/v1/samples/23:remove", json={"reason": "x"}, headers=mine)
        assert gone.status_code == 200
        for path in ("/v1/samples/23", "/v1/samples/23/image", "/v1/samples/23/image?size=16"):
            assert client.get(path, headers=mine).status_code == 410
        again = client.post("/v1/samples/23:remove", json={"reason": "x"}, headers=mine).json()
        assert (again["record"], again["removed"]) == (None, []) and again["already"]["23"] > 0
    lines = [json.loads(line) for line in Path(f"{keys}.audit.jsonl").read_text().splitlines()]
    assert [(line["action"], line["outcome"]) for line in lines][:2] == [
        ("promote nothing", "begun"),
        ("promote nothing", "refused"),
    ]
    assert all(line["caller"] == "boss" for line in lines)
