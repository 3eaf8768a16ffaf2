"""Claims about the experiments' arms."""
import json

from lab.questions import EXPERIMENTS, reference_of
from lab.runner import resolve_arm


def test_every_arm_is_valid_and_arms_of_an_experiment_differ():
    for experiment in EXPERIMENTS.values():
        arms = experiment.arms
        assert all(reference_of(arm, arms, experiment.reference) for arm in arms)
        assert len({json.dumps(options, sort_keys=True) for options in arms.values()}) == len(arms)
        for options in arms.values():
            resolve_arm({**experiment.base, **options})


def test_e2_has_every_set_of_the_three_mechanisms():
    arms = EXPERIMENTS["E2"].arms
    assert len(arms) == 8
    for name, options in arms.items():
        adaptive = [key for key in ("guidance", "timesteps", "structure") if options[key] == "adaptive"]
        assert name == ("+".join(adaptive) or "none")
