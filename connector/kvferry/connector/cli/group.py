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
from kvferry.connector.errors import ConfigError, KVFerryError
from kvferry.connector.registry import PluginRegistry
from kvferry.connector.settings import load_settings

__all__ = ["main"]


class PluginGroup(click.Group):
    """A group whose further commands come from plugins."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return our commands, then those of plugins."""
        return [*self.commands, *sorted(set(self._offered(ctx)) - set(self.commands))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by name; ours cannot be replaced."""
        return self.commands.get(cmd_name) or self._offered(ctx).get(cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; errors of the operator or the machine are shown without a traceback."""
        try:
            return super().invoke(ctx)
        except KVFerryError as error:
            raise click.ClickException(str(error)) from error

    def _offered(self, ctx: click.Context) -> dict[str, click.Command]:
        if ctx.obj is None:
            ctx.obj = {command.name or "": command for command in PluginRegistry(_modules()).commands()}
        offered: dict[str, click.Command] = ctx.obj
        return offered


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

    The cache itself runs inside the engine; these commands look at it from outside.

    \b
    First time here?             kvferry doctor
    Nothing seems to be cached?  kvferry doctor --config kvferry.toml
                                 kvferry explain
    How fast is this machine?    kvferry bench
    """


for _command in (doctor, explain, plugins, bench):
    main.add_command(_command)
