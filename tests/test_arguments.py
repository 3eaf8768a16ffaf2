"""Claims about command lines: a mistake is one line that names the flag and the fix."""
import pytest

from parts.arguments import Parser, number, whole
from parts.commands import evaluate_parser
from parts.config import Config, parse
from parts.errors import UserError


@pytest.mark.parametrize("argv, message", [
    (["--stps", "5"], "--stps: no such flag; did you mean --steps?"),
    (["--sed=5"], "--sed: no such flag; did you mean --seed?"),
    (["--xyzzyx"], "--xyzzyx: no such flag; all of them: --help"),
    (["--seed", "1e3"], "--seed: invalid int value: '1e3'"),
    (["--task", "tts"], "--task: invalid choice: 'tts' .*t2a"),
])
def test_a_mistyped_flag_of_training_is_one_line_with_the_nearest(argv, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as found:
        parse(argv)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("argv, message", [
    (["generate", "RUN", "--promt", "x"], "--promt: no such flag; did you mean --prompt"),
    (["generate", "RUN", "--prompt", "-rain"], "expected one argument; .* is written --prompt=-VALUE"),
    (["generate", "RUN", "--prompt", "rain", "--prompt", "a bell"], "--prompt: given twice"),
    (["generate", "RUN", "--prompt", "x", "--cutoff", "2000"], "--cutoff: not a flag of this command"),
    (["generate", "RUN", "--prompt", "x", "--guidance-scale", "nan"], "--guidance-scale nan: must be"),
    (["generate", "RUN", "--prompt", "x", "--seed", str(2**64)], "--seed 18446744073709551616: must be"),
    (["generate", "RUN", "--prompt", "x", "--seconds", "inf"], "--seconds inf: must be"),
    (["generate", "RUN", "--prompt", "x", "--gudance-scale", "2"], "did you mean --guidance-scale"),
    (["upsample", "RUN", "--input", "x.wav", "--cutoff", "9000"], "--cutoff 9000: must be a number from 500"),
])
def test_a_mistake_in_a_command_of_evaluate_is_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        evaluate_parser("text").parse_args(argv)


def test_a_flag_that_takes_several_values_may_be_given_again_and_a_value_may_begin_with_a_dash():
    parser = Parser("text")
    parser.add_argument("--arm", action="append")
    parser.add_argument("--only", nargs="+", action="extend")
    parser.add_argument("--steps", type=int)
    parser.add_argument("rest", nargs="*")
    argv = ["--arm=-a", "--arm", "b", "--only", "c", "--only", "d", "--steps", "1", "--steps", "2"]
    found = vars(parser.parse_args([*argv, "--", "--e"]))
    assert found == {"arm": ["-a", "b"], "only": ["c", "d"], "steps": 2, "rest": ["--e"]}


def test_numbers_are_from_low_to_high_ends_included():
    parser = Parser("text")
    parser.add_argument("--n", type=whole(1, 5))
    parser.add_argument("--x", type=number(0.5, 2))
    assert vars(parser.parse_args(["--n", "5", "--x", "0.5"])) == {"n": 5, "x": 0.5}
    for wrong in (["--n", "0"], ["--n", "6"], ["--n", "2.5"], ["--x", "2.1"], ["--x", "nan"], ["--x", "one"]):
        with pytest.raises(UserError, match="must be a"):
            parser.parse_args(wrong)
    parser.add_argument("--seed", type=whole())
    with pytest.raises(UserError, match="of at least 0$"):
        parser.parse_args(["--seed", "-1"])
    with pytest.raises(UserError, match="from 0 to 2147483647$"):
        parser.parse_args(["--seed", "3000000000"])


def test_each_setting_is_explained_in_the_help_under_its_heading(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], "text")
    text = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps, K (default 6000)" in text
    assert "controls: random (not trained), shuffled (the shipped one's features of other clips)" in text
    headings = ("the run:", "data:", "model:", "optimizer:", "mechanism 1: SSL guidance:", "evaluation:")
    places = [text.index(heading) for heading in headings]
    assert places == sorted(places)
    assert all("--" + name.replace("_", "-") in text for name in vars(Config()))
