"""A user's agent: tools on the user's machine, which the application calls through the gateway.

:class:`Agent` needs the extra ``wsproxy[client]``. The application's side is :class:`wsproxy.Agents`.
"""

from ._agent import Agent
from ._context import Context

__all__ = ["Agent", "Context"]
