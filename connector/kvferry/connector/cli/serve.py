"""``kvferry serve``: run a cache server until it is told to stop."""

from __future__ import annotations

import os

import click

from kvferry.connector.server.settings import engine_variables, load_server_settings

__all__ = ["serve"]


@click.command()
@click.option(
    "--config",
    "toml_path",
    type=click.Path(dir_okay=False),
    help="TOML file; default: $KVFERRY_CONFIG.",
)
@click.option(
    "--listen",
    metavar="ADDR",
    multiple=True,
    help="Where to listen, in place of server.listen: unix:///PATH, tcp://HOST:PORT or tls://HOST:PORT. Repeatable.",
)
@click.option(
    "--http",
    metavar="HOST:PORT",
    help='Where the metrics and the status page are, in place of server.http; "" for nowhere.',
)
def serve(toml_path: str | None, listen: tuple[str, ...], http: str | None) -> None:
    """Serve one cache to all engines of this machine, and to others that may use it.

    The cache then outlives engines: they can crash, restart and be upgraded, and find their blocks again. An
    engine uses it when its configuration says

    \b
      "service": "unix:///run/user/1000/kvferry.sock"     on this machine, sharing memory
      "service": "tls://cache.internal:7070"              anywhere

    Without any option or file it listens on $XDG_RUNTIME_DIR/kvferry.sock, or on /run/kvferry/kvferry.sock
    where that variable is not set, for processes of the same user. The file says what the cache is made of:

    \b
      [server]
      listen = ["unix:///run/kvferry/kvferry.sock", "tls://0.0.0.0:7070"]
      [server.tls]
      certificate = "/etc/kvferry/server.pem"
      [host]
      capacity = "64GiB"
      [[tiers]]
      type = "disk"
      path = "/var/lib/kvferry"
      capacity = "500GiB"

    Addresses that other machines reach need a token (KVFERRY_TOKEN) or client certificates; without, it refuses
    to start. SIGTERM and SIGINT let it finish the stores that are under way, for at most server.drain_s seconds.
    Exits with 1 when it cannot start.
    """
    overrides: dict[str, object] = {}
    if listen:
        overrides["listen"] = list(listen)
    if http is not None:
        overrides["http"] = http
    settings = load_server_settings(toml_path, os.environ, overrides)
    for name in engine_variables(os.environ):
        click.echo(f"{name} is left to engines; it means nothing to a server", err=True)
    try:
        from kvferry.connector.server.running import run
    except ImportError as error:
        raise click.ClickException(
            f"kvferry serve needs a library that is not here ({error.name}): pip install 'kvferry[server]'"
        ) from error
    run(settings)
