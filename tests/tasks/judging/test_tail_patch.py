"""What a step on the samples that a method names does to a query, in a run that no model is trained again for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgda_core.errors import UsageError
from fastgda_core.evaluation.retraining import query_losses
from fastgda_core.evaluation.tail_patch import TailPatch
from fastgda_core.teachers.micro_batch import MicroBatch
from storage_schemas import tables
from storage_schemas.snapshots.snapshots import read_influence
from tasks.inputs.queries import load_queries
from tasks.inputs.samples import sample_images, samples_table
from tasks.judging import tail_patch
from tasks.judging.kept_checks import read_checks
from tasks.judging.methods import RANDOM, UNTUNED
from tasks.judging.tail_patch import FALL, RISE, check_tail_patch
from tasks.watching.trust import TEACHER
from tests.tasks.whole_runs import WholeRun


def test_the_models_step_is_on_what_the_method_names(similar: WholeRun) -> None:
    assert similar.config.judge is None
    (check,) = (each for each in read_checks(similar.workspace, similar.run.name) if each.name == "tail-patch")
    rows = tables.read(check.path, tables.METRICS).to_pylist()
    found = {(row["metric"], row["space"], row["cutoff"]): row for row in rows if not row["query_id"]}
    assert found.keys() == {(m, s, k) for m in (FALL, RISE) for s in (TEACHER, UNTUNED, RANDOM) for k in (1, 3)}
    assert all(row["queries"] == 1 for row in found.values())

    asked = next(each for each in load_queries(similar.run.artifacts["queries"]) if each.split == "test")
    scored = read_influence(similar.workspace, similar.curation.ranks.key, [asked.query_id]).to_pylist()
    best = sorted(row["train_id"] for row in sorted(scored, key=lambda row: -row["score"])[:3])
    model, path = similar.context.model(), similar.run.artifacts["samples"].path
    captions = [several[0] for several in samples_table(path)["captions"].take(best).to_pylist()]
    patch = TailPatch(model, seed=0, pairs=2, micro_batch=MicroBatch(64))
    step = patch.step(
        torch.tensor(best), model.encode_images(sample_images(path, best)), model.encode_captions(captions)
    )

    def loss(denoiser: torch.nn.Module) -> torch.Tensor:
        latent, words = model.encode_images([asked.image])[0], model.encode_captions([asked.caption])
        how = {"owner": asked.owner, "seed": 0, "pairs": 4, "micro_batch": MicroBatch(64)}
        return query_losses(model, denoiser, latent, words, **how)[0].mean()

    length, before = similar.config.tail_patch.length, loss(model.denoiser)
    fall, rise = ((patch.after(step, share, loss) - before) / before for share in (length, -length))
    assert found[FALL, TEACHER, 3]["value"] == pytest.approx(-float(fall), rel=1e-2, abs=1e-6)
    assert found[RISE, TEACHER, 3]["value"] == pytest.approx(float(rise), rel=1e-2, abs=1e-6)
    assert found[FALL, TEACHER, 1]["value"] != found[FALL, TEACHER, 3]["value"]
    assert check_tail_patch.fn(similar.run, similar.curation.ranks).reused


def test_another_step_is_measured_anew(similar: WholeRun) -> None:
    longer = similar.config.tail_patch.model_copy(update={"length": 0.1, "k": [1]})
    config = similar.config.model_copy(update={"tail_patch": longer})
    run = replace(similar.run, context=replace(similar.context, config=config))
    made = check_tail_patch.fn(run, similar.curation.ranks)
    assert not made.reused


def test_samples_that_cannot_be_read_are_no_lesson(similar: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    read = tail_patch.readable_images
    monkeypatch.setattr(tail_patch, "readable_images", lambda path, ids: (read(path, ids)[0], {4: "the tar is cut"}))
    train_ids, latents, words = tail_patch._learned(similar.run, [4, 5])
    assert train_ids.tolist() == [5] and len(latents) == len(words["encoder_hidden_states"]) == 1
    with pytest.raises(UsageError, match=r"sample 4 cannot be read \(the tar is cut\): mend it"):
        tail_patch._learned(similar.run, [4])
