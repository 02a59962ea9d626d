"""The standalone cache server, `kvferry serve`: see ``docs/explanation/cache-server.md``."""
