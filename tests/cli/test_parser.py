"""Commands, options, hints and `--help`: what is proposed for a typo, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lockstep
from lockstep import cli
from lockstep.common.cli import parser, run
from lockstep.common.errors import ConfigError, did_you_mean, nearest
from lockstep.common.system import program

REPOSITORY = Path(__file__).resolve().parents[2]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command line ends with."""
    assert cli.main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modle", "vit"], ["--modle", "did you mean --model?"]),
        (["--lr=0.1", "--bacth-size", "4"], ["--bacth-size", "did you mean --batch-size?"]),
        (["run", "--momentun=0.9"], ["--momentun", "did you mean --momentum?"]),
        (["grdi"], ["'grdi'", "did you mean grid?"]),
        (["--data", "digits", "grid"], ["the command comes first", "grid"]),
        (["--recipe", "quik"], ["--recipe", "'quik'", "did you mean quick?"]),
        (["--model", "resnet2"], ["'resnet2'", "did you mean resnet20?"]),
        (["alarms", "--model", "resnet2"], ["resnet2", "did you mean resnet20?"]),
        (["--schedule", "cosin"], ["'cosin'", "did you mean cosine?"]),
        (["--schedule", "step:perid=3"], ["'perid'", "did you mean period?"]),
        (["--dtype", "flaot32"], ["--dtype", "did you mean float32?"]),
        (["faults", "--only", "flaten-order"], ["'flaten-order'", "did you mean flatten-order?"]),
        (["read"], ["learn"]),
        (["--frobnicate"], ["--frobnicate", "--help"]),
        (["--steps", "many"], ["--steps", "'many'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_nearest_word_is_proposed_for_a_typo(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, *arguments)
    for word in words:
        assert word in line


def test_options_of_other_commands_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(capsys, "--pairs", "7", "--quick", "--only", "foo")
    assert line == "run takes no --pairs (alarms does); see lockstep run --help"


def test_nothing_is_proposed_where_no_word_is_near() -> None:
    assert nearest("zzz", ["run", "grid"]) is None
    assert did_you_mean("zzz", ["run", "grid"]) == "choose one of run, grid"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("run", "--pairs"), ("run", "--quick"), ("run", "--only"), ("run", "--to"),
        ("run", "--list"), ("locate", "--resume"), ("export", "--lr"), ("pair", "--steps"),
        ("grid", "--batch-size"), ("handover", "--lr"), ("faults", "--steps"),
        ("alarms", "--lr"), ("sensitivity", "--batch-size"), ("bench", "--compile"),
        ("learn", "--steps"),
    ],
)  # fmt: skip
def test_an_option_that_a_command_does_not_take_is_refused(
    command: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, command, option, "7")
    assert line.startswith(f"{command} takes no {option} ("), line


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --momentum?" in refusal(capsys, "--moment", "0.9")
    assert parser.parse(["--momentum", "0.9"]).momentum == 0.9  # the control


def test_no_word_means_run() -> None:
    for arguments in ([], ["--lr", "0.1"], ["run", "--lr", "0.1"]):
        assert parser.parse(arguments).command == "run"


@pytest.mark.parametrize("command", parser.COMMANDS)
def test_every_command_has_its_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {program.name()} {command} ")
    assert ("--pairs" in said) == (command == "alarms")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lockstep {lockstep.__version__}\n"


def test_the_names_of_all_faults_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from lockstep.backends import faults

    assert cli.main(["faults", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [fault.name for fault in faults.FAULTS]


def test_a_folder_may_stand_after_options() -> None:
    for arguments in (["RUN", "--quiet"], ["--quiet", "RUN"]):
        assert parser.parse(["locate", *arguments]).run == Path("RUN")
    assert parser.parse(["export", "--to", "torch", "RUN"]).run == Path("RUN")


# --- The program that was typed


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (["compare.py"], "python compare.py"),
        (["-m", "lockstep"], "python -m lockstep"),
    ],
)
def test_usage_hints_and_errors_name_the_program_that_was_typed(
    typed: list[str], name: str
) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, *typed, *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert said("--help").startswith(f"usage: {name} [COMMAND]")
    assert f"{name} learn" in said("read")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/usr/bin/lockstep", "lockstep"),
        ("compare.py", "python compare.py"),
        ("/x/lockstep/__main__.py", "python -m lockstep"),
        ("/x/pytest/__main__.py", "lockstep"),
        ("", "lockstep"),
    ],
)
def test_the_program_is_known_by_its_path(
    path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [path])
    assert program.name() == name
    assert program.command("--resume", "a b") == f"{name} --resume 'a b'"


def test_a_config_error_is_raised_for_callers_of_the_parser() -> None:
    with pytest.raises(ConfigError, match="did you mean --model"):
        parser.parse(["--modle", "vit"])


def test_another_optimizer_takes_nothing_of_the_recipes_own() -> None:
    """Its momentum would be refused, its learning rate is SGD's."""
    own = run.new_request(parser.parse([])).config
    assert (own.optimizer, own.momentum, own.lr) == ("sgd", 0.9, 0.01)  # the control
    given = ["--optimizer", "adam", "--betas", "0.8", "0.9", "--no-decay-biases-and-norms"]
    config = run.new_request(parser.parse(given)).config
    assert (config.optimizer, config.momentum, config.lr) == ("adam", 0.0, 0.001)
    assert (config.betas, config.decay_biases_and_norms) == ((0.8, 0.9), False)
    assert config.steps == own.steps
    kept = run.new_request(parser.parse(["--optimizer", "sgd"])).config
    assert kept == own
    with pytest.raises(ConfigError, match="adam takes no --momentum"):
        run.new_request(parser.parse([*given, "--momentum", "0.9"]))
