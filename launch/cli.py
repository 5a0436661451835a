"""What all commands share: flags, help, errors of one line, exit codes.

A command is a module with `define_flags`, which says what can be given, and `run`, which does it:

    def main(argv=None, program="python -m launch.NAME"):
        cli.main(program, __doc__, define_flags, run, argv)

Flags are `--snake_case`, with `--flag value` or `--flag=value`; switches are `--flag` or
`--noflag`. `--config.KEY=VALUE` changes one key of a command's config. Help must not import JAX:
modules are imported by `run`, not at the top of a command.

Exit codes: 0 done; 2 something that the user gave, or their machine, cannot be used: one line on
stderr; 130 Ctrl-C; 1 with a traceback, a fault of this project.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from chameleon_jax import interrupts, parsing, places
from chameleon_jax.errors import UserError, one_line

OUTPUT_CLOSED = 141  # as the shell says of a program that the closed pipe has ended
WIDTH = 100  # most columns of a help text
WORDS = {"true": True, "1": True, "false": False, "0": False}  # values of a switch

Values = argparse.Namespace  # what was given, by the names of the flags
Kind = Callable[[str], Any]  # reads a text; raises a UserError if it cannot


class UsageError(UserError):
    """The command line asks for something impossible. The message is one line."""


def whole_number(least: int | None = None, most: int | None = None) -> Kind:
    """A kind of flag: a whole number within bounds."""
    return lambda text: parsing.whole_number(text, least, most)


def number(*, least: float | None = None, above: float | None = None) -> Kind:
    """A kind of flag: a finite number within bounds."""
    return lambda text: parsing.number(text, least, above)


def size(text: str) -> tuple[int, int]:
    """A kind of flag: HEIGHTxWIDTH."""
    return parsing.size(text)


def counts(text: str) -> dict[str, int]:
    """A kind of flag: NAME=N,NAME=N."""
    return parsing.counts(text)


def one_of(*words: str) -> Kind:
    """A kind of flag: one of some words."""

    def read(text: str) -> str:
        if text not in words:
            raise UsageError(f"{text!r}: expected one of {', '.join(words)}{_nearest(text, words)}")
        return text

    return read


class Parser:
    """The flags of one command, on top of argparse.

    Args:
      program: what the user types to call it.
      about: its help text: what it does, then examples.
    """

    def __init__(self, program: str, about: str):
        self._argparse = _ArgumentParser(
            program,
            usage=argparse.SUPPRESS,
            description=about.strip(),
            formatter_class=functools.partial(
                argparse.RawDescriptionHelpFormatter, max_help_position=30, width=WIDTH
            ),
            allow_abbrev=False,
            add_help=False,
        )
        self._group = self._argparse.add_argument_group("flags")
        self._group.add_argument("--help", "-h", action="help", help="show this text and stop")
        self._valued: list[str] = []
        self._switches: list[str] = []
        self._has_config = False

    def inputs(self, name: str, text: str, *, kind: Kind = str, metavar: str = "IN") -> None:
        """One or several values without a flag."""
        self._argparse.add_argument(
            name, nargs="+", type=_for_argparse(kind), metavar=metavar, help=text
        )

    def flag(
        self,
        name: str,
        text: str,
        *,
        kind: Kind = str,
        default: Any = None,
        repeated: bool = False,
        needed: bool = False,
        metavar: str = "X",
    ) -> None:
        """A flag with a value.

        Args:
          name: without dashes.
          text: what it is for.
          kind: reads the value.
          default: what it is if it is not given; shown in the help unless None.
          repeated: it may be given several times, and is a list.
          needed: the command does not run without it.
          metavar: stands for the value in the help.
        """
        if default not in (None, ""):
            text = f"{text} (default: {default})"
        self._valued.append(f"--{name}")
        self._group.add_argument(
            f"--{name}",
            action="append" if repeated else "store",
            type=_for_argparse(kind),
            default=[] if repeated else default,
            required=needed,
            metavar=metavar,
            help=_plain(text),
        )

    def switch(self, name: str, text: str, *, default: bool | None) -> None:
        """A flag that is on or off; `default` None is neither, where a config decides."""
        if default is not None:
            text = f"{text} (default: {'on' if default else 'off'})"
        self._switches.append(f"--{name}")
        self._group.add_argument(
            f"--{name}", f"--no{name}", action=_Switch, default=default, help=_plain(text)
        )

    def config_flag(self, *defaults: tuple[str, str], others: Sequence[str] = ()) -> None:
        """`--config`, and `--config.KEY=VALUE` as the list `overrides`.

        Args:
          defaults: (config file, when it is the default); the second is empty if there is one.
          others: config files that are named in the help, too.
        """
        self._has_config = True
        names = [f"{file} {when}".strip() for file, when in defaults]
        self.flag(
            "config",
            f"what to build and how to run it (default: {'; '.join(names)})",
            metavar="FILE[:VARIANT]",
        )
        self._group.add_argument("--config.KEY", metavar="VALUE", help="change a key of it")
        files = [*(file for file, _ in defaults), *others]
        known = [f"  {file}: {', '.join(variants(file))}" for file in files]
        self._argparse.epilog = "variants, the default one first:\n" + "\n".join(known)

    def decoder_flag(self, default: str | None = None) -> None:
        """`--decoder`; without a default the config decides."""
        otherwise = "" if default else "; default model.decoder of the config, else vae"
        self.flag(
            "decoder",
            "what makes frames of latents: vae, the full one; small, that of the weights; or a"
            f" file with a small one, such as taew2_2.safetensors{otherwise}",
            default=default,
            metavar="NAME",
        )

    def quantize_flag(self) -> None:
        """`--quantize`."""
        self.flag(
            "quantize",
            "the denoiser's large layers in 8 bits: int8 (TPU), fp8 (GPU) or none; default that of"
            " the config, else none",
            kind=one_of("none", "int8", "fp8"),
            metavar="NAME",
        )

    def compilation_flag(self) -> None:
        """`--nocompilation_cache`."""
        self.switch(
            "compilation_cache",
            "keep compiled programs under ~/.cache/chameleon_jax, so that the next start is fast",
            default=True,
        )

    def mesh_flag(self) -> None:
        """`--mesh`, which `jobs.stream_mesh` reads."""
        self.flag(
            "mesh",
            "split each stream over so many devices: tensor=4, seq=4, or tensor=2,seq=2; default"
            " one device",
            kind=counts,
            metavar="AXIS=N,...",
        )

    def read(self, argv: Sequence[str]) -> Values:
        """Read a command line, without the program's name.

        Raises:
          UsageError: an unknown flag (the nearest is named), a value of the wrong kind, a stray
            argument, or bytes that are not UTF-8.
          SystemExit: after `--help`.
        """
        for item in argv:
            _check_text(item)
        plain, overrides = self._split(argv)
        values, unknown = self._argparse.parse_known_args(plain)
        if unknown:
            self._refuse(unknown[0])
        if self._has_config:
            values.overrides = overrides
        return values

    def _split(self, argv: Sequence[str]) -> tuple[list[str], list[str]]:
        """The command line with every value at its flag, and without overrides; the overrides."""
        plain, overrides = [], []
        rest = iter(argv)
        for item in rest:
            name, equals, value = item.partition("=")
            is_override = self._has_config and name.startswith("--config.")
            if not equals and (is_override or name in self._valued):
                value = next(rest, None)
                if value is None:
                    raise UsageError(f"{name} needs a value: {name}=VALUE")
                item = f"{name}={value}"
            if is_override:
                overrides.append(item.removeprefix("--config."))
            elif equals and name in self._switches:
                plain.append(_switched(name, value))
            else:
                plain.append(item.replace("--no_", "--no", 1) if not equals else item)
        return plain, overrides

    def _refuse(self, item: str) -> NoReturn:
        if not item.startswith("-"):
            raise UsageError(
                f"unexpected argument {item!r}; every input is given by a flag, see --help"
            )
        name = item.partition("=")[0]
        near = _nearest(name, [*self._valued, *self._switches, "--help"])
        raise UsageError(f"unknown flag {name}{near}; see --help")


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


class _Switch(argparse.Action):
    """`--flag` and `--noflag`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **about: Any):
        super().__init__(option_strings, dest, nargs=0, **about)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        values: argparse.Namespace,
        value: Any,
        name: str | None = None,
    ) -> None:
        setattr(values, self.dest, name == f"--{self.dest}")


def main(
    program: str,
    about: str | None,
    define_flags: Callable[[Parser], None],
    run: Callable[[Values], int | None],
    argv: Sequence[str] | None = None,
    *,
    interrupted: str = "",
) -> NoReturn:
    """Read the command line, run the command, and end the process with its exit code.

    Args:
      program: what the user types to call it.
      about: the help text, a module's docstring.
      define_flags: adds the flags to a parser.
      run: called with what was given; returns the exit code, None for 0.
      argv: the command line without the program's name; default that of the process.
      interrupted: what is said after Ctrl-C, besides that it was.
    """

    words = sys.argv[1:] if argv is None else argv
    finish(lambda: run(read(define_flags, words, program, about)), interrupted=interrupted)


def read(
    define_flags: Callable[[Parser], None],
    argv: Sequence[str],
    program: str = "",
    about: str | None = "",
) -> Values:
    """Read a command line by the flags of a command; arguments and errors as for `main`."""
    parser = Parser(program, about or "")
    define_flags(parser)
    return parser.read(argv)


@dataclasses.dataclass(frozen=True)
class Command:
    """One of several commands of a module, for `choose`. The fields are arguments of `main`."""

    about: str
    define_flags: Callable[[Parser], None]
    run: Callable[[Values], int | None]
    interrupted: str = ""

    def __call__(self, argv: Sequence[str], program: str) -> NoReturn:
        main(program, self.about, self.define_flags, self.run, argv, interrupted=self.interrupted)


def choose(
    program: str,
    about: str,
    commands: Mapping[str, Callable[[Sequence[str], str], None]],
    argv: Sequence[str] | None = None,
) -> None:
    """Call one of several commands, which is the first word of the command line.

    Args:
      program: what stands in front of that word.
      about: the help text, which lists the commands.
      commands: each is called with the rest of the command line, and its program.
      argv: default that of the process, without the program's name.
    """
    argv = sys.argv[1:] if argv is None else argv
    word = argv[0] if argv else ""
    if word in commands:
        commands[word](argv[1:], f"{program} {word}")
        return

    def command() -> None:
        if word in ("--help", "-h"):
            print(about.strip())
            return
        _check_text(word)
        known = ", ".join(commands)
        given = repr(word) if word else "none"
        raise UsageError(f"expected a command, {known}; got {given}{_nearest(word, commands)}")

    finish(command)


def finish(command: Callable[[], int | None], *, interrupted: str = "") -> NoReturn:
    """Run a command and end the process; see the exit codes at the top of this file."""
    for stream in (sys.stdout, sys.stderr):
        # Names and prompts may hold characters that the terminal's encoding does not have.
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupts.noticed():
            code = command() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _report(str(error) if error.keeps_lines else one_line(error))
    except KeyboardInterrupt:
        print("; ".join(filter(None, ("interrupted", interrupted))), file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        _free_locks()
        os._exit(130)  # at once: a normal exit would wait for compilers that run in threads
    except BrokenPipeError:  # whoever read the output has gone
        _abandon_stdout()
        code = OUTPUT_CLOSED
    except OSError as error:
        if error.errno not in places.ADVICE:
            raise
        _abandon_stdout()
        code = _report(one_line(places.explain(error)))
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        code = _report(
            f"not enough memory ({one_line(error)}); choose smaller sizes, fewer frames or a"
            " smaller batch"
        )
    sys.exit(code)


def _free_locks() -> None:
    """Free the locks that pools of processes share, as a normal exit would.

    Python's tracker of such things outlives this process, and would complain about each of them
    behind the command's last word. Nothing is waited for.
    """
    util = sys.modules.get("multiprocessing.util")
    run = getattr(util, "_run_finalizers", None)  # what multiprocessing itself calls at exit
    if run is not None:
        run(0)


def start_jax(values: Values) -> None:
    """Look for a device, and switch the cache of compiled programs on or off.

    Raises:
      DeviceError: there is none of the kind that was asked for.
    """
    from chameleon_jax import compilation, machine

    machine.device()
    if values.compilation_cache:
        compilation.use_cache()
    else:
        compilation.turn_off()


def library_module(name: str, command: str) -> NoReturn:
    """What a module of a command says when it is run itself."""
    sys.exit(_report(f"launch.{name} is a part of a command; run {command}"))


def variants(file: str) -> list[str]:
    """The constant `VARIANTS` of a config file; empty if it has none.

    The file is read, not run: that would import JAX.
    """
    for statement in ast.parse(places.find(file).read_bytes()).body:
        if isinstance(statement, ast.Assign):
            names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            if names == ["VARIANTS"]:
                return list(ast.literal_eval(statement.value))
    return []


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory, on the host or (as JAX says it) on a device."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _report(message: str) -> int:
    """One line on stderr. Returns the exit code of a fault that the user can mend."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _abandon_stdout() -> None:
    """Throw away what could not be written to stdout, or it would be tried again at the exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def _switched(name: str, value: str) -> str:
    """`--flag=false` as `--noflag`."""
    if value.lower() not in WORDS:
        raise UsageError(f"{name}={value}: expected {name} or --no{name.removeprefix('--')}")
    return name if WORDS[value.lower()] else f"--no{name.removeprefix('--')}"


def _plain(text: str) -> str:
    """A help text in which argparse looks for nothing to fill in."""
    return text.replace("%", "%%")


def _for_argparse(kind: Kind) -> Kind:
    """The same, with errors whose message argparse keeps."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _check_text(item: str) -> None:
    """Raise unless an argument is UTF-8; other bytes could not be written to a report."""
    try:
        item.encode("utf-8")
    except UnicodeEncodeError:
        shown = item.encode("utf-8", "backslashreplace").decode()
        raise UsageError(f"{shown}: not UTF-8; expected text and file names in UTF-8") from None


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """A hint at the word that is nearest; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
