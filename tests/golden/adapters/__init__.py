"""From a case of a golden file to the values the library computes for it: an adapter per file, of the same name."""

from . import offline, offline_more, online, online_parts, text_core, text_more, text_unpaired
from .common import ADAPTERS, OBJECTIVES_OF, REQUIRED, Given

__all__ = [
    "ADAPTERS",
    "OBJECTIVES_OF",
    "REQUIRED",
    "Given",
    "offline",
    "offline_more",
    "online",
    "online_parts",
    "text_core",
    "text_more",
    "text_unpaired",
]
