"""``python -m fastflowgrpo.serve``: serves rewards over HTTP (docs/serving.md)."""

import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fastflowgrpo.config import TOKEN, ServerConfig
from fastflowgrpo.console import print_error
from fastflowgrpo.errors import UserError


def parse(argv: Sequence[str] | None = None) -> ServerConfig:
    """Read the settings of a server from the command line; UserError if one is wrong."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="python -m fastflowgrpo.serve", exit_on_error=False)
    parser.add_class_arguments(ServerConfig)
    try:
        config = ServerConfig(**parser.parse_args(argv).as_dict())
    except ArgumentError as error:
        raise UserError(str(error)) from error
    for setting in fields(config):
        value, least = getattr(config, setting.name), 0 if setting.name in ("port", "delay") else 1
        if setting.type in (int, float) and not value >= least:
            raise UserError(f"{setting.name}: must be at least {least}, got {value}")
    if config.port > 65535:
        raise UserError(f"port: must be at most 65535, got {config.port}")
    return config


def listen(config: ServerConfig, token: str | None) -> socket.socket:
    """Open the socket that the server listens on.

    Raises:
        UserError: the host can be reached from other machines but there is no token, or the address cannot be used.
    """
    local = config.host == "localhost" or (_is_address(config.host) and ipaddress.ip_address(config.host).is_loopback)
    if not local and not token:
        raise UserError(f"host: {config.host} can be reached from other machines; set a token in {TOKEN}")
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    # asyncio sets this only on sockets that it opens itself; without it each answer waits 40 ms for the client's ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl+C, and then finish the requests that were taken.

    Args:
        argv: the command line without the program; by default the process's.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    try:
        config = parse(argv)
        token = os.environ.get(TOKEN)
        # Imported only here, so that --help and a wrong setting do not wait for torch.
        from fastflowgrpo.rewards import build_rewards

        try:
            import uvicorn

            from fastflowgrpo.scoring.server import create_app
        except ImportError as error:
            raise UserError(f'{error}; install it with: pip install "fastflowgrpo[serve]"') from error
        try:
            rewards = build_rewards(config.rewards).rewards
        except ValueError as error:
            raise UserError(str(error)) from error
        with listen(config, token) as listener:
            host, port = listener.getsockname()[:2]
            print(f"serving {', '.join(rewards)} on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again when it has finished
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup lets it be ignored
                signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
            uvicorn.Server(uvicorn.Config(create_app(rewards, config, token), log_level="warning")).run([listener])
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:
        pass
    return 0


def _is_address(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


if __name__ == "__main__":
    sys.exit(main())
