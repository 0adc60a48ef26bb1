"""certctl's command line: what can be asked for, and how it ends.

Standard output is for answers, standard error for the rest. The exit status is 0, 1 for every error, 130 after Ctrl-C.
Nothing heavy is imported before a command runs: `--help` and `version` answer at once and need no cluster.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import certbotk8s
from certbotk8s.certctl.errors import CertctlError, tell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from certbotk8s.certctl.reader import Connection

    F = TypeVar("F", bound=Callable[..., Any])

# As a shell reports a program that SIGINT or SIGPIPE ended.
_INTERRUPTED, _BROKEN_PIPE = 130, 141
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Duration(click.ParamType[timedelta]):
    """A Go duration, as kubectl's --timeout."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        from certbotk8s.domain.renewal import parse_duration

        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _connected(command: F) -> F:
    """The options that say which cluster and which namespace, as in kubectl; also before the name of the command."""
    for option in (
        click.option("--kubeconfig", default="", metavar="FILE", help="The kubeconfig to use."),
        click.option("--context", default="", metavar="NAME", help="The context of the kubeconfig to use."),
        click.option("-n", "--namespace", default="", metavar="NAME", help="Default: the context's namespace."),
    ):
        command = option(command)
    return command


def _connection(**given: str) -> Connection:
    from certbotk8s.certctl.reader import Connection

    return Connection(**given)


@click.group(context_settings=_SETTINGS, invoke_without_command=True)
@_connected
@click.version_option(certbotk8s.__version__, message="certctl %(version)s")
@click.pass_context
def cli(ctx: click.Context, /, **given: str) -> None:
    """Show and renew the certificates that certbotk8s keeps.

    \b
    Example:
      certctl status -A
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    defaults = {name: value for name, value in given.items() if value}
    ctx.default_map = dict.fromkeys(cli.commands, defaults)


@cli.command()
@click.argument("name", default="")
@_connected
@click.option("-A", "--all-namespaces", is_flag=True, help="Certificates of all namespaces.")
@click.option("-l", "--selector", default="", metavar="LABELS", help="Only those with these labels, such as app=shop.")
@click.option("-o", "--output", type=click.Choice(["wide", "json"]), default=None, help="More columns, or JSON.")
@click.option("-w", "--watch", is_flag=True, help="Print each again when it changes, until interrupted.")
@click.option("--no-headers", is_flag=True, help="Leave out the head and the summary of the table.")
def status(
    name: str, all_namespaces: bool, selector: str, output: str | None, watch: bool, no_headers: bool, **given: str
) -> None:
    """Show all Certificates in a table, or the one of that NAME in detail.

    Times are relative; -o wide gives them absolute, in UTC.

    \b
    Examples:
      certctl status -A
      certctl status -n shop web-tls
      certctl status -n shop --watch
    """
    from certbotk8s.certctl.status import Options
    from certbotk8s.certctl.status import show as show_status
    from certbotk8s.certctl.status import watch as watch_status

    if name and (all_namespaces or selector):
        raise click.UsageError("a NAME excludes --all-namespaces and --selector")
    options = Options(name, all_namespaces, selector, output or "", headers=not no_headers)
    (watch_status if watch else show_status)(_connection(**given), options)


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_connected
@click.option("--wait", is_flag=True, help="Return when it is done; status 1 when it fails.")
@click.option("--timeout", type=_Duration(), default="5m", show_default=True, help="How long --wait waits.")
def renew(names: tuple[str, ...], wait: bool, timeout: timedelta, **given: str) -> None:
    """Order new certificates now, for the Certificates of these NAMEs.

    The present certificates stay in use until the new ones are installed.

    \b
    Example:
      certctl renew -n shop web-tls --wait
    """
    from certbotk8s.certctl.renew import renew as ask

    if not ask(_connection(**given), names, wait=wait, timeout=timeout):
        raise click.exceptions.Exit(1)


@cli.command()
def version() -> None:
    """Print the version of certctl.

    \b
    Example:
      certctl version
    """
    click.echo(f"certctl {certbotk8s.__version__}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run certctl; the exit status. `arguments` default to the process's."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal without the letter shows "?"
    try:
        with cli.make_context("certctl", list(sys.argv[1:] if arguments is None else arguments)) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # What is still in the buffer has no reader any more; without this the interpreter complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except CertctlError as error:
        tell(error)
    except click.ClickException as error:
        tell(_usage(error))
    except Exception as error:  # a bug: the user gets a sentence all the same
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}" if where else "nowhere"
        tell(CertctlError(f"a defect in certctl {certbotk8s.__version__} at {place}: {error}", "please report it"))
    else:
        return 0
    return 1


def _usage(error: click.ClickException) -> CertctlError:
    message = error.format_message().strip().removesuffix(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "certctl"
    return CertctlError(message[:1].lower() + message[1:], f"{command} --help tells what it takes")


if __name__ == "__main__":
    sys.exit(main())
