"""Run everything: make the data if there is none, train, sample, evaluate, write the report page.

    bash run_all.sh                                  # sets up .venv first, then runs this script
    python run_all.py DATA_DIR OUTPUT_DIR --profile full
    python run_all.py --only p1 clip                 # some problems, or parts of them
    python run_all.py --from-step digits-sample      # this step and what follows it again
    python run_all.py --dry-run                      # print the commands, run nothing

The steps are in profiles.toml. A step is skipped if the same command made its file before and no
step before it in its part has run again since, so the same command again continues where the last
run stopped. Parts run side by side. PROFILE, ONLY, JOBS and CLASSIFIER in the environment stand for
the options of these names. New data need a new OUTPUT_DIR.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tqdm import tqdm
from tyro.conf import Positional, arg

from common.cli import UserError, at_least, run_cli
from common.files import ROOT, atomic_write, make_output_dir
from common.json_files import read_text
from common.profiles import Step, read_profiles

POSIX = os.name == "posix"
POLL_SECONDS = 0.1  # how soon a signal is passed on
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SILENT_SECONDS = 60  # after which a step that prints nothing is named
PAGE_SECONDS = 60  # between two writings of the page while the steps run


@dataclass
class RunAll:
    """Run the steps of profiles.toml that are not done yet, then write the report page."""

    data_dir: Annotated[Positional[Path | None], arg(metavar="DATA_DIR")] = None
    """The data folder. By default hw2_data, and hw2_data/smoke for the profile smoke."""
    output_dir: Annotated[Positional[Path], arg(metavar="OUTPUT_DIR")] = Path("output")
    """Where everything is written."""
    profile: Annotated[str | None, arg(metavar="NAME")] = None
    """quick (the default): released networks, then short trainings. scratch: small networks from
    random weights, an hour. full: for a GPU. smoke: each step, shortest."""
    only: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ()
    """Problems (p1, p2, p3) or parts of them (faces; digits, ddim, face-diffusion; dann, clip,
    inversion); by default all."""
    jobs: Annotated[int | None, arg(metavar="INT")] = None
    """Parts that run side by side, each on its share of the cores: by default 2, for full 1."""
    classifier: Annotated[Path | None, arg(metavar="FILE")] = None
    """The course's Classifier.pth, to classify the MNIST-M digits too."""
    from_step: Annotated[str | None, arg(metavar="STEP", aliases=["--from"])] = None
    """Run this step, and those after it in its part, again although they are done."""
    dry_run: bool = False
    """Print the commands that would run, and run nothing."""

    def __post_init__(self) -> None:
        at_least("--jobs", self.jobs, 1)


# ------------------------------------------------------------ what to run: options, profiles.toml


@dataclass
class Plan:
    """What the command line, the environment and profiles.toml ask for, checked."""

    steps: list[Step]  # of this profile
    parts: list[str]  # those that are wanted, in the order in which they start
    profile: str
    data_dir: Path
    output_dir: Path
    classifier: Path | None
    alternatives: dict[str, list[dict[str, Any]]]
    jobs: int
    from_step: str | None
    dry_run: bool

    def of_part(self, part: str) -> list[Step]:
        """The steps of a part, in order."""
        return [step for step in self.steps if step.part == part]


def make_plan(args: RunAll) -> Plan:
    """Read profiles.toml and check the options against it. Raises UserError."""
    file = read_profiles(ROOT / "profiles.toml")
    profile, settings = choose_profile(args, file["profiles"])
    parts = choose_parts(args, file["problems"], file["parts"])
    steps = [Step(**table) for table in file["steps"]]
    plan = Plan(
        steps=[step for step in steps if not step.profiles or profile in step.profiles],
        parts=parts,
        profile=profile,
        data_dir=Path.cwd() / (args.data_dir or settings["data"]),
        output_dir=Path.cwd() / args.output_dir,
        classifier=choose_classifier(args),
        alternatives=file["alternatives"],
        jobs=choose_jobs(args, settings["jobs"]),
        from_step=args.from_step,
        dry_run=args.dry_run,
    )
    check_from_step(plan)
    return plan


def check_from_step(plan: Plan) -> None:
    """Raise UserError if --from-step names none of the steps that may run."""
    names = []
    for part in plan.parts:
        names += [step.name for step in plan.of_part(part)]
    if plan.from_step is not None and plan.from_step not in names:
        has_long_name = any(word.startswith("--from-step") for word in sys.argv)
        flag = "--from-step" if has_long_name else "--from"
        known = ", ".join(dict.fromkeys(names))
        raise UserError(f"{flag} {plan.from_step}: no such step; {known}")


def given(option: str, value: object) -> tuple[str, str]:
    """An option's value from the command line, else from the environment, else "".

    The second string is what the user typed, for an error message.
    """
    if value is not None:
        return str(value), f"--{option} {value}"
    variable = option.upper()
    text = os.environ.get(variable, "")
    return text, f"{variable}={text}"


def choose_profile(args: RunAll, profiles: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name and the settings of the profile; the first one is the default."""
    default, *_ = profiles
    name, typed = given("profile", args.profile)
    name = name or default
    if name not in profiles:
        raise UserError(f"{typed}: no such profile; {', '.join(profiles)}")
    return name, profiles[name]


def choose_parts(args: RunAll, problems: dict[str, list[str]], order: list[str]) -> list[str]:
    """The parts that are wanted, in the order of profiles.toml."""
    names, typed = given("only", " ".join(args.only) or None)
    wanted = set()
    for name in names.split() or problems:
        if name in problems:
            wanted.update(problems[name])
        elif name in order:
            wanted.add(name)
        else:
            known = [f"{problem} ({', '.join(parts)})" for problem, parts in problems.items()]
            raise UserError(f"{typed}: no such problem or part; {', '.join(known)}")
    return [part for part in order if part in wanted]


def choose_jobs(args: RunAll, default: int) -> int:
    """How many parts run side by side."""
    text, typed = given("jobs", args.jobs)
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{typed}: how many parts run side by side, at least 1")
    return int(text)


def choose_classifier(args: RunAll) -> Path | None:
    """The course's classifier, if one is given."""
    text, typed = given("classifier", args.classifier)
    if not text:
        return None
    if not Path(text).is_file():
        raise UserError(f"{typed}: no such file")
    return Path.cwd() / text


# -------------------------------------------------------------------------- the command of a step


class Places:
    """Puts folders and files in the place of the names in braces, and knows what exists."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.paths = {
            "data": str(plan.data_dir),
            "output": str(plan.output_dir),
            "classifier": str(plan.classifier or ""),
        }
        self.assumed: set[str] = set()  # in a dry run: what the steps so far would have made

    def path(self, template: str) -> str:
        """A path of profiles.toml, without braces."""
        return template.format_map(self.paths)

    def exists(self, template: str) -> bool:
        """Whether a path of profiles.toml is there."""
        path = self.path(template)
        return path in self.assumed or (path != "" and (ROOT / path).exists())

    def assume(self, step: Step) -> None:
        """Treat what a step makes as if it was there."""
        for template in (step.makes, *step.leaves):
            self.assumed.add(self.path(template))

    def applies(self, needs: Sequence[str], unless: Sequence[str]) -> bool:
        """Whether all `needs` exist and none of `unless` does."""
        for path in needs:
            if not self.exists(path):
                return False
        return not any(self.exists(path) for path in unless)

    def alternative(self, name: str) -> str | None:
        """The words that {name} stands for; None if no alternative applies."""
        for entry in self.plan.alternatives[name]:
            if self.applies(entry.get("needs", ()), entry.get("unless", ())):
                return entry["words"]
        return None

    def command(self, step: Step) -> list[str] | None:
        """The words of a step's command after "python"; None if the step does not apply here."""
        if not self.applies(step.needs, step.unless):
            return None
        text = step.arguments.replace("{options}", step.options.get(self.plan.profile, ""))
        text = text.replace("{makes}", step.makes)
        for name in self.plan.alternatives:
            if "{" + name + "}" in text:
                words = self.alternative(name)
                if words is None:
                    return None
                text = text.replace("{" + name + "}", words)
        # Only now the paths, which may have spaces.
        return [step.script, *(self.path(word) for word in shlex.split(text))]


def as_text(command: Sequence[str]) -> str:
    """A command as it is printed and noted, to be pasted into a shell."""
    return shlex.join(["python", *command])


def data_is_missing(data_dir: Path) -> bool:
    """Whether there is no data, or synthetic data whose drawing was interrupted."""
    if (data_dir / "clip_zeroshot").is_dir():  # drawn last
        return False
    digits = [child for child in (data_dir / "digits").glob("*") if child.name != "mnist"]
    if not digits and not (data_dir / "face").is_dir():  # an imported digits/mnist is not enough
        return True
    made = (data_dir / "digits").glob("*/made.json")
    return any('"synthetic"' in read_text(file) for file in made)


# -------------------------------------------------------------------------------------- processes


class Processes:
    """The programs that run now. A signal to this program reaches each of them, and is waited for.

    Each program is started in a process group of its own, so that the signal reaches the workers
    that it started too, and comes once. Windows has no such groups: there the console sends Ctrl-C
    to all programs in it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.received: list[int] = []  # the signals that came
        self.passed_on = 0  # how many of them the programs have

    @property
    def stopping(self) -> bool:
        """Whether a signal asked to stop."""
        return bool(self.received)

    def run(
        self,
        command: Sequence[str],
        prefix: str,
        environment: dict[str, str],
        quiet: bool = False,
    ) -> int | None:
        """Run a Python script; returns its exit status, or None if it was not started any more.

        With a prefix each line that the script prints is printed after it; with `quiet` none is. A
        script that a signal ended has the status 128 + signal, as in a shell.
        """
        with self.lock:  # it is either not started, or there for `pass_on`
            if self.stopping:
                return None
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE if prefix or quiet else None,
                stderr=subprocess.STDOUT if prefix or quiet else None,
                encoding="utf-8",
                errors="replace",
                start_new_session=POSIX,
            )
            self.running.add(process)
        try:
            with process:
                for line in process.stdout or ():
                    if not quiet:
                        say(line.rstrip("\n"), prefix)
        finally:
            with self.lock:
                self.running.discard(process)
        status = process.returncode
        return 128 - status if status < 0 else status

    @contextlib.contextmanager
    def signals_noted(self) -> Iterator[None]:
        """Note SIGINT, SIGTERM and the end of the terminal instead of ending at once."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if POSIX and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored after nohup
            numbers.append(signal.SIGHUP)
        before = {}
        for number in numbers:
            before[number] = signal.signal(number, self.note_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note_signal(self, number: int, frame: Any) -> None:
        """Remember a signal; `wait` passes it on."""
        self.received.append(number)

    def wait(self, parts: Sequence[Future[list[Result]]], look: Callable[[], None]) -> None:
        """Wait for all parts; pass on the signals that come meanwhile, and `look` at times."""
        pending = set(parts)
        while pending:
            _, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            look()
            for number in self.received[self.passed_on :]:
                self.pass_on(number)
                self.passed_on += 1

    def pass_on(self, number: int) -> None:
        """Send a signal to the process group of every running program."""
        with self.lock:
            for process in self.running:
                if POSIX:
                    sent = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
                    with contextlib.suppress(ProcessLookupError, PermissionError):  # just ended
                        os.killpg(process.pid, sent)
                elif number != signal.SIGINT:
                    process.terminate()


PRINTING = threading.Lock()
CLEAR_LINE = "\r\x1b[K"
last_said: dict[str, float] = {}  # when something was said with each prefix


def say(text: str, prefix: str = "", error: bool = False) -> None:
    """Print a line; beside other parts all lines go to stdout, each after the name of its part."""
    file = sys.stderr if error and not prefix else sys.stdout
    clear = CLEAR_LINE if prefix and sys.stdout.isatty() else ""  # the line of `RunningSteps`
    with PRINTING:
        print(clear + prefix + text, file=file, flush=True)
    last_said[prefix] = time.monotonic()


class Running(NamedTuple):
    """A step that runs: what its lines begin with, and when it started."""

    prefix: str
    start: float


class RunningSteps:
    """Shows that the steps live, with the time that each one has taken.

    Steps side by side share a line at the end of a terminal; a single step writes there itself.
    Where there is no terminal, a step that has printed nothing for a minute gets a line.
    """

    def __init__(self) -> None:
        self.steps: dict[str, Running] = {}
        self.last_rewritten = 0.0

    @contextlib.contextmanager
    def noted(self, step: str, prefix: str) -> Iterator[None]:
        """While this is open, the step runs."""
        self.steps[step] = Running(prefix, time.monotonic())
        try:
            yield
        finally:
            del self.steps[step]

    def show(self) -> None:
        """Show what there is to show now; called several times a second."""
        now = time.monotonic()
        steps = self.steps.copy()  # other threads start and end steps
        if not sys.stdout.isatty():
            for name, (prefix, start) in steps.items():
                if now - max(start, last_said.get(prefix, 0.0)) > SILENT_SECONDS:
                    say(f"… {name}: {tqdm.format_interval(now - start)} so far", prefix)
            return
        if now - self.last_rewritten > 1:
            words = [
                f"{name} {tqdm.format_interval(now - start)}"
                for name, (prefix, start) in steps.items()
                if prefix
            ]
            if words:
                width = shutil.get_terminal_size().columns - 1
                with PRINTING:
                    print(CLEAR_LINE + ", ".join(words)[:width], end="", flush=True)
                self.last_rewritten = now

    def hide(self) -> None:
        """Take the line off the terminal, if there was one."""
        if self.last_rewritten:
            print(CLEAR_LINE, end="", flush=True)


# ---------------------------------------------------------------------------------------- the run


@dataclass
class Result:
    """How a step ended."""

    step: str
    result: str  # done, already done, left out, failed or stopped
    seconds: int
    status: int = 0  # of its program


class Runner:
    """Runs parts, each in its order, and keeps OUTPUT_DIR/steps/NAME.txt: command and seconds."""

    def __init__(self, plan: Plan, processes: Processes) -> None:
        self.plan = plan
        self.processes = processes
        self.places = Places(plan)
        self.everything_again = False  # the data is new
        self.results: list[Result] = []
        self.running = RunningSteps()
        self.pages = ThreadPoolExecutor(1)
        self.last_page = time.monotonic()
        self.page_lock = threading.Lock()

    def run_parts(self, parts: Sequence[str]) -> int:
        """Run some parts, up to --jobs of them side by side; returns the exit status so far.

        It is 0, or 128 + signal, or the status of the step that failed; 1 if there are more parts.
        """
        together = self.plan.jobs > 1 and len(parts) > 1 and not self.plan.dry_run
        environment = {}
        if together:
            threads = max(1, cores() // self.plan.jobs)
            environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(threads)
            environment["PYTHONUNBUFFERED"] = "1"
        with ThreadPoolExecutor(self.plan.jobs if together else 1) as pool:
            futures = []
            for part in parts:
                prefix = f"{part} | " if together else ""
                futures.append(pool.submit(self.run_part, part, prefix, environment))
            self.processes.wait(futures, self.running.show)
        self.running.hide()
        for future in futures:
            self.results += future.result()
        if self.processes.stopping:
            return 128 + self.processes.received[0]
        failed = [result for result in self.results if result.result == "failed"]
        if not failed:
            return 0
        return failed[0].status if len(parts) == 1 else 1

    def run_part(self, part: str, prefix: str, environment: dict[str, str]) -> list[Result]:
        """Run the steps of a part up to the first that fails."""
        again = self.everything_again  # a step ran, so those after it have to run too
        results = []
        for step in self.plan.of_part(part):
            again = again or step.name == self.plan.from_step
            command = self.places.command(step)
            if step.draws_data and not data_is_missing(self.plan.data_dir):
                continue
            if command is None:
                if step.remove_outdated and again:
                    self.remove(step)
                continue
            if step.checks_data and self.everything_again:  # just drawn: nothing to find
                self.remember(step, command, 0)
                continue
            if not again and not step.always and self.is_done(step, command):
                if not self.plan.dry_run:  # which prints commands alone
                    say(f"= {step.name}: done already: {self.places.path(step.makes)}", prefix)
                results.append(Result(step.name, "already done", self.noted_seconds(step)))
                continue
            again = again or not step.optional  # nothing builds on an optional step
            result = self.run_step(step, command, prefix, environment)
            if result is None:
                break
            results.append(result)
            if result.result in ("failed", "stopped"):
                break
            self.update_page(step)
        return results

    def update_page(self, step: Step) -> None:
        """Write the report page beside the steps, at times, so that it can be read before the end.

        The last step writes it anyway.
        """
        with self.page_lock:
            is_due = time.monotonic() - self.last_page > PAGE_SECONDS
            if self.plan.dry_run or step.always or not is_due:
                return
            self.last_page = time.monotonic()
        for last in self.plan.of_part("report"):
            command = self.places.command(last)
            if command is not None:
                self.pages.submit(self.processes.run, command, "", ONE_THREAD, quiet=True)

    def run_step(
        self, step: Step, command: list[str], prefix: str, environment: dict[str, str]
    ) -> Result | None:
        """Run one step and note it; None if a signal came before it."""
        if self.plan.dry_run:
            print(as_text(command))
            self.places.assume(step)
            self.everything_again = self.everything_again or step.draws_data
            return Result(step.name, "done", step.seconds.get(self.plan.profile, 0))
        if self.processes.stopping:
            return None
        self.forget(step)
        start = time.monotonic()
        say(f"+ {as_text(command)}", prefix)
        with self.running.noted(step.name, prefix):
            status = self.processes.run(command, prefix, environment)
        if status is None:
            return None
        seconds = round(time.monotonic() - start)
        if status == 0:
            if not step.always:
                self.remember(step, command, seconds)
            say(f"= {step.name}: {seconds} s: {self.places.path(step.makes)}", prefix)
            return Result(step.name, "done", seconds)
        if self.processes.stopping:
            return Result(step.name, "stopped", seconds, status)
        if step.optional and status < 128:  # a signal ends more than this step
            say(f"left out: {step.optional}", prefix)
            return Result(step.name, "left out", seconds, status)
        line = f"error: the step {step.name} failed; run again to continue: {as_text(command)}"
        say(line, prefix, error=True)
        return Result(step.name, "failed", seconds, status)

    # Notes

    def note(self, step: Step) -> Path:
        """The file with the command that made a step's file, and its seconds."""
        return self.plan.output_dir / "steps" / f"{step.name}.txt"

    def remember(self, step: Step, command: list[str], seconds: int) -> None:
        """Note that a step is done; a dry run notes nothing."""
        if not self.plan.dry_run:
            atomic_write(self.note(step), f"{as_text(command)}\n{seconds}\n")

    def is_done(self, step: Step, command: Sequence[str]) -> bool:
        """Whether this very command made what the step makes."""
        note = self.note(step)
        if not self.places.exists(step.makes) or not note.is_file():
            return False
        return read_text(note).splitlines()[:1] == [as_text(command)]

    def noted_seconds(self, step: Step) -> int:
        """The seconds of a step that is done."""
        lines = read_text(self.note(step)).splitlines()
        is_number = len(lines) > 1 and re.fullmatch("[0-9]{1,9}", lines[1])
        return int(lines[1]) if is_number else 0

    def forget(self, step: Step) -> None:
        """Remove the note of a step that runs again; all notes if the data is drawn."""
        if step.draws_data:
            self.everything_again = True
            shutil.rmtree(self.plan.output_dir / "steps", ignore_errors=True)
        self.note(step).unlink(missing_ok=True)

    def remove(self, step: Step) -> None:
        """Remove the note and the results of a step that does not run any more."""
        if not self.plan.dry_run:
            self.note(step).unlink(missing_ok=True)
            shutil.rmtree(self.places.path(step.makes), ignore_errors=True)


def cores() -> int:
    """The processor cores that this program may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def estimated_minutes(plan: Plan, results: Sequence[Result]) -> int:
    """How long the steps take, by the seconds in profiles.toml, with parts side by side."""
    seconds = {result.step: result.seconds for result in results if result.result == "done"}
    ends = [0] * plan.jobs  # when each place for a part is free again
    for part in plan.parts:
        ends.sort()
        ends[0] += sum(seconds.get(step.name, 0) for step in plan.of_part(part))
    before = sum(seconds.get(step.name, 0) for step in plan.of_part("data"))
    return math.ceil((before + max(ends)) / 60)


def print_table(results: Sequence[Result]) -> None:
    """Print step, seconds and result of each step in columns."""
    width = max([len("step"), *(len(result.step) for result in results)])
    print(f"\n{'step':{width}}  {'seconds':>7}  result")
    for result in results:
        print(f"{result.step:{width}}  {result.seconds:7}  {result.result}")


def main(args: RunAll) -> None:
    """Run the data's steps, then all parts, then the report."""
    plan = make_plan(args)
    if not plan.dry_run:
        make_output_dir(plan.output_dir, "OUTPUT_DIR")
    processes = Processes()
    runner = Runner(plan, processes)
    with processes.signals_noted():
        status = runner.run_parts(["data"])
        if status == 0:
            status = runner.run_parts(plan.parts)
        runner.pages.shutdown()
        if status == 0:
            status = runner.run_parts(["report"])
    if plan.dry_run:
        print(f"# about {estimated_minutes(plan, runner.results):,} min")
        return
    print_table(runner.results)
    if processes.stopping:
        print("stopped; run again to continue", file=sys.stderr)
    elif status != 0 and len(plan.parts) > 1:
        print("error: a part was not finished (above); run again to continue", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    run_cli(RunAll, main)
