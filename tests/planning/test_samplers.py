"""Samplers by the names people use."""

import diffusers
import pytest
from diffusers import DDIMScheduler

from attnreuse.planning.samplers import SAMPLERS, make_scheduler, step_options

CONFIG = DDIMScheduler(prediction_type="v_prediction").config


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "DPM++ SDE"])
def test_every_name_makes_a_scheduler_with_the_models_own_config(name):
    made = make_scheduler(CONFIG, name)
    assert type(made).__name__ == SAMPLERS[name][0]
    assert made.config.prediction_type == "v_prediction"
    made.set_timesteps(5)
    assert len(made.timesteps) >= 5


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("Euler ancestral", "EulerAncestralDiscreteScheduler"),
        ("DPM", "DPMSolverMultistepScheduler"),
        ("kdpm2discrete", "KDPM2DiscreteScheduler"),
        ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    ],
)
def test_names_are_understood_as_people_write_them(name, cls):
    assert type(make_scheduler(CONFIG, name)).__name__ == cls


def test_karras_and_sde_are_what_they_say():
    made = make_scheduler(CONFIG, "DPM++ 2M SDE Karras")
    assert made.config.use_karras_sigmas
    assert made.config.algorithm_type == "sde-dpmsolver++"
    assert not make_scheduler(CONFIG, "DPM++ 2M").config.use_karras_sigmas
    assert type(make_scheduler({**CONFIG, "_class_name": "DDIMScheduler"}, None)) is DDIMScheduler


@pytest.mark.parametrize(
    ("name", "said"),
    [("Oiler", "--scheduler must be one of DDIM, .*got 'Oiler'"), ("DDIM Karras", "DDIMScheduler has no Karras")],
)
def test_what_cannot_be_is_said(name, said):
    with pytest.raises(ValueError, match=said):
        make_scheduler(CONFIG, name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchsde: pip install torchsde"):
        make_scheduler(CONFIG, "DPM++ SDE")


def test_eta_is_for_schedulers_that_have_one():
    assert step_options(make_scheduler(CONFIG, "DDIM"), 1.0) == {"eta": 1.0}
    assert step_options(diffusers.HeunDiscreteScheduler(), None) == {}
    with pytest.raises(ValueError, match="--eta: HeunDiscreteScheduler has none; DDIM and TCD have"):
        step_options(diffusers.HeunDiscreteScheduler(), 0.5)


def test_a_name_says_what_it_is_whatever_the_config_says():
    odd = {**CONFIG, "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}
    plain = make_scheduler(odd, "DPM++ 2M").config
    assert (plain["use_karras_sigmas"], plain["algorithm_type"]) == (False, "dpmsolver++")
    assert make_scheduler(odd, "DPM++ 2M Karras").config["use_karras_sigmas"] is True
    assert make_scheduler(odd, "DPMSolverMultistepScheduler").config["use_karras_sigmas"] is True  # a class: as it is


def test_flow_matching_is_refused_for_other_models():
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is for models trained by flow matching"):
        make_scheduler({**CONFIG, "_class_name": "DDIMScheduler"}, "FlowMatchEulerDiscrete")
