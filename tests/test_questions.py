"""Claims about the experiments' arms."""
import json

from lab.questions import EXPERIMENTS, reference_of
from lab.runner import derived, resolve_arm
from parts.config import Config
from structure_reg import TESTABLE

MECHANISMS = ("guidance", "timesteps", "structure")


def resolved(name: str) -> dict:
    """{arm: its settings} of an experiment."""
    experiment = EXPERIMENTS[name]
    return {arm: resolve_arm({**experiment.base, **options}, device="cpu")
            for arm, options in experiment.arms.items()}


def test_every_arm_is_valid_and_arms_of_an_experiment_differ():
    for name, experiment in EXPERIMENTS.items():
        arms = experiment.arms
        assert all(reference_of(arm, arms, experiment.reference) for arm in arms)
        assert len({json.dumps(options, sort_keys=True) for options in arms.values()}) == len(arms)
        assert set(resolved(name)) == set(arms)


def test_a_source_made_of_another_arm_names_one_of_the_same_experiment():
    made = 0
    for experiment in EXPERIMENTS.values():
        for options in experiment.arms.values():
            if derived(options) not in (None, "ramp"):
                assert options["regime"].partition(":")[2] in experiment.arms
                made += 1
    assert made >= 5


def test_the_main_comparison_has_its_controls_and_no_peer():
    arms = EXPERIMENTS["E1"].arms
    assert list(arms) == ["vanilla", "static", "stop", "clock", "stage", "permuted"]
    assert all(arms[name] == {"recipe": name} for name in list(arms)[:5])
    assert arms["permuted"] == {"recipe": "stage", "regime": "permuted:stage"}


def test_the_teachers_controls_differ_from_its_arm_in_the_teacher_alone():
    arms = EXPERIMENTS["E4"].arms
    assert arms["tiny"] == {"recipe": "static"} and arms["none"] == {"recipe": "static", "guidance": "off"}
    for name in ("random", "shuffled"):
        assert arms[name] == {"recipe": "static", "teacher": name}


def test_e2_has_every_set_of_the_three_mechanisms_and_three_losses_that_know_no_r():
    arms = resolved("E2")
    apart = {arm: arms.pop(arm) for arm in ("groups by depth", "dispersive", "diversity")}
    assert len(arms) == 8
    for name, cfg in arms.items():
        modes = {key: getattr(cfg, key) for key in MECHANISMS}
        adaptive = [key for key, mode in modes.items() if mode == "adaptive"]
        assert name == ("+".join(adaptive) or "none")
        assert cfg.timesteps in ("adaptive", "constant")
    for cfg in apart.values():
        assert (cfg.guidance, cfg.timesteps, cfg.structure) == ("off", "constant", "constant")
    assert [cfg.struct_loss for cfg in apart.values()] == ["grouped", "dispersive", "diversity"]


def test_where_structure_is_asked_for_there_are_blocks_enough_to_test_their_groups():
    """Negative control: the default network has too few."""
    assert all((cfg.depth, cfg.width, cfg.heads) == (8, 96, 4) for cfg in resolved("E2").values())
    assert resolved("E1")["stage"].depth < TESTABLE <= 8


def test_e8_puts_the_peers_beside_the_stages_under_the_same_guidance_as_the_static_baseline():
    arms = resolved("E8")
    assert list(arms) == ["static", "stage", "infonoise", "curriculum"]
    assert EXPERIMENTS["E8"].reference == "static"
    for peer in ("infonoise", "curriculum"):
        assert arms[peer].timesteps == peer and not arms[peer].adaptive
        assert (arms[peer].guidance, arms[peer].structure) == (arms["static"].guidance, "off")


def test_the_runs_that_track_semantics_are_probed_and_not_guided():
    for cfg in resolved("E5").values():
        assert cfg.guidance == "off" and cfg.probe == "always" and not cfg.adaptive


def test_the_learning_rate_is_constant_where_times_to_quality_are_compared():
    """In every experiment; negative control: the default run's falls."""
    assert all(cfg.cool == 0 for name in EXPERIMENTS for cfg in resolved(name).values())
    assert Config().cool > 0
