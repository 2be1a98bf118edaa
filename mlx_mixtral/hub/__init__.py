"""From what a user types to a folder on disk: a local folder as it is, ``owner/name[@revision]`` through the Hub's cache.

The Hub's client is asked for its session, its headers and where its cache lies. Requests and files are made here: the client
gives an answer as much time and memory as it takes, and writes to the path that an answer names.
"""

from mlx_mixtral.hub.source import Source, resolve, wanted_files

__all__ = ["Source", "resolve", "wanted_files"]
