"""Every option of every script refuses values that cannot be meant.

Each bad value must give one line on stderr that names the option, and exit status 2, before the
script starts to work. The options are read from the dataclasses, so a new option is tested too.
"""

import dataclasses
import importlib
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from tyro.conf import Positional

from common.files import ROOT

# What a command needs besides its required options.
ALSO_NEEDED = {"prepare_data.Download": ["--year", "2022"]}
# A negative strength of guidance leads away from the class, which is worth an experiment.
MAY_BE_NEGATIVE = {"guidance", "guidances", "guidance_sweep", "textbook_guidance"}
# Strengths, weights, decays, probabilities and shares, of which 0 means none; places that count
# from 0; workers, where 0 means the process itself; and stages that do not learn.
MAY_BE_ZERO = MAY_BE_NEGATIVE | {
    *("beta1", "beta2", "ema_decay", "weight_decay", "drop", "dropout", "drift", "penalty"),
    *("real_label", "fake_label", "label_smoothing", "instance_noise", "augmentation"),
    *("latent_noise", "critic_weight", "perceptual_weight"),
    *("lambda_max", "prior", "neighbours", "tint", "eta", "etas", "interval"),
    *("drop_each", "drop_all", "scale", "scales", "free_scales", "classifier_scales"),
    *("seed", "seeds", "offset", "frozen", "creatures", "trait_weight", "step_power"),
}
MAY_BE_ZERO_IN = {
    ("benchmarks.dann_training.Benchmark", "num_workers"),
    ("benchmarks.ddpm_training.Benchmark", "num_workers"),
    ("benchmarks.gan_training.Benchmark", "num_workers"),
}
# Lists that may be empty although they are not by default: no augmentation, and the rows of a table
# of which there are several kinds.
MAY_BE_EMPTY = {"augment", "samplers", "guidances", "gans"}
MAY_BE_EMPTY_IN = {("experiments.faces_by_timesteps.Table", "steps")}


def find_commands() -> dict[str, type]:
    """The dataclass of each command of each script, as SCRIPT.Class."""
    commands = {}
    for folder in ("", "experiments", "benchmarks", "tools"):
        for file in sorted((ROOT / folder).glob("*.py")):
            if "run_cli(" not in file.read_text():
                continue
            name = ".".join([*Path(folder).parts, file.stem])
            module = importlib.import_module(name)
            hint = typing.get_type_hints(module.main)["args"]
            for command in alternatives(hint):
                commands[f"{name}.{command.__name__}"] = command
    return commands


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other type is alone."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


# The fields of a command


class Option(typing.NamedTuple):
    """A field of a command."""

    name: str
    flag: str | None  # None for a positional argument
    kind: Any  # the type of one value, without None
    default: Any
    is_required: bool
    is_list: bool  # takes any number of values; a pair has a fixed number


POSITIONAL = typing.get_args(Positional[str])[1]  # the mark of tyro's positional arguments


def option_of(field: dataclasses.Field, hint: Any) -> Option:
    flag: str | None = "--" + field.name.replace("_", "-")
    if typing.get_origin(hint) is Annotated:
        hint, *marks = typing.get_args(hint)
        if POSITIONAL in marks:
            flag = None
    kinds = [kind for kind in alternatives(hint) if kind is not types.NoneType]
    assert len(kinds) == 1, (field.name, hint)
    kind = kinds[0]
    is_list = False
    if typing.get_origin(kind) is tuple:
        is_list = Ellipsis in typing.get_args(kind)
        kind = typing.get_args(kind)[0]
    is_required = (
        field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    return Option(field.name, flag, kind, field.default, is_required, is_list)


def options_of(command: type) -> list[Option]:
    hints = typing.get_type_hints(command, include_extras=True)
    return [option_of(field, hints[field.name]) for field in dataclasses.fields(command)]


# Bad values


def bad_values(name: str, option: Option) -> list[str]:
    """Values that the option of the command `name` must refuse."""
    kind = option.kind
    if kind in (Path, str):
        return [""]
    if typing.get_origin(kind) is Literal:
        return ["nonsense"]
    if kind not in (int, float):
        assert kind is bool, kind
        return []
    values = ["nan", "inf", "-inf", "1e300"]
    if kind is int:
        values.append(str(2**64))
    if option.name not in MAY_BE_NEGATIVE:
        values.append("-1")
    if option.name not in MAY_BE_ZERO and (name, option.name) not in MAY_BE_ZERO_IN:
        values.append("0")
    return values


def bad_words(name: str, option: Option) -> Iterator[list[str]]:
    """The words after the flag: one bad value, in a pair at each of the two places."""
    for value in bad_values(name, option):
        is_pair = isinstance(option.default, tuple) and not option.is_list
        if is_pair:
            first, second = map(str, option.default)
            yield [value, second]
            yield [first, value]
        else:
            yield [value]
    may_be_empty = option.name in MAY_BE_EMPTY or (name, option.name) in MAY_BE_EMPTY_IN
    may_be_empty = may_be_empty or option.default == ()
    if option.is_list and not may_be_empty:
        yield []


def command_line(name: str, options: list[Option], wrong: Option, words: list[str]) -> list[str]:
    """The option `wrong` with these words, and what the command needs besides."""
    positional = []
    flags = list(ALSO_NEEDED.get(name, []))
    for option in options:
        if option is wrong:
            given = words
        elif option.is_required:
            given = [good_word(option)]
        else:
            continue
        if option.flag is None:
            positional += given
        else:
            flags += [option.flag, *given]
    return [*positional, *flags]


def good_word(option: Option) -> str:
    """A value that the option takes: the first of its choices, or a name."""
    is_choice = typing.get_origin(option.kind) is Literal
    return typing.get_args(option.kind)[0] if is_choice else "x"


def mistakes(name: str, command: type) -> Iterator[tuple[list[str], str]]:
    """Command lines with one mistake each, with the pattern that the error must match."""
    options = options_of(command)
    for wrong in options:
        for words in bad_words(name, wrong):
            yield command_line(name, options, wrong, words), pattern_of(wrong)


def pattern_of(option: Option) -> str:
    """What names the option in an error."""
    if option.flag is None and typing.get_origin(option.kind) is Literal:
        return f"argument '{option.name}'"
    if option.flag is None:  # only its place is known
        return r"the (first )?argument( after \w+)?:"
    return rf"{option.flag}(?![\w-])"


COMMANDS = find_commands()


def test_every_script_is_found():
    scripts = {name.rpartition(".")[0] for name in COMMANDS}
    assert {
        *("p1_dcgan", "p1_wgangp", "p2_ddpm_train", "p2_ddpm_infer", "p2_ddim"),
        *("p3_dann", "p3_clip_zeroshot", "prepare_data", "evaluate", "report", "run_all"),
        *("experiments.digit_samplers", "experiments.face_samplers"),
        "experiments.faces_by_timesteps",
        *("benchmarks.gan_training", "tools.release", "tools.same_outputs"),
    } <= scripts


def must_not_start(args: Any) -> None:
    pytest.fail(f"the script would start with {args}")


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_values_are_refused_in_one_line(
    name: str, error_of: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    tested = 0
    for words, pattern in mistakes(name, COMMANDS[name]):
        error = error_of(COMMANDS[name], must_not_start, *words)
        assert re.search(pattern, error), (words, error)
        tested += 1
    assert tested > 0
    assert not list(tmp_path.iterdir())
