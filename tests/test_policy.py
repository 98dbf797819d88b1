"""Policies: which steps reuse, what follows for a layer, and the files they travel in."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnreuse import Policy, hurry, periodic
from attnreuse.policy import Action, load_policy


def strip(policy):
    return "".join("R" if r else "." for r in policy.reuse)


def test_hurry_reuses_latest():
    assert strip(hurry(10, 4, None)) == "......RRRR"
    assert strip(hurry(10, 0, None)) == ".........."
    assert strip(hurry(10, 9, None)) == ".RRRRRRRRR"


def test_hurry_bounds_the_age_of_maps():
    assert strip(hurry(10, 5, max_age=1)) == ".R.R.R.R.R"
    assert strip(hurry(10, 3, max_age=1)) == ".....R.R.R"
    assert strip(hurry(10, 5, max_age=2)) == "...R.RR.RR"


@pytest.mark.parametrize(("reuse", "age"), [(0, 1), (1, 1), (5, 1), (6, 2), (7, 3), (8, 4), (9, 9)])
def test_hurry_keeps_maps_as_fresh_as_there_is_room_for(reuse, age):
    assert hurry(10, reuse) == hurry(10, reuse, max_age=age)
    if age > 1:
        with pytest.raises(ValueError, match="reuse must be between"):
            hurry(10, reuse, max_age=age - 1)


def test_hurry_by_default_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="reuse must be between 0 and 9 for 10 steps, got 10"):
        hurry(10, 10)


@given(st.integers(1, 60), st.integers(0, 60), st.one_of(st.none(), st.integers(1, 8)))
def test_hurry_keeps_its_word(steps, reuse, max_age):
    room = steps - -(-steps // ((max_age or steps) + 1))
    if reuse > room:
        with pytest.raises(ValueError, match=f"reuse must be between 0 and {room} for {steps} steps"):
            hurry(steps, reuse, max_age)
        return
    row = hurry(steps, reuse, max_age).reuse
    assert sum(row) == reuse
    assert not row[0]
    ages = [len(run) for run in strip(hurry(steps, reuse, max_age)).split(".")]
    assert max(ages) <= (max_age or steps)


def test_periodic():
    assert strip(periodic(7, 3)) == ".RR.RR."
    assert strip(periodic(4, 1)) == "...."
    with pytest.raises(ValueError, match="interval must be a whole number, at least 1, got 0"):
        periodic(4, 0)


def test_layers_capture_only_where_a_reuse_follows():
    actions = [a.value for a in Policy(steps=6, reuse=[0, 0, 1, 1, 0, 1]).actions("any")]
    assert actions == ["compute", "capture", "reuse", "reuse", "capture", "reuse"]
    assert Policy(steps=3, reuse=[0, 0, 0]).actions("any") == [Action.COMPUTE] * 3


def test_rows_by_layer_pattern():
    policy = Policy(steps=3, reuse={"up*": [0, 1, 1], "*attn1": [0, 0, 1]})
    assert policy.row("up.attn1") == (False, True, True)
    assert policy.row("down.attn1") == (False, False, True)
    assert policy.row("down.attn2") == (False, False, False)
    assert policy.reuse_steps == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 3, "reuse": [0, 1]}, "must have 3 entries like steps, got 2"),
        ({"steps": 2, "reuse": [1, 0]}, "must compute at the first step"),
        ({"steps": 2, "reuse": [0, 2]}, "must hold booleans, or the letters"),
        ({"steps": 0, "reuse": []}, "greater than or equal to 1"),
        ({"steps": 1, "reuse": [0], "resue": 1}, "Extra inputs are not permitted"),
    ],
)
def test_policies_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Policy(**fields)


def test_a_file_gives_back_the_policy(tmp_path):
    policy = hurry(20, 10, None).model_copy(
        update={"scheduler": "DDIMScheduler", "resolution": (128, 128), "metrics": {"psnr_db": 40.5}}
    )
    policy.save(tmp_path / "p.json")
    assert Policy.load(tmp_path / "p.json") == policy == load_policy(str(tmp_path / "p.json"))
    by_layer = Policy(steps=2, reuse={"mid*": (False, True)})
    by_layer.save(tmp_path / "l.json")
    assert Policy.load(tmp_path / "l.json") == by_layer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "is not a policy file: Expecting value"),
        (json.dumps({"steps": 3, "reuse": [False, True]}), "must have 3 entries like steps, got 2"),
        (json.dumps({"steps": 1, "reuse": [False], "version": 99}), "version: Input should be 1"),
        (json.dumps([1]), "is not a policy file"),
    ],
)
def test_broken_files_say_what_is_wrong(tmp_path, text, said):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Policy.load(path)


def test_hub_round_trip(tmp_path, monkeypatch):
    """The real calls of huggingface_hub, on a folder in place of the hub."""
    import huggingface_hub

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            (tmp_path / repo_id / path_in_repo).write_bytes(path_or_fileobj)
            return f"commit of {repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **given: None)

    def downloaded(repo_id, name, revision=None, **given):
        revisions.append(revision)
        return str(tmp_path / repo_id / name)

    revisions = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", downloaded)
    assert hurry(20, 10, None).push_to_hub("user/name") == "commit of user/name"
    assert load_policy("user/name") == hurry(20, 10, None)
    assert Policy.from_hub("user/name", revision="v1") == hurry(20, 10, None)
    assert revisions == [None, "v1"]
