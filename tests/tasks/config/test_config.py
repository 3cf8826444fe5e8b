from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from fastgda_core.errors import UsageError
from tasks.config.files import load_config
from tasks.config.inputs import SplitConfig
from tasks.config.judging import TrainerConfig
from tasks.config.pipeline import PipelineConfig, check_sizes
from tasks.demo.openmoji import CONFIG, list_openmoji
from tasks.inputs.tars import find_shards
from tests.tasks.configs import ABSENT, document
from tests.tiny import sample_members, write_tar


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document(**changes)), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The message of a config that is refused: plain lines that each name the file."""
    with pytest.raises(UsageError) as error:
        load_config(path)
    message = str(error.value)
    for noise in ("Traceback", "validation error", "pydantic", "Value error", "[type="):
        assert noise not in message
    assert all(str(path) in line for line in message.splitlines())
    return message


def test_the_demo_config_is_valid_and_asks_for_no_training_caption() -> None:
    config = load_config(CONFIG)
    captions = config.queries.captions
    assert captions is not None
    assert len(captions) == config.queries.split.total
    assert len({caption.lower() for caption in captions}) == len(captions)
    known = {caption for image in list_openmoji() for caption in image.captions}
    assert len(known) > 3000
    assert known.isdisjoint(caption.lower() for caption in captions)


def test_a_trainer_runs_beside_the_config_and_is_stored_with_its_command(tmp_path: Path) -> None:
    words = ["train", "{removed}", "{seed}", "--to={output}", "{device} {other}"]
    for given, folder in (({}, tmp_path), ({"folder": "trainer"}, tmp_path / "trainer")):
        config = load_config(write(tmp_path, judge={"retrain": {"command": words, **given}}))
        assert config.judge is not None and isinstance(config.judge.retrain, TrainerConfig)
        assert config.judge.retrain.folder == folder
        told = config.judge.retrain.words(removed="a b.csv", seed=3, output="/x", device="cuda:1")
        assert told == ["train", "a b.csv", "3", "--to=/x", "cuda:1 {other}"]
        assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_stored_config_loads_again_as_it_was() -> None:
    config = load_config(CONFIG)
    assert config.teacher.timestep_list is not None
    assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_small_config_is_read_with_its_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config.name == "tiny"
    assert config.teacher.timesteps == 10
    assert sorted(config.queries.split.assign(seed=0)) == ["test", "train", "validation"]


@pytest.mark.parametrize(("train", "validation", "test"), [(36, 4, 8), (1, 1, 1), (3, 5, 2), (7, 1, 3)])
def test_each_split_is_drawn_evenly_along_the_list_of_queries(train: int, validation: int, test: int) -> None:
    split = SplitConfig(train=train, validation=validation, test=test)
    names = split.assign(seed=3)
    assert {name: names.count(name) for name in names} == {"train": train, "validation": validation, "test": test}
    edges = [len(names) * edge // test for edge in range(test + 1)]
    assert all(names[start:stop].count("test") == 1 for start, stop in itertools.pairwise(edges))
    assert names == split.assign(seed=3)


def test_relative_paths_are_seen_from_the_folder_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(folder, queries__captions=ABSENT, queries__shards="queries/*.tar")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(Path("../configs/config.yaml"))
    assert config.workspace == str(folder / "made" / "workspace")
    assert config.model.folder == folder / "model"
    assert config.data.shards == f"{folder}/shards/*.tar"
    assert config.queries.shards == f"{folder}/queries/*.tar"


def test_absolute_paths_stay(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, workspace="/big/disk", model__folder="/models/sd", data__shards="/d/*.tar"))
    assert config.workspace == "/big/disk"
    assert config.model.folder == Path("/models/sd")
    assert config.data.shards == "/d/*.tar"


@pytest.mark.parametrize("name", ["my data", "it's [mine]", "a*b"])
def test_shards_are_found_whatever_the_folder_of_the_config_is_called(tmp_path: Path, name: str) -> None:
    shard = write_tar(tmp_path / name / "shards" / "a.tar", sample_members(range(1)))
    config = load_config(write(tmp_path / name))
    assert find_shards(config.data.shards, "data.shards") == [shard]


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"teacher__alhpa": 1.0}, "teacher.alhpa", "no such field: did you mean alpha?"),
        ({"tracher": {}}, "tracher", "no such field: did you mean teacher?"),
        ({"queries__split__tests": 1}, "queries.split.tests", "no such field: did you mean test?"),
        ({"execution": {"pools": [{"slot": 1}]}}, "execution.pools.0.slot", "no such field: did you mean slots?"),
        ({"zzz": 1}, "zzz", "no such field: correct the spelling or remove it"),
        ({"queries__split": 5}, "queries.split", "valid dictionary"),
        ({"queries__split": None}, "queries.split", "valid dictionary"),
        ({"teacher__alpha": ABSENT}, "teacher.alpha", "is missing"),
        ({"evaluation": ABSENT}, "evaluation", "is missing"),
        ({"queries__split__test": ABSENT}, "queries.split.test", "is missing"),
        ({"teacher__name": "guesswork"}, "teacher.name", "abu_plus"),
        ({"features": {"space": "crystal_ball"}}, "features.space", "crystal_ball"),
        ({"features": {"space": "minilm_text+crystal_ball"}}, "features.space", "crystal_ball"),
        ({"features": {"space": ""}}, "features.space", "known are pixel, "),
        ({"teacher__timesteps": -1}, "teacher.timesteps", "greater than"),
        ({"queries__split__train": -1}, "queries.split.train", "greater than"),
        ({"teacher__draws": 0}, "teacher.draws", "greater than"),
        ({"teacher__alpha": 0}, "teacher.alpha", "greater than"),
        ({"teacher__alpha": float("nan")}, "teacher.alpha", "finite"),
        ({"teacher__alpha": float("inf")}, "teacher.alpha", "finite"),
        ({"teacher__alpha": "small"}, "teacher.alpha", "number"),
        ({"model__micro_batch": 2.5}, "model.micro_batch", "integer"),
        ({"model": None}, "model", "valid dictionary"),
        ({"name": "Not a Name"}, "name", "pattern"),
        ({"device": "abacus"}, "device", "auto"),
        ({"queries__split__train": 2}, "queries", "3 captions but the split adds up to 4"),
        ({"queries__captions": ["a", "b", "a"]}, "queries", "twice"),
        ({"queries__captions": ["a", "b", "  "]}, "queries", "empty"),
        ({"queries__captions": ["a", "b", 3]}, "queries.captions.2", "string"),
        ({"queries__captions": ABSENT}, "queries", "either captions"),
        ({"queries__shards": "queries/*.tar"}, "queries", "either captions"),
        ({"queries__captions": ABSENT, "queries__shards": ""}, "queries", "either captions"),
        ({"candidates__k": 3}, "candidates", "k belongs to policies top_k and pooled"),
        ({"candidates__policy": "top_k"}, "candidates", "k belongs to policies top_k and pooled"),
        ({"candidates": {"policy": "top_k", "k": 1}}, "candidates.k", "greater than"),
        ({"candidates": {"policy": "pooled"}}, "candidates", "k belongs to policies top_k and pooled"),
        ({"candidates": {"policy": "top_k", "k": 5, "scored": 6}}, "candidates", "at most k"),
        ({"candidates": {"policy": "pooled", "k": 5, "scored": 3}}, "candidates", "scored belongs to policy top_k"),
        ({"candidates__space": "crystal_ball"}, "candidates.space", "crystal_ball"),
        ({"teacher__layers": "norms"}, "teacher.layers", "cross-attn-kv"),
        ({"teacher__damping": 0}, "teacher.damping", "greater than"),
        ({"teacher__precision": "bf16"}, "teacher", "difference of two losses"),
        ({"teacher__precision": "tf32", "teacher__name": "abu"}, "teacher", "difference of two losses"),
        ({"teacher__precision": "int4"}, "teacher.precision", "bf16"),
        ({"teacher__antithetic": True}, "teacher", "make draws even"),
        ({"teacher__timestep_list": []}, "teacher.timestep_list", "at least 1"),
        ({"teacher__timestep_list": [100, 100]}, "teacher", "names a timestep twice"),
        ({"teacher__timestep_list": [100], "teacher__timesteps": 1}, "teacher", "remove one"),
        ({"teacher__timestep_weights": [1.0]}, "teacher", "give one for each"),
        ({"teacher__timestep_list": [1, 2], "teacher__timestep_weights": [1]}, "teacher", "give one for each"),
        ({"teacher__timestep_list": [1], "teacher__timestep_weights": [0]}, "teacher.timestep_weights.0", "greater"),
        *(
            ({"teacher__agreement": 0.9, f"teacher__{name}": value}, "teacher", f"{name} is of a noise plan")
            for name, value in {
                "timesteps": 5,
                "draws": 2,
                "first_timestep": 3,
                "timestep_list": [100],
                "antithetic": True,
            }.items()
        ),
        ({"teacher__agreement": 1}, "teacher.agreement", "less than 1"),
        ({"teacher__agreement": 0}, "teacher.agreement", "greater than 0"),
        ({"teacher": {"name": "similarity", "agreement": 0.9}}, "teacher", "no setting of teacher similarity"),
        ({"teacher": {"name": "nda", "alpha": 1e-4}}, "teacher", "alpha is no setting of teacher nda"),
        ({"teacher__patch_sizes": [3]}, "teacher", "patch_sizes is no setting of teacher abu_plus"),
        ({"teacher": {"name": "nda", "patch_sizes": [3, 3]}}, "teacher.patch_sizes", "name a size twice"),
        ({"teacher": {"name": "nda", "patch_sizes": []}}, "teacher.patch_sizes", "at least 1"),
        ({"teacher": {"name": "nda", "precision": "float64"}}, "teacher", "precision is no setting of teacher nda"),
        ({"features": {"space": "abc_clip"}}, "config", "features.weights.abc_clip is missing: name a folder"),
        ({"candidates__space": "abc_dino"}, "config", "features.weights.abc_dino is missing: name a folder"),
        ({"self_consistency": {"queries": 2}}, "config", "self_consistency.queries is 2"),
        ({"judge": {"retrain": {"steps": 1}, "again": 40}}, "judge", "from 3 to the 32 subsets"),
        ({"judge": {"retrain": {"steps": 1}, "leave_out": {"targets": 1}}}, "config", "some are left as controls"),
        ({"judge": {"retrain": {}}}, "judge.retrain.steps", "is missing"),
        ({"judge": {"retrain": {"command": ["train", "{removed}", "{seed}"]}}}, "judge.retrain", "lacks {output}"),
        ({"judge": {"retrain": {"command": []}}}, "judge.retrain.command", "at least 1"),
        ({"judge": {"retrain": {"comand": ["train"], "steps": 1}}}, "judge.retrain.comand", "did you mean command?"),
        (
            {"judge": {"retrain": {"command": ["{removed}{seed}{output}"], "steps": 1, "continued": True}}},
            "judge.retrain",
            "the command says itself how it trains: remove continued, steps, or the command",
        ),
        ({"evaluation__validation_cutoff": 2}, "evaluation", "2 is not among evaluation.cutoffs: add it"),
        ({"evaluation__cutoffs": []}, "evaluation.cutoffs", "at least 1"),
        ({"evaluation__cutoffs": [-5]}, "evaluation.cutoffs.0", "greater than"),
        ({"exact_check": {"queries": 1, "candidates": 3}}, "config", "exact_check"),
        (
            {"exact_check": {"queries": 2, "candidates": 3}, "teacher__name": "abu_plus_first_order"},
            "config",
            "exact_check.queries is 2",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_file(
    tmp_path: Path, changes: dict[str, object], field: str, reason: str
) -> None:
    path = write(tmp_path, **changes)
    message = refusal(path)
    assert message.startswith(f"{path}: {field}: ")
    assert reason in message
    assert len(message.splitlines()) == 1


def test_a_pooled_query_has_the_whole_pool_as_candidates() -> None:
    asked = document(candidates={"policy": "pooled", "k": 2}, evaluation__cutoffs=[1, 8], evaluation__neighbors=3)
    config = PipelineConfig.model_validate(asked)
    check_sizes(config, samples=12)
    check_sizes(config, samples=12, pool=9)
    with pytest.raises(UsageError, match=r"evaluation\.cutoffs is 8 and has to be below a query's 8 candidates"):
        check_sizes(config, samples=12, pool=8)
    with pytest.raises(UsageError, match=r"evaluation\.cutoffs is 8 and has to be below a query's 2 candidates"):
        check_sizes(PipelineConfig.model_validate(document(**{**asked, "candidates": {"policy": "top_k", "k": 2}})), 12)


def test_every_fault_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, teacher__alpha=ABSENT, model__fodler="x", name="NO"))
    assert {line.split(": ")[1] for line in message.splitlines()} == {"teacher.alpha", "model.fodler", "name"}


@pytest.mark.parametrize("content", ["", "just text", "- a\n- list\n", "3", "null"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    assert "not a mapping" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"name: [unclosed", b"a: b: c", b"\xff\xfe\x00\xd8", b"a: !!python/object/apply:os.getcwd []"],
    ids=["unclosed", "two colons", "not text", "object"],
)
def test_a_config_that_is_no_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    assert "not readable YAML" in refusal(path)


def test_keys_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "3: x\n")
    assert "3" in refusal(path)


def test_a_config_that_is_absent_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.yaml")
    assert "Is a directory" in refusal(tmp_path)


def test_a_key_that_is_written_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text()
    first, last = text.splitlines().index("name: tiny") + 1, len(text.splitlines()) + 1
    path.write_text(text + "name: again\n")
    assert f"'name' stands twice, in lines {first} and {last}: remove one" in refusal(path)
    path.write_text(text + "extra: {a: 1, b: 2, a: 3}\n")
    assert f"'a' stands twice, in lines {last} and {last}: remove one" in refusal(path)


def test_what_yaml_merges_in_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, data=ABSENT)
    path.write_text(path.read_text() + "data:\n  <<: {shards: other.tar}\n  shards: shards/*.tar\n")
    assert load_config(path).data.shards == f"{tmp_path}/shards/*.tar"


def test_encoders_of_the_model_have_its_folder_unless_another_is_named(tmp_path: Path) -> None:
    for folder in ("model", "other"):
        (tmp_path / folder).mkdir()
    asked = document(
        features={"space": "pixel+caption_tokens", "weights": {"bottleneck": "other"}}, study={"spaces": ["bottleneck"]}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asked))
    found = load_config(tmp_path / "config.yaml").features.weights
    assert found == {"caption_tokens": str(tmp_path / "model"), "bottleneck": str(tmp_path / "other")}
    assert PipelineConfig.model_validate(document()).features.weights == {}
