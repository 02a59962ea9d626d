"""The top-level command: our commands, the plugins' commands, and errors as one clear line.

Plugins are loaded when their commands are wanted: for the list of commands, or for a name that is not
one of ours. A plugin that fails is reported on standard error and the rest works.
"""

from __future__ import annotations

import os

import click

from kvferry.connector import __version__
from kvferry.connector.cli.bench import bench
from kvferry.connector.cli.doctor import doctor
from kvferry.connector.cli.explain import explain
from kvferry.connector.cli.plugins import plugins
from kvferry.connector.cli.serve import serve
from kvferry.connector.cli.top import top
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.offers import Offer
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import load_settings

__all__ = ["main"]


class PluginGroup(click.Group):
    """A group whose further commands come from plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return our commands, then those of plugins."""
        return [*self.commands, *sorted(self._offers(ctx))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name; ours cannot be replaced."""
        own = self.commands.get(cmd_name)
        if own is not None:
            return own
        offer = self._offers(ctx).get(cmd_name)
        return offer.thing if offer is not None else None

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; errors of the operator or the machine are shown without a traceback."""
        try:
            return super().invoke(ctx)
        except KVFerryError as error:
            raise click.ClickException(str(error)) from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # boundary: a plugin's command
            name = ctx.invoked_subcommand or ""
            if name in self.commands:
                raise
            plugin = self._offers(ctx)[name].plugin
            why = f"{type(error).__name__}: {error}"
            raise click.ClickException(f"plugin {plugin!r} failed in command {name!r}: {why}") from error

    def _offers(self, ctx: click.Context) -> dict[str, Offer[click.Command]]:
        if ctx.obj is None:
            ctx.obj = PluginRegistry(_modules()).command_offers()
        offers: dict[str, Offer[click.Command]] = ctx.obj
        return offers


def _modules() -> tuple[str, ...]:
    """Plugin modules that the environment's configuration names; a wrong one is `doctor`'s business."""
    try:
        return load_settings(environ=os.environ).config.plugins
    except ConfigError:
        return ()


@click.group(
    cls=PluginGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Documentation: docs/ in the source, or `kvferry COMMAND --help`.",
)
@click.version_option(__version__, prog_name="kvferry")
def main() -> None:
    """Ferry KV-cache blocks between LLM inference engines and storage.

    The cache runs inside the engine, or in a server (`serve`) that engines share; the other commands look at
    it from outside.

    \b
    First time here?             kvferry doctor
    Nothing seems to be cached?  kvferry doctor --config kvferry.toml
                                 kvferry explain
    How fast is this machine?    kvferry bench
    One cache for many engines?  kvferry serve --config kvferry.toml
    What does the server do?     kvferry top
    """


for _command in (doctor, serve, explain, plugins, bench, top):
    main.add_command(_command)
