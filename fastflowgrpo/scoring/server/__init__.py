"""The reward server (docs/serving.md): what it accepts, how requests share a batch, what it answers and measures."""

from fastflowgrpo.scoring.server.app import create_app

__all__ = ["create_app"]
