"""From what a user types to a folder on disk: a local folder as it is, ``owner/name[@revision]`` through the Hub's cache.

The Hub's client gives its session, the token, its locks, and where the cache is. Requests and files are made here, in the
layout that the Hub documents for other programs (https://huggingface.co/docs/hub/local-cache). The client's own download
behind a guarded session, tried with huggingface_hub 2.4, withstands the same lies in no fewer lines, and has these limits:

- ``set_client_factory`` closes the session that all threads share: whatever else the process downloads breaks off, and goes
  through the guard until it is set back. What was set before cannot be asked for.
- A file comes over one connection, and ends at a reset or a status 503. What there was of it is removed, and the next call
  begins anew. Above 50 GB there is no file without Xet.
- With Xet the transfer goes past the session. It counts silences only, of 300 seconds each, and several attempts.
- It pauses for as long as the hub says, however long that is, and warns of each attempt on stderr.
"""

from mlx_mixtral.hub.download import BytesDone
from mlx_mixtral.hub.source import Source, adapter_files, resolve, wanted_files

__all__ = ["BytesDone", "Source", "adapter_files", "resolve", "wanted_files"]
