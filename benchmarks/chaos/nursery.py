"""Imported once by the fork server, so that an engine that is started again costs a fork and no imports."""

from chaos.scene import PROFILE
from polyserve.engines import server

server._warm_up(PROFILE)
